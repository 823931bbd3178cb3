"""The comparison of accuracy: all columns on one small network, the peers' encoders, verdicts, folders of images."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn

from benchmarks.accuracy import __main__ as main
from benchmarks.accuracy import cost, data, imagenet, measure, nets, peers, table
from benchmarks.accuracy.variants import AS_TORCHAO, CALIBRATED, DEFAULT, TORCHAO, variants
from fp4fx import models, nvfp4
from fp4fx.errors import HubError
from fp4fx.site import Site

COLUMNS = {"score", "drop", "loss_bits", "error", "sqnr_db", "weight_mse", "share", "bits", "bytes", "inputs"}


def tiny():
    layers = nn.Conv2d(1, 16, 5, 4, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="module")
def small(folder):
    """A small network, few data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIZES", {"train": (640, 4, 8), "test": (200, 4, 8)})
        patch.setattr(nets, "RECIPES", {"tiny": nets.Recipe(tiny, data.numbers.__wrapped__, "accuracy", 10)})
        patch.setattr(nets, "CACHE", folder)
        yield


@pytest.fixture(scope="module")
def record(small, folder):
    arguments = ["--quick", "--out", str(folder / "a.json"), "--page", str(folder / "a.md")]
    main.main(arguments)
    return json.loads((folder / "a.json").read_text("utf-8"))


def test_every_variant_has_a_row_with_every_column_or_a_reason(record):
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == [variant.name for variant in variants()]
    for row in rows.values():
        assert row.get("reason") or row.keys() >= COLUMNS
    assert rows["fp32"]["error"] == rows["fp32"]["drop"] == 0
    measured = ("bf16", "W4A16 max", DEFAULT, "W4A4 dynamic", "INT4-g32 RTN", "FP8 E4M3 per channel")
    for name in measured:
        assert 1e-4 < rows[name]["error"] < 0.5
        assert rows[name]["sqnr_db"] == pytest.approx(-20 * math.log10(rows[name]["error"]))
    assert rows[DEFAULT]["bits"] == pytest.approx(4.5, abs=0.02)
    assert rows[DEFAULT]["bytes"] < rows["fp32"]["bytes"] * 0.4
    assert rows[DEFAULT]["weight_mse"] < rows["W4A16 max"]["weight_mse"] < rows["W4A4 dynamic"]["error"]


@pytest.mark.peers
def test_modelopt_with_blocks_along_k_is_the_plain_rule(record):
    pytest.importorskip("modelopt")
    rows = {row["variant"]: row for row in record["rows"]}
    assert rows["ModelOpt NVFP4"]["error"] == rows["W4A16 max"]["error"]
    assert rows["ModelOpt NVFP4"]["bytes"] == rows["W4A16 max"]["bytes"]
    sweep = rows["ModelOpt NVFP4, scale sweep"]["weight_mse"]
    assert rows[DEFAULT]["weight_mse"] * 0.999 < sweep < rows["W4A16 max"]["weight_mse"]


@pytest.mark.peers
def test_torchao_is_compared_on_its_own_layers(record):
    pytest.importorskip("torchao")
    rows = {row["variant"]: row for row in record["rows"]}
    assert rows[TORCHAO]["share"] == rows[AS_TORCHAO]["share"]  # of the one layer that it takes
    assert rows[TORCHAO]["weight_mse"] > rows[AS_TORCHAO]["weight_mse"]


def test_a_run_goes_on_where_a_row_is_missing(record, folder, monkeypatch):
    out = folder / "b.json"
    kept = [row for row in record["rows"] if row["variant"] != "bf16"]
    out.write_text(json.dumps({**record, "rows": kept}), "utf-8")
    done = []
    original = measure.row_of
    monkeypatch.setattr(
        measure, "row_of", lambda task, variant, ref: done.append(variant.name) or original(task, variant, ref)
    )
    main.main(["--quick", "--only", "bf16", DEFAULT, "--out", str(out), "--page", str(folder / "b.md")])
    assert done == ["bf16"]
    assert {row["variant"] for row in json.loads(out.read_text("utf-8"))["rows"]} == {v.name for v in variants()}


