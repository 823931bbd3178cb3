import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp4fx
from fp4fx import Policy, digits, nvfp4
from fp4fx.budget import choose
from fp4fx.errors import BudgetError, CalibrationError, PolicyError
from fp4fx.groups import Group, solve
from tests.models import ConvNet, Tied


def bits_of(model, policy):
    """Mean bits per parameter over all sites, from the plan."""
    sites = {d.site.parameter: d for d in fp4fx.plan(model, policy).decisions}.values()
    return sum(d.nbytes * 8 if d.spec else d.site.numel * 32 for d in sites) / sum(d.site.numel for d in sites)


@torch.no_grad()
def output_sqnr(model, policy, x):
    return nvfp4.sqnr(model(x), fp4fx.quantize(model, policy)(x))


def kept(model, policy):
    return {d.site.parameter for d in fp4fx.plan(model, policy).kept if d.rule == "keep"}


@pytest.fixture(scope="module")
def trained():
    """A network trained on digits, the images that scores are taken on, and the test part."""
    pytest.importorskip("sklearn", reason="needs the extra `demo`")
    train, test = digits.load()
    return digits.train(train), digits.Digits(train.images[::4], train.labels[::4]), test


@pytest.mark.parametrize(
    ("score", "activations"),
    [("output error", None), ("output error", "nvfp4"), ("Fisher score", None), ("noise over signal", None)],
)
def test_no_worse_than_skipping_the_ends_at_no_more_bits(trained, score, activations):
    model, data, test = trained
    given = {
        "output error": {"batches": [data.images]},
        "Fisher score": {"batches": [(data.images, data.labels)], "loss": F.cross_entropy},
        "noise over signal": {},
    }[score]
    better = 0
    for first, last in ((1, 1), (2, 1), (2, 2)):
        skipping = Policy(skip_first=first, skip_last=last, activations=activations)
        bits, reached = bits_of(model, skipping), output_sqnr(model, skipping, test.images)
        chosen = choose(model, bits=bits, policy=Policy(activations=activations), **given)
        assert chosen.score == score
        assert chosen.bits == pytest.approx(bits_of(model, chosen.policy), rel=1e-12)
        assert chosen.bits <= bits
        assert chosen.gap == 0
        if score == "output error":
            assert chosen.measured >= output_sqnr(model, skipping, data.images) - 0.01
        found = output_sqnr(model, chosen.policy, test.images)
        assert found >= reached - 0.5  # on other images than those it was chosen by
        better += found > reached + 3
    assert better >= 1


@pytest.mark.parametrize("seed", range(6))
def test_solutions_are_those_of_trying_everything(seed):
    draw = torch.Generator().manual_seed(seed)
    groups = [
        Group((str(i),), 1, packed=int(9 * n), dense=int(64 * n), score=float(s))
        for i, (n, s) in enumerate(
            zip(torch.randint(1, 200, (9,), generator=draw), torch.rand(9, generator=draw) ** 4 * 1e-7, strict=True)
        )
    ]
    choices = list(itertools.product((False, True), repeat=9))

    def nbytes(keep):
        return sum(g.dense if k else g.packed for g, k in zip(groups, keep, strict=True))

    def score(keep):
        return sum(g.score for g, k in zip(groups, keep, strict=True) if not k)

    for share in (0.0, 0.1, 0.37, 0.8, 1.0):
        limit = math.floor(sum(g.packed for g in groups) + share * sum(g.dense - g.packed for g in groups))
        best = min(score(keep) for keep in choices if nbytes(keep) <= limit)
        found = solve(groups, nbytes=limit)
        assert nbytes(found.kept) <= limit
        assert score(found.kept) == pytest.approx(best, rel=1e-5, abs=1e-13)
        allowed = share * sum(g.score for g in groups)
        found = solve(groups, score=allowed)
        slack = 2e-6 * max(g.score for g in groups)  # the solver's tolerance
        least, most = (min(nbytes(k) for k in choices if score(k) <= allowed + more) for more in (slack, 1e-20))
        assert least <= nbytes(found.kept) <= most
        assert score(found.kept) <= allowed + slack


def test_sqnr_is_met_and_measured(trained):
    model, data, test = trained
    bits = []
    images = data.images[:200]
    for sqnr in (20, 30, 40):
        chosen = choose(model, sqnr=sqnr, batches=[images])
        assert chosen.measured == pytest.approx(output_sqnr(model, chosen.policy, images), abs=0.01)
        assert chosen.measured >= sqnr
        assert output_sqnr(model, chosen.policy, test.images) > sqnr - 1
        bits.append(chosen.bits)
    assert bits == sorted(bits) and bits[0] < bits[-1] < 32


def test_accuracy_drop_is_met_by_measurement(trained):
    model, data, test = trained
    seen = []

    def evaluate(candidate):
        seen.append(sum(isinstance(m, fp4fx.packed.Packed) for m in candidate.modules()))
        return -5.0 * max(seen[-1] - 3, 0)  # a model that bears three packed layers and no more

    chosen = choose(model, accuracy_drop=4.9, evaluate=evaluate, batches=[data.images])
    assert chosen.measured == 0
    assert 1 <= seen.count(0) <= 1 and sum(not k for k in chosen.kept) <= 3
    assert len(seen) <= 12

    def accuracy(candidate):
        return float((digits.predict(candidate, test) == test.labels).double().mean())

    policy = Policy.for_budget(model, accuracy_drop=0.01, evaluate=accuracy, policy=Policy.w4a4())
    assert accuracy(model) - accuracy(fp4fx.quantize(model, policy)) <= 0.01
    assert policy.activations == "nvfp4"


