"""What is asked of one model: a plan that accounts for all of it, packed weights that run, a graph that agrees."""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fp4fx
from benchmarks.zoo.catalog import Entry, Trial, trials
from fp4fx.plan import Plan

UNSEEN = "never called in the trace"
NAMED = re.compile(r"(?<=not used before )\S+(?= could)|(?<=is made from )\S+")

Row = dict[str, Any]


def quantized(entry: Entry, largest: int) -> Row:
    """Steps 1 and 2: the plan on the meta device, then the quantized model in eager mode.

    A model of more than `largest` parameters is planned only.
    """
    start = perf_counter()
    *_, trial = trials(entry)
    if sum(p.numel() for p in _on_meta(trial).parameters()) > largest:
        row, _ = _planned(trial)
        return {**row, "eager": f"planned only: more than {largest:,} parameters", "seconds": perf_counter() - start}
    trial, model, expected, used, failures = _run(entry)
    args, kwargs = trial.arguments("cpu")
    row, plan = _planned(trial)
    row["overlooked"] = sorted(_overlooked(plan, used))
    packed = fp4fx.quantize(model)
    with torch.no_grad(), _watched(packed, trial) as seen:
        packed(*args, **kwargs)
        found = seen()
    with torch.no_grad(), _watched(model, trial) as seen:
        model(*args, **kwargs)
        again = seen()
    report = fp4fx.report(packed)
    signal, noise = float(expected.norm()), float((found - expected).norm())
    row |= {
        "eager": "ran",
        "finite": bool(found.isfinite().all()),
        "reference_finite": bool(expected.isfinite().all()),
        "untouched": bool(torch.equal(expected, again)),
        "sqnr_db": round(20 * torch.tensor(signal / noise).log10().item(), 2) if signal and noise else None,
        "bits": round(report.bits, 4),
        "resident": report.resident,
        "dense": report.dense,
        "seconds": perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return row if not failures else {**row, "larger_input_because": failures[-1]}


def compiled(entry: Entry) -> Row:
    """Step 3: the compiled graph beside eager mode, and the trace on example inputs beside the one without."""
    start = perf_counter()
    trial, model, *_ = _run(entry)
    args, kwargs = trial.arguments("cpu")
    symbolic = {d.site.parameter for d in fp4fx.plan(model).decisions}
    exact = fp4fx.plan(model, None, args, kwargs)
    packed = fp4fx.quantize(model, fp4fx.Policy(compute="fp32"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(packed, backend="fp4fx")
    with torch.no_grad(), _watched(packed, trial) as seen:
        packed(*args, **kwargs)
        expected = seen()
        before = perf_counter()
        fast(*args, **kwargs)
        seconds = perf_counter() - before
        fast(*args, **kwargs)
        found = seen()
    counters = torch._dynamo.utils.counters
    rows = [r for r in fp4fx.report(packed).rows if r.decision != "kept"]
    difference = float((found - expected).norm() / expected.norm()) if expected.norm() else float(found.norm())
    return {
        **_made(trial),
        "difference": difference,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sorted(_first_line(why) for why in counters["graph_break"]),
        "kernels": dict(Counter(kernel for r in rows for kernel in r.kernels or ("none",))),
        "refusals": dict(Counter(why for r in rows for why in r.refusals)),
        "exact_sites": len(exact.decisions),
        "exact_only": sorted({d.site.parameter for d in exact.decisions} - symbolic),
        "export_failed": next((note.reason for note in exact.opaque if not note.name), None),
        "compile_s": seconds,
        "seconds": perf_counter() - start,
    }


class _Uses(TorchDispatchMode):
    """Notes which parameters the products of a forward read, seen below autograd: independent of any tracer."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "mv", "addmv", "_embedding_bag")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.names = {
            p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() >= 2 and p.numel()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            for value in args:
                if isinstance(value, Tensor):
                    self.found |= {self.names.get(value.untyped_storage().data_ptr(), "")} - {""}
        return func(*args, **(kwargs or {}))


def _overlooked(plan: Plan, used: set[str]) -> set[str]:
    """Parameters in a product of the forward that the plan neither has as a site nor gives a true reason for."""
    sites = {name for d in plan.decisions for name in (d.site.parameter, *d.site.tied)}
    noted = {note.name for note in plan.unreached if note.reason != UNSEEN}
    return used - sites - noted


def _planned(trial: Trial) -> tuple[Row, Plan]:
    """What `fp4fx.plan` says of the model on the meta device."""
    model = _on_meta(trial)
    start = perf_counter()
    plan = fp4fx.plan(model)
    seconds = perf_counter() - start
    sites = {name for d in plan.decisions for name in (d.site.parameter, *d.site.tied)}
    noted = {note.name for note in plan.unreached}
    weights = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    unique = {d.site.parameter: d.site.numel for d in plan.quantized}
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **_made(trial),
        "sites": len(plan.decisions),
        "quantized_sites": len(plan.quantized),
        "quantized": sum(unique.values()),
        "kept": dict(Counter(d.rule for d in plan.kept)),
        "left_alone": dict(Counter(NAMED.sub("…", note.reason) for note in plan.unreached)),
        "opaque": len(plan.opaque),
        "unaccounted": sorted(set(weights) - sites - noted),
        "plan_s": seconds,
    }
    return row, plan


def _made(trial: Trial) -> Row:
    return {"input": [list(shape) for shape in trial.shapes], "options": dict(trial.options)}


def _run(entry: Entry) -> tuple[Trial, nn.Module, Tensor, set[str], list[str]]:
    """The first trial whose model takes its input: the model, what it gave, what its products read, why not others."""
    failures: list[str] = []
    ways = list(trials(entry))
    for trial in ways:
        try:
            model = _real(trial)
            args, kwargs = trial.arguments("cpu")
            with torch.no_grad(), _watched(model, trial) as seen, _Uses(model) as uses:
                model(*args, **kwargs)
                return trial, model, seen(), uses.found, failures
        except Exception as error:  # noqa: BLE001  (a model may raise anything at an input it does not take)
            failures.append(f"{trial.shapes}: {_first_line(error)}")
    raise RuntimeError(failures[-1])


def _on_meta(trial: Trial) -> nn.Module:
    """The model without values; one that computes with tensors while it is built is built with them."""
    try:
        with torch.device("meta"), _Uninitialised():
            return trial.build().eval()
    except (NotImplementedError, RuntimeError):
        return trial.build().eval().to("meta")


class _Uninitialised(TorchFunctionMode):
    """Leaves out what is written into tensors on the meta device, which takes longer there than with values."""

    WRITES = tuple(f"{name}_" for name in ("normal", "uniform", "clamp", "erfinv", "mul", "add", "fill", "zero"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        initialises = getattr(func, "__module__", None) == "torch.nn.init"
        if initialises or getattr(func, "__name__", None) in self.WRITES:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _real(trial: Trial) -> nn.Module:
    """The model with random weights, no branch of it at zero."""
    torch.manual_seed(0)
    model = trial.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.numel()
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@contextlib.contextmanager
def _watched(model: nn.Module, trial: Trial) -> Iterator[Callable[[], Tensor]]:
    """Gives a function that returns what the model last gave, flat in fp64; of a detector, what its head gave.

    Thresholds and suppression make different numbers of boxes out of nearly equal scores.
    """
    module = getattr(model.get_submodule("rpn"), "head", None) if trial.detector and hasattr(model, "rpn") else None
    module = module or (model.get_submodule("head") if trial.detector else model)
    last: list[Any] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        last[:] = [output]

    hook = module.register_forward_hook(note)
    try:
        yield lambda: torch.cat([t.double().flatten() for t in _tensors(last.pop())])
    finally:
        hook.remove()
        gc.collect()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _first_line(error: object) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if isinstance(error, Exception) else text


def work(step: str, entry: Entry, gigabytes: float, largest: int, out: Connection) -> None:
    """In a process of its own: the row of one step, sent to `out`; whatever is raised is its error."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.freeze()  # what the imports made need not be looked through after every forward
    known: Row = {"source": entry.source, "family": entry.family, "step": step}
    try:
        row = {**known, **(quantized(entry, largest) if step == "quantize" else compiled(entry))}
    except Exception as error:  # noqa: BLE001
        row = {**known, "error": _first_line(error)}
    out.send(row)
