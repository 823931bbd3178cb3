"""What a machine without a GPU can do with a program for one: export, replay its launches, compile it up to the cubins.

Inductor asks the card for its properties and runs kernels while it compiles; here it is told those of an H100 and runs
none. A process that compiles kernels cannot interpret them, so that launches are replayed by another.
"""

import contextlib
import copy
import importlib
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten


def compiles_for(capability):
    """Let Triton compile for such a card."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    device = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, **device))


def told_about_a_gpu(capability):
    """Let torch take this machine for one with such a card, on which nothing runs; from then on it exports no more."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import graph
    from torch._inductor.codegen import wrapper
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.compiler.compiler import CompiledKernel

    card = SimpleNamespace(
        name="a card", major=capability // 10, minor=capability % 10, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, total_memory=80 << 30,
        L2_cache_size=50 << 20, gcnArchName="", clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
    )  # fmt: skip
    facts = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": card, "set_device": None,
        "synchronize": None, "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "get_device_capability": (card.major, card.minor),
    }  # fmt: skip
    for name, answer in facts.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    facts |= {"get_compute_capability": capability, "get_raw_stream": 0, "is_triton_capable": True}
    facts |= {"exchange_device": 0, "maybe_exchange_device": 0, "raise_if_triton_unavailable": None}
    for name, answer in facts.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: card)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    torch._C._cuda_getCurrentRawStream = lambda _: 0

    joint_graph.lazy_init = lambda *_: None  # traces attention patterns on the card
    graph.is_same_tensor = lambda a, b: a is b  # which have no addresses
    triton_helpers.set_driver_to_gpu = lambda: None
    wrapper._constants_offloaded_to_disk = contextlib.nullcontext
    CompiledKernel._init_handles = lambda self: self.__dict__.update(_run=None, function=0, n_regs=0, n_spills=0)

    def compile_and_keep(self, *_, stream=None, **__):
        if not self.launchers:
            self.precompile()
        self.save_gpu_kernel(stream, self.launchers[0])

    tune = wrapper.PythonWrapperCodegen.generate_and_run_autotune_block

    def tune_on_nothing(self):
        with FakeTensorMode():
            tune(self)

    CachingAutotuner.run = compile_and_keep
    wrapper.PythonWrapperCodegen.generate_and_run_autotune_block = tune_on_nothing


def export(model, example, dynamic_shapes=None):
    """`torch.export.export` of a model as if it were on CUDA: of what it holds there are shapes and no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def there(t):
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(there(p), requires_grad=False)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else there(b)
    with mode, torch.no_grad():
        return torch.export.export(model, (there(example),), dynamic_shapes=dynamic_shapes)


def compiled(program, **options):
    """(C++, files with cubins by kernel): what AOTInductor would have the host's compiler make a package of."""
    from torch._inductor.codecache import AotCodeCompiler, CudaKernelParamCache

    mode = next(node.meta["val"].fake_mode for node in program.graph.nodes if node.op == "placeholder")
    for name, t in program.state_dict.items():
        with mode:
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        program.state_dict[name] = nn.Parameter(fake, requires_grad=False) if isinstance(t, nn.Parameter) else fake
    found = []

    def keep(graph, wrapper_code, *_, **__):
        found.extend((wrapper_code, {name: kept["cubin_path"] for name, kept in CudaKernelParamCache.cache.items()}))
        raise _KeptError

    AotCodeCompiler.compile = keep
    options |= {"triton.autotune_at_compile_time": True}
    with contextlib.suppress(_KeptError):
        try:
            torch._inductor.aoti_compile_and_package(program, inductor_configs=options)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.inner_exception, _KeptError):
                raise
    return tuple(found)


class _KeptError(Exception):
    """There is no more to compile without headers and a library of CUDA."""


class Replay(torch.fx.Interpreter):
    """A graph with `triton_kernel_wrapper_functional` on CPU tensors, its launches by Triton's interpreter.

    What is allocated is poisoned. PTX=False has the same bits as PTX=True, which the interpreter cannot run.
    """

    def __init__(self, program, interpreter):
        super().__init__(program.graph_module)
        self.interpreter, self.launches = interpreter, []

    def call_function(self, target, args, kwargs):
        if target is torch.ops.higher_order.triton_kernel_wrapper_functional:
            return self._launch(**kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        result = super().call_function(target, args, kwargs)
        if target in (aten.empty.memory_format, aten.new_empty.default):
            result.fill_(float("nan") if result.is_floating_point() else 0xFF)
        return result

    def _launch(self, *, kernel_idx, constant_args_idx, grid, kwargs, tensors_to_clone, **_):
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel = kernel_side_table.get_kernel(kernel_idx)
        kernel = kernel.fn if hasattr(kernel, "configs") else kernel  # with its warps and stages
        given = {**kwargs, **kernel_side_table.get_constant_args(constant_args_idx)}
        given = {name: given[name] for name in kernel.arg_names} | ({"PTX": False} if "PTX" in given else {})
        self.launches.append((kernel.fn.__name__, grid[0]))
        return self.interpreter((kernel.fn.__module__, kernel.fn.__name__, grid[0], given, tensors_to_clone))


@contextlib.contextmanager
def interpreter():
    """A function that launches a kernel in a process that interprets, and returns what it wrote."""
    command = [sys.executable, "-m", __name__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:

        def launch(request):
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)

        yield launch
        process.stdin.close()


def interpret():
    """Serve `interpreter`."""
    while True:
        try:
            module, name, grid, given, written = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        getattr(importlib.import_module(module), name)[tuple(grid)](**given)
        pickle.dump({key: given[key] for key in written}, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    interpret()