def test_the_page_shows_every_variant_and_goal(record):
    page = table.page({**record, "costs": [{"what": "a", "model": "m", "limit_s": 6, "seconds": 7.0, "peak": 1.5}]})
    for variant in variants():
        reason = next(row.get("reason") for row in record["rows"] if row["variant"] == variant.name)
        assert (f"* {variant.name}: {reason}" if reason else f"| {variant.name} ") in page
    (line,) = (line.split("|") for line in page.splitlines() if line.startswith("| m "))
    assert [cell.strip() for cell in line[3:5]] == ["**not met**", "7.0 s, 1.50 × the model"]


def row(variant, seed=0, *, kind="peer", error=0.1, drop=0.0, bits=4.5):
    return {"net": "n", "seed": seed, "variant": variant, "kind": kind, "error": error, "drop": drop, "bits": bits}


def verdict(rows, words):
    return next(v for v in table.verdicts(rows) if words in v.goal)


def test_a_verdict_can_fail():
    ours = [row(DEFAULT, seed, kind="W4A16", error=0.1, drop=0.2) for seed in (0, 1)]
    better = [row("INT4", seed, error=0.09) for seed in (0, 1)]
    assert verdict([*ours, *better], "INT4").met is False
    assert verdict([*ours, *(row("INT4", seed, error=0.11) for seed in (0, 1))], "INT4").met is True
    near = [row("INT4", 0, error=0.09), row("INT4", 1, error=0.108)]
    assert "within the spread" in verdict([*ours, *near], "INT4").measured
    assert [v.goal for v in table.verdicts([*ours, row("FP8", bits=8)]) if "FP8" in v.goal] == []
    assert verdict(ours, "0.3 points").met is True
    assert verdict([row(DEFAULT, kind="W4A16", drop=0.31)], "0.3 points").met is False
    missing = {"net": "n", "seed": 0, "variant": CALIBRATED, "kind": "W4A4", "reason": "why"}
    assert verdict([*ours, missing], "1.0 points") == table.Verdict(
        f"{CALIBRATED}: within 1.0 points of fp32", "n", None, "why"
    )


def test_a_cost_over_its_limit_is_not_met():
    costs = [
        {"what": "w", "model": "m", "limit_s": 6, "seconds": s, "peak": p} for s, p in ((5, 1.9), (7, 1), (5, 2.1))
    ]
    assert [v.met for v in table.verdicts([], costs)] == [True, False, False]


def test_a_variant_that_breaks_is_a_row_and_the_run_goes_on():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    inputs, targets = torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    task = measure.Task("n", 0, model, [(inputs, targets)], [inputs], "accuracy")
    reference, _ = measure.outputs(model, task)

    def made(run):
        return measure.Made(run, {}, 32, 0)

    def found(make):
        return measure.row_of(task, measure.Variant("v", "peer", make), reference)

    assert found(lambda _: made(model))["error"] == 0
    assert found(lambda _: 1 / 0)["reason"].startswith("ZeroDivisionError")
    assert "not finite" in found(lambda _: made(lambda x: model(x) / 0))["reason"]
    assert found(lambda _: made(lambda x: 2 * model(x)))["error"] == pytest.approx(1)


def test_the_scores_are_those_of_scikit_learn():
    torch.manual_seed(0)
    scores, targets = torch.randn(5, 2, 8, 8), torch.randint(2, (5, 8, 8))
    seen = scores.argmax(1).flatten()
    ious = jaccard_score(targets.flatten(), seen, average="macro")
    assert measure.score(scores, targets, "mIoU") == pytest.approx(100 * ious)
    assert measure.score(scores, targets, "accuracy") == pytest.approx(
        100 * np.mean((seen == targets.flatten()).numpy())
    )


