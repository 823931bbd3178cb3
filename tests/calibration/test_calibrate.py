"""The entry: what it refuses, what an interruption leaves, what a file keeps."""

import json
import platform
import weakref
from pathlib import Path
from resource import getpagesize
from statistics import median

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx.calibration import GPTQ, BiasCorrection, Calibration, StaticScales, calibration_of
from fp4fx.calibration.data import Enough, forward
from tests.models import ConvNet

ALL = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1)
W4A4 = fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0, min_channels=1, activations="nvfp4")


def batches(n=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(n)]


def test_a_forward_that_is_cut_short_keeps_no_activation():
    alive, kept = [], []

    class Stops(nn.Module):
        def forward(self, x):
            y = x + 1
            alive.append(weakref.ref(y))
            end = Enough()
            kept.append(end)  # as what a dispatcher on the way may hold on to
            raise end

    forward(Stops(), torch.zeros(2))
    assert alive[0]() is None and kept[0].__traceback__ is not None


def given_back():
    """The part of tensors freed from between others that leaves the process at once."""
    tensors = [torch.ones(1 << 20) for _ in range(128)]  # more than the heap has free pieces for
    pages = [int(Path("/proc/self/statm").read_text("ascii").split()[1])]
    freed = sum(t.nbytes for t in tensors[1::2])
    del tensors[1::2]
    pages.append(int(Path("/proc/self/statm").read_text("ascii").split()[1]))
    return (pages[0] - pages[1]) * getpagesize() / freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc's malloc keeps")
def test_memory_is_given_back_at_once_while_calibrating(model):
    found = []

    class Measures(list):
        def __iter__(self):
            found.append(given_back())
            return super().__iter__()

    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, Measures(batches()), reference=model, methods=["gptq"])
    assert median(found) > 0.6 and given_back() < 0.5  # batches are looked at ahead of it, too


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ConvNet().eval()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], "found none"),
        ([torch.zeros(0, 3, 8, 8)], "batch 0: found a tensor of shape"),
        ([torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)], "batch 1: found 384 NaN in 384"),
        ([torch.randn(2, 4, 8, 8)], r"batch 0: the model does not run on inputs \[\(2, 4, 8, 8\)\]"),
        ([(torch.randn(2, 3, 8, 8), torch.zeros(2))], "without labels"),
        ([torch.randn(2, 3, 8, 8, device="meta")], "batch 0: found a tensor on meta, expected cpu"),
        (torch.randn(2, 3, 8, 8), "found one Tensor, expected an iterable"),
        ({"x": torch.randn(2, 3, 8, 8)}, "found one dict"),
        (iter(batches()), "an iterator, which can be read once"),
        (None, "found no batches"),
    ],
)
def test_bad_data_is_named_and_changes_nothing(model, given, found):
    qmodel = fp4fx.quantize(model, ALL)
    state = {name: value.clone() for name, value in qmodel.state_dict().items()}
    with pytest.raises(fp4fx.CalibrationError, match=found):
        fp4fx.calibrate(qmodel, given, reference=model, methods=["gptq", "bias_correction"])
    assert all(torch.equal(value, state[name]) for name, value in qmodel.state_dict().items())
    assert not torch.is_grad_enabled() or torch.backends.mha.get_fastpath_enabled()


def test_bad_models_and_methods_are_named(model):
    qmodel = fp4fx.quantize(model, ALL)
    for call, found in (
        (lambda: fp4fx.calibrate(model, batches()), "without a plan"),
        (lambda: fp4fx.calibrate(qmodel, batches(), methods=["gptq"]), "gptq: found no reference"),
        (
            lambda: fp4fx.calibrate(qmodel, batches(), methods=["magic"]),
            "'magic', expected one of static_scales, smoothing",
        ),
        (lambda: fp4fx.calibrate(qmodel, batches(), methods=[GPTQ]), "no instance of a method"),
        (lambda: fp4fx.calibrate(qmodel, batches(), reference=qmodel, methods=["gptq"]), "found a quantized model"),
        (lambda: fp4fx.calibrate(qmodel, batches(), reference=ConvNet(16).eval(), methods=["gptq"]), "another shape"),
        (lambda: fp4fx.calibrate(qmodel, batches(), reference=nn.Linear(2, 2).eval(), methods=["gptq"]), "or none"),
        (lambda: fp4fx.calibrate(qmodel, methods=["static_scales"]), "static_scales: found no batches"),
        (
            lambda: fp4fx.calibrate(qmodel, batches(), reference=ConvNet(), methods=["gptq"]),
            "reference: .* training mode",
        ),
        (lambda: StaticScales(rule="median"), "a rule of max, percentile, mse"),
        (lambda: fp4fx.calibrate(fp4fx.quantize(model, ALL).train(), batches(), reference=model), "training mode"),
    ):
        with pytest.raises(fp4fx.CalibrationError, match=found):
            call()


