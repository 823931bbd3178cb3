import pytest
import torch
from torch import nn

from benchmarks.zoo import catalog, check, table
from benchmarks.zoo.__main__ import apart, earlier, places, representatives, sampled
from fp4fx.plan import Plan, plan

LARGE = 300_000_000
SAMPLE = ("timm:test_resnet", "timm:test_vit", "timm:test_convnext", "torchvision:raft_small", "transformers:whisper")


@pytest.fixture(scope="module")
def entries():
    return {entry.source: entry for entry in catalog.entries()}


def test_every_model_of_the_packages_is_there(entries):
    import timm

    assert {f"timm:{name}" for name in timm.list_models()} == {s for s in entries if s.startswith("timm:")}
    assert len({entry.family for entry in entries.values()}) > 120
    assert not [source for source in entries if "quantized_" in source]


@pytest.mark.parametrize("source", SAMPLE)
def test_a_model_is_planned_quantized_and_run(entries, source):
    row = check.quantized(entries[source], LARGE)
    assert table.failures(row) == []
    assert row["eager"] == "ran"
    assert row["quantized"] > 0
    assert 4.5 <= row["bits"] < 5.5
    assert row["sqnr_db"] > 3


def test_a_model_that_is_too_large_is_planned_only(entries):
    row = check.quantized(entries["timm:test_vit"], largest=1000)
    assert row["eager"] == "planned only: more than 1,000 parameters"
    assert row["sites"] > 4


def test_a_compiled_model_agrees_with_eager_mode(entries):
    row = check.compiled(entries["timm:test_resnet"])
    assert table.failures(row) == []
    assert row["graphs"] == 1
    assert set(row["kernels"]) <= {"conv: cpu", "linear: cpu"}


def test_a_parameter_that_the_plan_overlooks_is_seen_by_the_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    with check._Uses(model) as uses:
        model(torch.randn(1, 3, 2, 2))
    assert uses.found == {"0.weight", "2.weight"}
    whole = plan(model)
    assert check._overlooked(whole, uses.found) == set()
    assert check._overlooked(Plan(whole.decisions[1:], whole.policy), uses.found) == {"0.weight"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"error": "ValueError: no"}, "ValueError: no"),
        ({"unaccounted": ["a.weight"]}, "not accounted for: a.weight"),
        ({"overlooked": ["a.weight"]}, "used by the model, not found by the trace: a.weight"),
        ({"finite": False, "reference_finite": True}, "NaN or infinity where the original has none"),
        ({"untouched": False}, "the original's output changed"),
        ({"difference": 0.1}, "compiled differs from eager by 1.0e-01"),
        ({"difference": float("nan")}, "compiled differs from eager by nan"),
        ({"exact_only": ["a.weight"]}, "sites that only torch.export sees: a.weight"),
    ],
)
def test_what_is_not_as_it_must_be_is_said(wrong, words):
    assert table.failures(wrong) == [words]


def test_a_page_has_a_line_per_family_and_every_failure(entries):
    sources = ("timm:test_vit", "timm:vit_tiny_patch16_224")
    rows = [{**check.quantized(entries[sources[0]], LARGE), "step": "quantize"}]
    rows.append({"error": "ValueError: no", "step": "quantize"})
    rows = [{**row, "source": s, "family": entries[s].family} for s, row in zip(sources, rows, strict=True)]
    rows[0]["date"], rows[1]["date"] = "2026-11-22", "2026-11-21"
    environment = {"device": "a CPU", "threads": 1, "torch": "2", "fp4fx": "0", "date": "today"}
    page = table.page({"environment": environment, "packages": {"timm": "1"}, "models": 2, "rows": rows})
    assert (
        "2 of 2 models: 1 planned, quantized and run, 0 too large for that and planned, 1 not as they must be" in page
    )
    assert "| timm:vit_tiny_patch16_224 | quantize | ValueError: no |" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| timm/vision_transformer"))
    assert line.split("|")[-2].strip() == "2026-11-21"
    del rows[0]["date"]
    assert "2026-11-21" not in table.page({"environment": environment, "packages": {}, "models": 2, "rows": rows})


def test_the_order_the_sample_and_the_smallest_of_a_family(entries):
    some = [entries[s] for s in ("timm:resnet18", "timm:resnet34", "timm:vit_tiny_patch16_224")]
    assert list(places(some).values()) == [1, 2, 1]
    assert sampled(some, 2) == [some[0], some[2]]
    ran = {("quantize", e.source): {"eager": "ran", "parameters": n} for e, n in zip(some, (9, 3, 5), strict=True)}
    assert representatives(some, ran) == some[1:]
    assert representatives(some, {**ran, ("compile", some[0].source): {}}) == [some[0], some[2]]


def test_a_run_goes_on_from_a_result_and_from_what_was_interrupted(tmp_path, monkeypatch):
    result, interrupted = tmp_path / "zoo.json", tmp_path / "rows.jsonl"
    monkeypatch.setattr("benchmarks.zoo.__main__.DONE", interrupted)
    assert earlier(result) == []
    result.write_text('{"rows": [{"source": "a"}]}', "utf-8")
    interrupted.write_text('{"source": "b"}\n{"source": "a", "error": "no"}\n', "utf-8")
    assert earlier(result) == [{"source": "a"}, {"source": "b"}, {"source": "a", "error": "no"}]


def test_a_model_over_its_limits_is_a_row(entries):
    class Limits:
        seconds, gigabytes, largest = 1, 10.0, 10**9

    row = apart("quantize", entries["timm:test_vit"], Limits)
    assert row == {
        "source": "timm:test_vit",
        "family": "timm/vision_transformer",
        "step": "quantize",
        "error": "not done after 1 s",
    }
