"""The rules by which a policy keeps a site in high precision: each is named after the policy field that it reads.

A rule returns the reason to keep the site, or None. Rules only keep, so their order decides no more than which
reason is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fp4fx.errors import PlanError
from fp4fx.patterns import first_match, matches
from fp4fx.policy import Policy
from fp4fx.site import Site


@dataclass(frozen=True)
class Context:
    """What a rule knows beyond the site itself."""

    place: Mapping[int, int]
    """`Site.index` -> place among the sites that `skip_first` and `skip_last` count, from 1."""
    count: int
    """How many sites are counted."""
    sqnr: Callable[[Site, Policy], float] | None
    """Measures the weight of a site under its policy, in dB; None if the values are not at hand."""
    fragment: bool = False
    """True if the sites are those of one graph of a model in several."""

    @property
    def total(self) -> str:
        """How many sites are counted, and where."""
        return f"{self.count} in this graph" if self.fragment else str(self.count)


Rule = Callable[[Site, Policy, Context], str | None]


def counts(site: Site) -> bool:
    """True if `skip_first` and `skip_last` count this site: a weight used by a linear or a convolution."""
    return site.op not in ("norm", "embedding")


def _refusal(site: Site, policy: Policy, context: Context) -> str | None:
    return site.refusal or (None if site.numel else "it has no values")


def _skip_norms(site: Site, policy: Policy, context: Context) -> str | None:
    return "normalisation" if policy.skip_norms and site.op == "norm" else None


def _exclude(site: Site, policy: Policy, context: Context) -> str | None:
    pattern = first_match(policy.exclude, site)
    return None if pattern is None else f"matches {pattern!r}"


def _keep(site: Site, policy: Policy, context: Context) -> str | None:
    return next((why for pattern, why in policy.keep if matches(pattern, site)), None)


def _include(site: Site, policy: Policy, context: Context) -> str | None:
    return "matches no pattern of include" if policy.include and first_match(policy.include, site) is None else None


def _weights(site: Site, policy: Policy, context: Context) -> str | None:
    return "weights=None" if policy.weights is None else None


def _embeddings(site: Site, policy: Policy, context: Context) -> str | None:
    return "embedding table" if not policy.embeddings and site.op == "embedding" else None


def _depthwise(site: Site, policy: Policy, context: Context) -> str | None:
    return "depthwise: few bytes to gain" if not policy.depthwise and site.depthwise else None


def _skip_first(site: Site, policy: Policy, context: Context) -> str | None:
    place = context.place.get(site.index)
    if place is None or place > policy.skip_first:
        return None
    return f"first of {context.total}" if place == 1 else f"{place} of {context.total}, skip_first={policy.skip_first}"


def _skip_last(site: Site, policy: Policy, context: Context) -> str | None:
    place = context.place.get(site.index)
    if place is None or place <= context.count - policy.skip_last:
        return None
    if place == context.count:
        return f"last of {context.total}"
    return f"{place} of {context.total}, skip_last={policy.skip_last}"


def _min_numel(site: Site, policy: Policy, context: Context) -> str | None:
    return f"{site.numel} values < {policy.min_numel}" if site.numel < policy.min_numel else None


def _min_channels(site: Site, policy: Policy, context: Context) -> str | None:
    if site.channels >= policy.min_channels:
        return None
    return f"{site.channels} input channels per group < {policy.min_channels}"


def _max_kurtosis(site: Site, policy: Policy, context: Context) -> str | None:
    if policy.max_kurtosis is None:
        return None
    if site.kurtosis is None:
        raise no_values(site, "max_kurtosis", policy.max_kurtosis)
    return f"kurtosis {site.kurtosis:.2f} > {policy.max_kurtosis}" if site.kurtosis > policy.max_kurtosis else None


def _min_sqnr(site: Site, policy: Policy, context: Context) -> str | None:
    if policy.min_sqnr is None:
        return None
    if context.sqnr is None:
        raise no_values(site, "min_sqnr", policy.min_sqnr)
    sqnr = context.sqnr(site, policy)
    return f"{sqnr:.2f} dB < {policy.min_sqnr}" if sqnr < policy.min_sqnr else None


def no_values(site: Site, field: str, value: float) -> PlanError:
    """The error for a rule that looks at the values of a weight when there are none."""
    return PlanError(
        f"{site.parameter}: Policy.{field}={value} looks at the values of the weight, found none (meta device, or a "
        f"graph without parameters), expected a real tensor; load the weights before planning or set {field}=None"
    )


def weight_only(site: Site) -> str | None:
    """Why the input of a site cannot be quantized, or None."""
    if not counts(site):
        return f"{site.op} multiplies no matrix"
    if site.own_input:
        return None
    return (
        f"{site.op} in {site.called_in or 'the model itself'} reads an activation that is not the input of "
        f"{site.module or 'the model itself'}"
    )


RULES: tuple[tuple[str, Rule], ...] = (
    ("refusal", _refusal),  # of the trace, not of the policy: nothing else can be said about such a site
    ("skip_norms", _skip_norms),  # before the patterns, so that norms fold into one line whatever the patterns say
    ("exclude", _exclude),  # what the user said by name comes before what the user said in general
    ("keep", _keep),
    ("include", _include),
    ("weights", _weights),
    ("embeddings", _embeddings),
    ("depthwise", _depthwise),
    ("skip_first", _skip_first),
    ("skip_last", _skip_last),
    ("min_numel", _min_numel),
    ("min_channels", _min_channels),
    ("max_kurtosis", _max_kurtosis),
    ("min_sqnr", _min_sqnr),  # last: it quantizes the weight to find out
)
