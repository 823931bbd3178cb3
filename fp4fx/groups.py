"""Groups of sites that are decided together, and the integer programme that chooses among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp4fx.errors import BudgetError
from fp4fx.plan import Decision

SECONDS = 60.0
"""That the solver may take."""
SLACK = 1e-9
"""Relative tolerance of a sum in floating point."""


@dataclass(frozen=True)
class Group:
    """Parameters that are decided together: uses of one tensor, and readers of one activation (q/k/v)."""

    parameters: tuple[str, ...]
    numel: int
    packed: int
    """Bytes in NVFP4."""
    dense: int
    """Bytes as they are."""
    score: float = 0.0
    """What NVFP4 costs here, in the unit of the score."""


@dataclass(frozen=True)
class Solution:
    """The groups to keep, of least cost."""

    kept: tuple[bool, ...]
    gap: float
    """How far from the optimum it may be, relative; 0 is proven optimal."""


def groups_of(decisions: Sequence[Decision], sizes: Mapping[str, int]) -> Iterator[Group]:
    """The parameters to be quantized, those that belong together in one group, in execution order."""
    sites = {d.site.parameter: d for d in decisions}
    together: dict[str, list[str]] = {name: [name] for name in sites}
    for decision in decisions:
        for other in decision.site.siblings:
            mine, theirs = together[decision.site.parameter], together.get(other)
            if theirs is None or theirs is mine:
                continue
            mine.extend(theirs)
            together.update(dict.fromkeys(theirs, mine))
    for names in {id(members): members for members in together.values()}.values():
        of = [sites[name] for name in names]
        numel = sum(d.site.numel for d in of)
        dense = sum(d.site.numel * sizes[d.site.parameter] for d in of)
        yield Group(tuple(names), numel, sum(d.nbytes for d in of), dense)


def solve(groups: Sequence[Group], *, nbytes: float | None = None, score: float | None = None) -> Solution:
    """The groups to keep so that the score of the others is least within `nbytes`, or the bytes within `score`.

    Solved by SciPy's `milp` (HiGHS) to the optimum, or within the gap that is left after `SECONDS`.
    """
    from scipy import optimize  # noqa: PLC0415  (takes most of a second to import)

    scores = [g.score for g in groups]
    sizes = [g.dense - g.packed for g in groups]
    scale, size = max(map(abs, scores)) or 1.0, max(map(abs, sizes)) or 1
    relative = [s / scale for s in scores]
    if nbytes is not None:
        cost, weight = [-s for s in relative], [s / size for s in sizes]
        limit, low = (nbytes - sum(g.packed for g in groups)) / size, -math.inf
    else:
        assert score is not None
        cost, weight = [s / size for s in sizes], relative
        limit, low = math.inf, sum(relative) - score / scale * (1 + SLACK)
    while True:
        found = optimize.milp(
            cost,
            constraints=optimize.LinearConstraint([weight], low, limit),
            bounds=optimize.Bounds(0, 1),
            integrality=[1] * len(groups),
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
        if found.x is None:
            raise BudgetError(f"the solver found no choice of {len(groups)} groups: {found.message}")
        kept = tuple(bool(x > 0.5) for x in found.x)
        taken = sum(w for w, keep in zip(weight, kept, strict=True) if keep)
        if nbytes is None or taken <= limit + 1e-12:
            return Solution(kept, float(found.mip_gap or 0.0))
        limit -= 1e-6  # the solver's own tolerance, of which a budget in bytes allows none
