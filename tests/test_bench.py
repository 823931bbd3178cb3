import json
import math

import pytest
import torch
from torch import nn

import fp4fx
from fp4fx import bench, nvfp4
from fp4fx.bench import EAGER, FP4FX, FP4FX_BF16, INDUCTOR, INDUCTOR_BF16, Candidate, Row, Timing


class Clock:
    """Time that passes only when a candidate works."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def candidate(self, name, *milliseconds):
        durations = iter(milliseconds)

        def call():
            self.calls.append(name)
            self.now += next(durations) / 1e3

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "perf_counter", clock)
    return clock


def test_alternates_round_by_round_and_turns_the_order_around(clock):
    bench.alternate({"a": clock.candidate("a", *[1] * 4), "b": clock.candidate("b", *[1] * 4)}, rounds=3, warmup=1)
    assert clock.calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_medians_and_percentiles_leave_the_warmup_out(clock):
    measured = bench.alternate(
        {"slow": clock.candidate("slow", 1000, 1000, *range(11)), "fast": clock.candidate("fast", 500, 500, *[2] * 11)},
        rounds=11,
        warmup=2,
    )
    assert list(measured) == ["slow", "fast"]
    slow = measured["slow"]
    assert (slow.median, slow.min, slow.p10, slow.p90, slow.rounds) == pytest.approx((5, 0, 1, 9, 11))
    assert measured["fast"].median == pytest.approx(2)


def test_one_disturbed_round_does_not_move_the_median(clock):
    measured = bench.alternate({"a": clock.candidate("a", 3, 3, 900, 3, 3)}, rounds=5, warmup=0)
    assert measured["a"].median == pytest.approx(3)
    assert measured["a"].p90 > 3


def test_a_single_round_is_its_own_spread():
    assert Timing.of([7.0]) == Timing(median=7.0, min=7.0, p10=7.0, p90=7.0, rounds=1)


def test_environment_says_where_and_when():
    where = bench.environment()
    assert where["threads"] == torch.get_num_threads()
    assert where["torch"] == torch.__version__
    assert where["fp4fx"] == fp4fx.__version__
    assert where["device"] == where["cpu"] != ""
    assert where["date"].endswith("+00:00")
    assert json.loads(json.dumps(where)) == where
    assert f"{where['cpu']}, 1 thread, torch" in bench.headline({**where, "threads": 1})
    assert f"{where['cpu']}, 2 threads, torch" in bench.headline({**where, "threads": 2})


def row(candidate, low, high, weights=1):
    low, high = float(low), float(high)
    middle = (low + high) / 2
    return Row(candidate, Timing(middle, low, low, high, 10), 1.0, weights)


def test_verdict_is_honest_both_ways():
    peers = [row(EAGER, 99, 101), row(INDUCTOR, 24, 26), row(INDUCTOR_BF16, 9, 11)]
    assert bench.verdict([*peers, row(FP4FX, 23, 25), row(FP4FX_BF16, 4, 6)]).splitlines() == [
        "fp4fx fp32 is 4.2 times faster than eager fp32, "
        "as fast as Inductor fp32 within the spread (0.96 times its time), "
        "2.4 times slower than Inductor bf16.",
        "fp4fx bf16 is 20.0 times faster than eager fp32, 5.0 times faster than Inductor fp32, "
        "2.0 times faster than Inductor bf16.",
        "Fastest here: fp4fx bf16.",
    ]
    assert bench.verdict([*peers, row(FP4FX, 23, 25)]).endswith("Fastest here: Inductor bf16.")


def test_table_and_dict_have_the_same_numbers():
    given = row(EAGER, 10, 14, weights=5_000_000)
    assert given.to_dict() == {
        "candidate": EAGER,
        "median_ms": 12.0,
        "min_ms": 10,
        "p10_ms": 10,
        "p90_ms": 14,
        "rounds": 10,
        "first_call_s": 1.0,
        "weight_bytes": 5_000_000,
    }
    last = bench.table([given]).splitlines()[-1]
    assert last.split() == ["eager", "fp32", "12.0", "10.0", "10.0", "-", "14.0", "1.0", "5.0"]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 8)).eval()
    x = torch.randn(2, 16, 8, 8)
    return model, fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, compute="fp32"), x), x


def test_candidates_compute_the_same_thing_and_leave_the_model_alone(small):
    model, packed, x = small
    before = {name: (p.dtype, p.stride()) for name, p in model.named_parameters()}
    results = {name: way.call() for name, way in bench.candidates(model, packed, (x,)).items()}
    assert list(results) == [EAGER, INDUCTOR, INDUCTOR_BF16, FP4FX, FP4FX_BF16]
    assert {name: (p.dtype, p.stride()) for name, p in model.named_parameters()} == before
    dense = model(x)
    torch.testing.assert_close(results[EAGER], dense)
    torch.testing.assert_close(
        results[INDUCTOR], dense, rtol=1e-4, atol=1e-5
    )  # fp32 round-off of another order of sums
    assert results[INDUCTOR_BF16].dtype == torch.bfloat16
    assert nvfp4.sqnr(dense, results[INDUCTOR_BF16].float()) > 35
    assert 15 < nvfp4.sqnr(dense, results[FP4FX]) < 30  # the error of 4-bit weights: neither none nor a wrong model
    torch.testing.assert_close(results[FP4FX], packed(x), rtol=1e-4, atol=1e-5)
    assert results[FP4FX_BF16].dtype == torch.bfloat16
    assert nvfp4.sqnr(packed(x), results[FP4FX_BF16].float()) > 35


def test_compare_measures_every_candidate(small):
    model, packed, _ = small
    calls = dict.fromkeys((EAGER, FP4FX), 0)

    def counting(name):
        def call():
            calls[name] += 1

        return call

    ways = {EAGER: Candidate(model, counting(EAGER)), FP4FX: Candidate(packed, counting(FP4FX))}
    rows = bench.compare(ways, rounds=3, warmup=2)
    assert calls == {EAGER: 6, FP4FX: 6}
    assert [r.candidate for r in rows] == [EAGER, FP4FX]
    assert all(math.isfinite(r.first_call) and r.timing.rounds == 3 for r in rows)
    assert rows[0].weights == sum(p.nbytes for p in model.parameters())
    assert rows[1].weights < 0.2 * rows[0].weights
