"""Modes of torch.compile reach the backend, and models behave in them as they do without it."""

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import capture
from tests.models import ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


MODES = {
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune": {"max_autotune": True, "triton.cudagraphs": True, "coordinate_descent_tuning": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
}


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_reaches_inductor(mode, monkeypatch):
    q, x, seen = fp4fx.quantize(ConvNet().eval(), ALL), torch.randn(2, 3, 8, 8), []
    lower = capture.lower

    def watched(gm, inputs, options):
        seen.append(dict(options))
        return lower(gm, inputs, options)

    monkeypatch.setattr(capture, "lower", watched)
    with torch.no_grad():
        close(torch.compile(q, backend="fp4fx", mode=mode, fullgraph=True)(x), q(x))
    assert len(seen) == 1 and MODES[mode].items() <= seen[0].items()


def test_a_cpp_wrapper_calls_the_kernels_more_than_once():
    """With lists of SymInt where Python gives ints; the first call does not come from C++."""
    layers = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 32, 2, stride=2), nn.Conv2d(32, 4, 1)]
    q, x = fp4fx.quantize(nn.Sequential(*layers).eval(), ALL), torch.randn(2, 16, 8, 8)
    compiled = torch.compile(q, backend="fp4fx", options={"cpp_wrapper": True})
    with torch.no_grad():
        for _ in range(3):
            close(compiled(x), q(x))
    assert {kernel for row in fp4fx.report(q).rows for kernel in row.kernels} == {"conv: cpu", "conv_transpose: cpu"}


def test_a_mode_that_does_not_exist_is_an_error():
    q = fp4fx.quantize(nn.Linear(32, 8), ALL)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"mode: found 'fastest', expected .*max-"):
        torch.compile(q, backend="fp4fx", mode="fastest")(torch.randn(2, 32))


class Restless(nn.Module):
    """Dropout, stochastic depth and BatchNorm around packed layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.5)

    def forward(self, x):
        branch = self.b(self.drop(torch.relu(self.norm(self.a(x)))))
        keep = (torch.rand(x.shape[0], 1) < 0.5).to(x.dtype) if self.training else 1.0
        return x + branch * keep


@pytest.mark.parametrize("policy", [ALL, fp4fx.Policy.w4a4(skip_first=0, skip_last=0, compute="fp32")])
def test_train_and_eval_stay_what_they_were(policy):
    torch.manual_seed(0)
    q, x = fp4fx.quantize(Restless().eval(), policy), torch.randn(64, 32)
    compiled = torch.compile(q, backend="fp4fx")
    with torch.no_grad():
        close(compiled(x), q(x))
        mean = q.norm.running_mean.clone()

        compiled.train()
        first, second = compiled(x), compiled(x)
        assert not torch.equal(first, second)
        assert (first == x).all(1).float().mean() > 0.2  # branches were dropped
        moved = q.norm.running_mean.clone()
        assert not torch.equal(moved, mean)

        compiled.eval()
        close(compiled(x), q(x))  # with the statistics that have moved
        assert torch.equal(compiled(x), compiled(x)) and torch.equal(q.norm.running_mean, moved)


def test_dropout_of_the_same_seed_drops_the_same_as_a_dense_model():
    """In eager mode every random number is drawn where the original draws it."""
    model = Restless().train()
    q, x = fp4fx.quantize(model, ALL), torch.randn(16, 32)
    dense = Restless().train()
    dense.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
    dense.a.weight.data, dense.b.weight.data = q.a.weight, q.b.weight
    torch.manual_seed(5)
    expected = dense(x)
    torch.manual_seed(5)
    assert torch.equal(q(x), expected)


def test_hooks_run_in_a_compiled_model():
    q, x = fp4fx.quantize(ConvNet().eval(), ALL), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = q(x)
        q.body.register_forward_hook(lambda m, args, out: out * 2)
        q.head.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        expected = q(x)
        assert not torch.allclose(plain, expected)
        close(torch.compile(q, backend="fp4fx")(x), expected)
    grads = []
    q.body.register_full_backward_hook(lambda m, given, out: grads.append(out[0].shape))
    q(x).sum().backward()
    assert grads == [torch.Size([2, 32, 8, 8])]


def test_threads_compile_models_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    models = [fp4fx.quantize(nn.Sequential(nn.Linear(32, 32 + 16 * i), nn.ReLU()).eval(), ALL) for i in range(4)]
    x = torch.randn(3, 32)

    def work(q):
        with torch.no_grad():
            compiled = torch.compile(q, backend="fp4fx")
            return [compiled(x) for _ in range(4)][-1], q(x)

    with ThreadPoolExecutor(4) as pool:
        for found, expected in pool.map(work, models):
            close(found, expected)