def test_int4_and_fp8_round_each_group_to_its_nearest_values():
    torch.manual_seed(0)
    rows = torch.randn(3, 40)
    values, stored = peers.int4(rows)
    assert stored == 60 + 12
    for n, (start, stop) in ((n, part) for n in range(3) for part in ((0, 32), (32, 40))):
        scale = np.float16(rows[n, start:stop].abs().max().item() / 7)
        grid = np.arange(-8, 8, dtype=np.float32) * np.float32(scale)
        group = rows[n, start:stop].numpy()
        nearest = grid[np.abs(group[:, None] - grid).argmin(1)]
        assert np.allclose(values[n, start:stop].numpy(), nearest)
    values, stored = peers.fp8(rows, per_row=True)
    assert stored == 120 + 12
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()]
    for n in range(3):
        scale = rows[n].abs().max() / 448
        nearest = grid[(rows[n, :, None] / scale - grid).abs().argmin(1)] * scale
        assert torch.allclose(values[n], nearest)


def test_a_codec_sees_the_rows_that_the_op_sums_over():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    site = Site.__new__(Site)
    object.__setattr__(site, "order", "conv")
    object.__setattr__(site, "groups", 2)
    seen = []
    codec = peers.on_rows(lambda rows: (seen.append(rows) or rows * 2, 7))
    values, stored = codec(weight, site)
    assert torch.equal(values, weight * 2)
    assert stored == 7
    assert torch.equal(seen[0], nvfp4.to_rows(weight, "conv", 2))


def test_training_and_test_data_differ_and_are_the_same_every_time(small):
    for make in (data.numbers, data.scenes):
        train, test, again = (make.__wrapped__(part) for part in ("train", "test", "train"))
        assert torch.equal(train.inputs, again.inputs)
        assert not torch.equal(train.inputs[:4], test.inputs[:4])
    scenes = data.scenes.__wrapped__("test")
    assert scenes.inputs.shape == (4, 3, 64, 64)
    assert 0.005 < scenes.targets.float().mean() < 0.5


def test_trained_weights_are_kept_and_a_seed_gives_others(small, folder):
    before = torch.random.get_rng_state()
    first, again, other = (nets.trained("tiny", seed, steps=2) for seed in (5, 5, 6))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert len(list(folder.glob("tiny-5-*.pt"))) == 1
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "CALIBRATION", 3)
    rng = np.random.default_rng(0)
    for name in ("n01440764", "n01443537", "n15075141"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / name / f"{index}.jpeg")
    return tmp_path


def test_a_folder_of_images_becomes_a_task(images):
    task = imagenet.task(images, "test_resnet", pretrained=False)
    assert sum(len(batch) for batch in task.calibration) == 3
    scores, targets = measure.outputs(task.model, task)
    assert scores.shape == (6, 1000)
    assert sorted(targets.tolist()) == [0, 0, 1, 1, 999, 999]
    few = imagenet.task(images, "test_resnet", pretrained=False, limit=2)
    assert len(measure.outputs(few.model, few)[1]) == 2


def test_folders_that_are_not_the_models_classes_are_refused(images):
    (images / "n01440764").rename(images / "tench")
    with pytest.raises(SystemExit, match=r"found 3 folders, the first is 'n01443537'; expected WordNet ids"):
        imagenet.task(images, "test_resnet", pretrained=False)


def test_a_hub_out_of_reach_is_a_row(images, tmp_path, monkeypatch):
    def refuse(source, *, pretrained):
        raise HubError(source, "no route")

    monkeypatch.setattr(models, "create", refuse)
    out = tmp_path / "c.json"
    main.main(["--dataset", str(images), "--models", "test_vit", "--out", str(out), "--page", str(tmp_path / "c.md")])
    (found,) = json.loads(out.read_text("utf-8"))["rows"]
    assert found["net"] == "test_vit"
    assert "no pretrained weights: no route" in found["reason"]


def test_the_cost_of_quantizing_is_seconds_and_memory():
    row = cost.measure("search", "test_vit", 0)
    assert 0 < row["seconds"] < 60
    assert row["peak_bytes"] > 0
    assert row["model_bytes"] > 1e6