def test_inputs_of_all_kinds(model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(32, 32)

        def forward(self, x, *, scale):
            return self.lin(x * scale)

    two = Two().eval()
    qmodel = fp4fx.quantize(two, ALL)
    given = [{"x": torch.randn(64, 32), "scale": torch.tensor(2.0)} for _ in range(2)]
    fp4fx.calibrate(qmodel, given, reference=two, methods=["gptq"])
    assert len(calibration_of(qmodel).steps) == 1
    qmodel = fp4fx.quantize(model, W4A4)
    loader = torch.utils.data.DataLoader([x for batch in batches() for x in batch], batch_size=5)
    fp4fx.calibrate(qmodel, loader, reference=model, methods=["static_scales"])
    assert all(s.changed for s in calibration_of(qmodel).steps)
    qmodel = fp4fx.quantize(model, W4A4)
    fp4fx.calibrate(qmodel, iter(batches()), methods=["static_scales"])  # one pass will do
    assert all(s.changed for s in calibration_of(qmodel).steps)


def test_an_interrupted_call_goes_on_where_it_stopped(model, monkeypatch):
    qmodel, whole = fp4fx.quantize(model, ALL), fp4fx.quantize(model, ALL)
    solve, solved = GPTQ._solve, []

    def interrupted(self, *args):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(1)
        return solve(self, *args)

    monkeypatch.setattr(GPTQ, "_solve", interrupted)
    method = GPTQ(memory=1)
    with pytest.raises(KeyboardInterrupt):
        fp4fx.calibrate(qmodel, batches(), reference=model, methods=[method])
    assert [s.parameter for s in calibration_of(qmodel).steps] == ["stem.weight", "body.weight"]
    old = qmodel.stem.weight.clone()
    monkeypatch.setattr(GPTQ, "_solve", solve)
    fp4fx.calibrate(qmodel, batches(), reference=model, methods=[method])
    fp4fx.calibrate(whole, batches(), reference=model, methods=[method])
    assert torch.equal(old, qmodel.stem.weight)
    assert calibration_of(qmodel) == calibration_of(whole)
    for name, value in qmodel.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_done_sites_are_left_alone_unless_asked_again(model, monkeypatch):
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, batches(), reference=model, methods=["gptq", "bias_correction"])
    record = calibration_of(qmodel)
    with monkeypatch.context() as patch:
        patch.setattr(ConvNet, "forward", lambda *_: pytest.fail("the model ran"))
        patch.setattr(type(qmodel), "forward", lambda *_: pytest.fail("the model ran"))
        fp4fx.calibrate(qmodel, batches(), reference=model, methods=["gptq", "bias_correction"])
    assert calibration_of(qmodel) == record
    # New weights need a new correction of their biases.
    fp4fx.calibrate(qmodel, batches(5), reference=model, methods=[GPTQ(damping=0.1)], again=True)
    methods = [s.method for s in calibration_of(qmodel).steps]
    changed = [s for s in calibration_of(qmodel).steps if s.method == "gptq" and s.changed]
    assert methods.count("gptq") == 4 and methods.count("bias_correction") == 4 - len(changed)


def test_the_record_survives_a_file_and_shows_in_the_report(model, tmp_path):
    qmodel = fp4fx.quantize(model, W4A4)
    fp4fx.calibrate(qmodel, batches(), reference=model, methods=["static_scales", "gptq", "bias_correction"])
    fp4fx.save(qmodel, tmp_path / "m.safetensors")
    again = fp4fx.load(ConvNet().eval(), tmp_path / "m.safetensors")
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(again(x), qmodel(x))
    assert calibration_of(again) == calibration_of(qmodel)
    report = fp4fx.report(again)
    assert "error before" in str(report) and "codes of gptq" in str(report)
    data = json.loads(report.to_json())["calibration"]
    assert Calibration.from_dict(data) == calibration_of(qmodel)
    assert {d.spec.activations for d in fp4fx.packed.plan_of(again).quantized} == {"nvfp4-static"}
    assert fp4fx.report(fp4fx.quantize(model, ALL)).calibration is None


def test_methods_may_have_options(model):
    qmodel = fp4fx.quantize(model, ALL)
    fp4fx.calibrate(qmodel, batches(), reference=model, methods=[GPTQ(act_order=True), BiasCorrection()])
    assert "act_order=True" in calibration_of(qmodel).steps[0].options