class Cancelling(nn.Module):
    """Two layers whose errors cancel if both are in NVFP4."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.b.weight.data.copy_(self.a.weight.data)

    def forward(self, x):
        return self.a(x) - self.b(x * 1.0) + 0.1 * self.c(x.relu())


def test_errors_that_do_not_add_up_are_measured_around_the_choice():
    torch.manual_seed(0)
    model, x = Cancelling().eval(), torch.randn(16, 32)
    chosen = choose(model, bits=14, batches=[x])  # one of three may be kept
    alone = {g.parameters[0]: g.score for g in chosen.groups}
    assert alone["a.weight"] > 10 * alone["c.weight"]
    assert kept(model, chosen.policy) == {"c.weight"}
    assert chosen.measured > 100
    assert chosen.measured == pytest.approx(output_sqnr(model, chosen.policy, x), abs=0.1)


class Block(nn.Module):
    """q, k and v read one activation."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x):
        return self.out(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


def test_readers_of_one_activation_are_decided_together():
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 6, 32)
    chosen = choose(model, bits=31, batches=[x])
    assert [g.parameters for g in chosen.groups] == [("q.weight", "k.weight", "v.weight"), ("out.weight",)]
    for bits in (12, 25, 31):
        names = kept(model, Policy.for_budget(model, bits=bits, batches=[x]))
        assert not names & {"q.weight", "k.weight", "v.weight"} or names >= {"q.weight", "k.weight", "v.weight"}
        assert names
    plan = fp4fx.plan(model, Policy.for_budget(model, bits=26, batches=[x]))
    assert "with k.weight, v.weight (bits=26: 25.1" in plan.decision_for("q.weight").reason


def test_the_policy_is_an_ordinary_one_whose_plan_says_why(trained):
    model, data, _ = trained
    policy = Policy.for_budget(model, bits=5.0, batches=[data.images], policy=Policy(exclude=("8",), min_numel=10))
    plan = fp4fx.plan(model, policy)
    reason = plan.decision_for("0.weight").reason
    assert "% of the output error for 0.2% of the values (bits=5: " in reason and "gap 0)" in reason
    assert plan.decision_for("8.weight").reason == "matches '8'"
    assert (policy.skip_first, policy.skip_last, policy.min_numel) == (0, 0, 10)
    assert Policy.from_dict(policy.to_dict()) == policy
    assert fp4fx.Plan.from_dict(plan.to_dict()).policy == plan.policy


def test_static_scales_are_kept_from_the_first_batch(trained):
    model, data, test = trained
    policy = Policy(activations="nvfp4-static")
    chosen = choose(model, bits=5.0, batches=[data.images], policy=policy)
    quantized = fp4fx.quantize(model, chosen.policy, data.images)
    with torch.no_grad():
        assert nvfp4.sqnr(model(test.images), quantized(test.images)) > 10


def test_a_tied_table_counts_once():
    torch.manual_seed(0)
    model = Tied().eval()
    chosen = choose(model, bits=32, policy=Policy(embeddings=True))
    assert chosen.kept == (True, True)
    assert chosen.bits == 32


def test_a_budget_that_cannot_be_met_says_the_best_that_can(trained):
    model, data, _ = trained
    with pytest.raises(BudgetError, match=r"bits=3: the best that can be met is 4\.57\d bits; .*normalisation"):
        Policy.for_budget(model, bits=3)
    with pytest.raises(BudgetError, match=r"sqnr=90: the best that was found is \d\d.*, with only \S+ in NVFP4"):
        Policy.for_budget(model, sqnr=90, batches=[data.images])
    with pytest.raises(BudgetError, match="keeps every site"):
        Policy.for_budget(model, bits=5, policy=Policy(weights=None))


def test_what_is_asked_wrongly_is_named(trained):
    model, data, _ = trained
    with pytest.raises(PolicyError, match="found none, expected one of"):
        Policy.for_budget(model)
    with pytest.raises(PolicyError, match="found bits, sqnr, expected one of"):
        Policy.for_budget(model, bits=5, sqnr=30)
    with pytest.raises(PolicyError, match="bits=0"):
        Policy.for_budget(model, bits=0)
    with pytest.raises(PolicyError, match="sqnr=nan"):
        Policy.for_budget(model, sqnr=math.nan, batches=[data.images])
    with pytest.raises(PolicyError, match="found no batches"):
        Policy.for_budget(model, sqnr=30)
    with pytest.raises(PolicyError, match="found evaluate beside bits=5"):
        Policy.for_budget(model, bits=5, evaluate=lambda _: 1.0)
    with pytest.raises(PolicyError, match="found no evaluate"):
        Policy.for_budget(model, accuracy_drop=0.1)
    with pytest.raises(CalibrationError, match="found a loss and no batches"):
        Policy.for_budget(model, bits=5, loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="evaluate gave nan"):
        Policy.for_budget(model, accuracy_drop=0.1, evaluate=lambda _: math.nan)
    with pytest.raises(CalibrationError, match="batch 0"):
        Policy.for_budget(model, bits=5, batches=[torch.zeros(1, 3, 8, 8)])


def test_convnet_with_grouped_convolution_and_half_precision():
    torch.manual_seed(0)
    model, x = ConvNet().eval().bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    chosen = choose(model, bits=8, batches=[x])
    assert chosen.bits <= 8
    assert any(chosen.kept) and not all(chosen.kept)
