"""What two processes check together: every function is run by both, on one process group; see test_distributed."""

import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import parallelize_module

import fp4fx

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")
RANKS = 2


class Block(nn.Module):
    """Two linears with a norm in front, as a transformer's MLP."""

    def __init__(self, bias=True, inner=96):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, inner, bias=bias), nn.Linear(inner, 64, bias=bias)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def model(policy=ALL, **kwargs):
    torch.manual_seed(0)
    return fp4fx.quantize(nn.Sequential(Block(**kwargs), Block(**kwargs)), policy)


def batch():
    torch.manual_seed(1)
    return torch.randn(2 * RANKS, 5, 64)


def single(policy=ALL):
    """Gradients of one process on the whole batch, by parameter."""
    q = model(policy)
    q(batch()).square().mean().backward()
    return {name: p.grad for name, p in q.named_parameters()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def mine(x):
    return x.chunk(RANKS)[dist.get_rank()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_ddp():
    q = nn.parallel.DistributedDataParallel(model())
    q(mine(batch())).square().mean().backward()
    expected = single()
    assert len(expected) == 12 - 4  # the weights are frozen
    for name, p in q.module.named_parameters():
        close(p.grad, expected[name])
    assert q.module[0].up.weight_packed.dtype == torch.uint8


def check_fsdp2():
    q, mesh = model(), init_device_mesh("cpu", (RANKS,))
    bytes_before = q[0].up.weight_packed.clone()
    for layer in q:
        fully_shard(layer, mesh=mesh)
    fully_shard(q, mesh=mesh)
    x = mine(batch())
    y = q(x)
    close(y, model()(x))
    y.square().mean().backward()
    expected = single()
    for name, p in q.named_parameters():
        assert isinstance(p, DTensor)
        close(whole(p.grad), expected[name])
    optimizer = torch.optim.SGD(q.parameters(), 0.1)
    optimizer.step()
    assert torch.equal(q[0].up.weight_packed, bytes_before) and torch.isfinite(q(x)).all()


def parallelized(q, rowwise, colwise):
    plan = {f"{i}.{name}": style() for i in range(2) for name, style in (("up", colwise), ("down", rowwise))}
    return parallelize_module(q, init_device_mesh("cpu", (RANKS,)), plan)


def check_tensor_parallel():
    from fp4fx.parallel import ColwiseParallel, RowwiseParallel

    better = fp4fx.Policy.w4a4(skip_first=0, skip_last=0, activation_scale_rule="four_over_six")
    for policy in (ALL, fp4fx.Policy.w4a4(skip_first=0, skip_last=0), better):
        for bias in (True, False):
            q, reference = (
                parallelized(model(policy, bias=bias), RowwiseParallel, ColwiseParallel),
                model(policy, bias=bias),
            )
            a, b = (batch().requires_grad_() for _ in range(2))
            y, expected = q(a), reference(b)
            close(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            close(a.grad, b.grad)
            for p, r in zip(q.parameters(), reference.parameters(), strict=True):
                close(whole(p.grad), r.grad)
            up, down = q[0].up, q[0].down
            assert up.weight_packed.to_local().shape == (48, 32) and up.weight_scale.to_local().shape == (48, 4)
            assert down.weight_packed.to_local().shape == (64, 24) and down.weight_scale.to_local().shape == (64, 3)
            assert up.weight.shape == (96, 64) and torch.equal(whole(up.weight), reference[0].up.weight)
            assert torch.equal(whole(down.weight), reference[0].down.weight)


def check_tensor_parallel_of_an_embedding():
    from fp4fx.parallel import ColwiseParallel, RowwiseParallel

    policy = fp4fx.Policy(skip_first=0, skip_last=0, embeddings=True)
    indices = torch.tensor([[0, 7, 39], [20, 19, 3]])
    for style in (
        RowwiseParallel(input_layouts=Replicate()),
        ColwiseParallel(output_layouts=Replicate()),
    ):
        torch.manual_seed(0)
        table = fp4fx.quantize(nn.Sequential(nn.Embedding(40, 64)), policy)
        expected = table(indices)
        q = parallelize_module(table, init_device_mesh("cpu", (RANKS,)), {"0": style})
        assert q[0].weight_packed.to_local().numel() == 40 * 32 // RANKS
        close(q(indices), expected)


def check_tensor_parallel_compiled():
    from fp4fx.parallel import ColwiseParallel, RowwiseParallel

    q = parallelized(model(), RowwiseParallel, ColwiseParallel)
    with torch.no_grad():
        compiled = torch.compile(q, backend="fp4fx")
        close(compiled(batch()), model()(batch()))
    report = fp4fx.report(q)
    kernels = {kernel for row in report.rows for kernel in row.kernels}
    assert kernels == {"dequantize: reference"}, kernels
    assert all("distributed" in row.refusals[0] for row in report.rows if row.kernels)
    assert report.resident < fp4fx.report(model()).resident


def check_what_cannot_be_sharded_is_named():
    from fp4fx.parallel import ColwiseParallel, RowwiseParallel

    try:
        parallelized(model(inner=80), RowwiseParallel, ColwiseParallel)
    except fp4fx.LayoutError as error:
        assert "K=80 for 2 ranks, expected a multiple of 32" in str(error)
    else:
        raise AssertionError("5 blocks on 2 ranks")
    try:
        parallelized(model(), torch_parallel.RowwiseParallel, ColwiseParallel)
    except fp4fx.PlanError as error:
        assert "fp4fx.parallel.RowwiseParallel" in str(error)
    else:
        raise AssertionError("torch's own style on a packed weight")


def check_torchs_own_colwise_leaves_weights_whole():
    from fp4fx.parallel import RowwiseParallel

    q = parallelized(model(), RowwiseParallel, torch_parallel.ColwiseParallel)
    close(q(batch()), model()(batch()))
    assert q[0].up.weight_packed.to_local().shape == (96, 32)


def run(rank, store, results):
    """One process: every check of this module, its traceback into a file of its name."""
    sys.stderr = (results / f"stderr-{rank}").open("w")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(minutes=1)
    )
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                torch._dynamo.reset()
                check()
                outcome = ""
            except Exception:  # noqa: BLE001  (the parent shows it)
                outcome = traceback.format_exc()
            (results / f"{name}-{rank}").write_text(outcome)
    dist.destroy_process_group()
