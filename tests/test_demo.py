import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import bench, demo, digits
from fp4fx.bench import EAGER, FP4FX, Candidate, Row, Timing
from fp4fx.errors import HubError

pytest.importorskip("sklearn", reason="needs the extra `demo`")


@pytest.fixture(scope="module")
def trained():
    train, test = digits.load()
    return digits.train(train), test


def test_the_split_is_whole_fair_and_fixed():
    train, test = digits.load()
    assert (len(train.labels), len(test.labels)) == (1257, 540)
    assert train.images.shape == (1257, 1, 8, 8)
    assert 0 <= train.images.min() < train.images.max() <= 1
    assert test.labels.bincount().min() > 50
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert torch.equal(digits.load()[1].images, test.images)


def test_training_passes_95_percent_on_the_held_out_images(trained):
    model, test = trained
    assert not model.training
    assert (digits.predict(model, test) == test.labels).double().mean() > 0.95
    untrained = digits.DigitNet().eval()
    assert (digits.predict(untrained, test) == test.labels).double().mean() < 0.5


def test_training_is_repeatable_and_leaves_the_random_state_alone():
    train, _ = digits.load()
    few = digits.Digits(train.images[:128], train.labels[:128])
    state = torch.get_rng_state()
    first, second, other = (digits.train(few, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[-1].weight, second[-1].weight)
    assert not torch.equal(first[-1].weight, other[-1].weight)


def test_three_precisions_side_by_side(trained):
    results = digits.compare(*trained)
    fp32, w4a16, w4a4 = results
    assert [r.precision for r in results] == ["fp32", "W4A16", "W4A4"]
    assert (fp32.quantized, fp32.changed) == (0, 0)
    assert fp32.accuracy > 0.95
    for result in (w4a16, w4a4):
        assert result.quantized > 0.9
        assert result.weights < 0.2 * fp32.weights
        assert result.accuracy > fp32.accuracy - 0.03
        assert abs(result.accuracy - fp32.accuracy) * 540 <= result.changed + 1e-6
    assert len(digits.table(results).splitlines()) == 5


def test_activations_are_quantized_only_in_w4a4(trained):
    model, test = trained
    few = digits.Digits(test.images[:32], test.labels[:32])
    dense, w4a16, w4a4 = (
        m(few.images)
        for m in (model, *(fp4fx.quantize(model, p) for p in (fp4fx.Policy.weight_only(), fp4fx.Policy.w4a4())))
    )
    assert fp4fx.nvfp4.sqnr(dense, w4a4) < fp4fx.nvfp4.sqnr(dense, w4a16) < 40


def test_photographs_are_sixteen_different_crops():
    images = demo.photographs()
    assert images.shape == (16, 3, 224, 224)
    assert images.dtype == torch.float32
    assert -2.2 < images.min() < -1
    assert 1 < images.max() < 2.8
    assert len({image.numpy().tobytes() for image in images}) == 16
    # neighbours overlap: the right part of the first crop is the left part of the second
    step = (672 - 224) // 3
    torch.testing.assert_close(images[0, :, :, step:], images[1, :, :, :-step])


def test_without_a_hub_the_weights_are_random_and_it_is_said_once(monkeypatch):
    pytest.importorskip("timm")

    def create(source, *, pretrained):
        assert pretrained
        raise HubError(source, "no network")

    monkeypatch.setattr(demo, "create", create)
    said = []
    state = torch.get_rng_state()
    model, trained = demo.resnet50(said.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert not trained
    assert len(said) == 1
    assert "random weights" in said[0]
    assert "no network" in said[0]
    assert model.layer1[0].bn3.weight.abs().min() > 0  # a branch that is switched off would hide its layers
    assert not model.training


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 7, 8), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("trained", [True, False])
def test_part_2_tells_everything(monkeypatch, tmp_path, trained):
    rows = (Row(EAGER, Timing(9, 9, 9, 9, 3), 1, 10), Row(FP4FX, Timing(3, 3, 3, 3, 3), 1, 10))

    def candidates(model, packed, inputs):
        assert [tuple(x.shape) for x in inputs] == [(1, 3, 224, 224)]
        return {EAGER: Candidate(model, lambda: None), FP4FX: Candidate(packed, lambda: packed(*inputs))}

    monkeypatch.setattr(demo, "resnet50", lambda say: (Small().eval(), trained))
    monkeypatch.setattr(bench, "candidates", candidates)
    monkeypatch.setattr(bench, "compare", lambda *_: rows)
    said = []
    found = demo.on_photographs(tmp_path / "demo", said.append)
    text = "\n".join(said)
    assert "body.weight" in text
    assert "bytes before" in text
    assert f"output SQNR: {found['sqnr']:.1f} dB over 16 crops" in text
    assert "run eagerly: inf dB" in text  # as the compiled model is the eager one here
    assert f"top-1 agreement: {found['agree']} of 16 crops" in text
    assert ("means little" in text) is not trained
    assert "3.0 times faster than eager fp32" in text
    assert (tmp_path / "demo" / "resnet50.safetensors").stat().st_size == found["file_bytes"]
    assert 10 < found["sqnr"] < 60
    assert [r["candidate"] for r in found["latency"]] == [EAGER, FP4FX]


def test_the_printed_lines_load_the_file(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet50", zero_init_last=False).eval()
    packed = fp4fx.quantize(model)
    said = []
    demo.save(packed, tmp_path, said.append)
    lines = [line.strip() for text in said for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    names = {}
    exec("\n".join(lines), names)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(names["model"](x), packed(x))
