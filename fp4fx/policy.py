"""What the user asks for: which sites become NVFP4, and how. A policy knows no model; `fp4fx.plan` applies it."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fp4fx.errors import PolicyError
from fp4fx.patterns import Pattern, check, literal, require_match
from fp4fx.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Literal["nvfp4"] | None
Activations = Literal["nvfp4", "nvfp4-static"] | None
ScaleRule = Literal["max", "search", "four_over_six", "four_over_six_mae"]
WeightRule = Literal["max", "search", "four_over_six", "four_over_six_mae", "unbiased"]
Compute = Literal["bf16", "bf16_operands", "fp32", "int8"]
Block = tuple[Literal[1, 16], Literal[16]]
Changes = tuple[tuple[str, Any], ...]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": ("nvfp4", None),
    "activations": (None, "nvfp4", "nvfp4-static"),
    "scale_rule": (*get_args(WeightRule), None),
    "activation_scale_rule": get_args(ScaleRule),
    "block": ((1, 16), (16, 16)),
    "compute": get_args(Compute),
    "on_fallback": ("report", "raise"),
}
_FLAGS = ("skip_norms", "depthwise", "embeddings")
_COUNTS = ("skip_first", "skip_last", "min_numel", "min_channels")
_THRESHOLDS = ("max_kurtosis", "min_sqnr")
_OF_THE_MODEL = ("skip_first", "skip_last", "include", "exclude", "keep", "overrides", "on_fallback")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which sites of a model become NVFP4, and how.

    A site is quantized if no rule keeps it. The rules only ever keep: `include` narrows what may be quantized and does
    not lift another rule, so `include=("layer4.*",)` leaves the normalisations of layer4 alone, and an embedding needs
    `embeddings=True` for all or `overrides={"embed": {"embeddings": True}}` for one. A tensor that is used more than
    once is quantized only if no rule keeps any of its uses.
    """

    weights: Weights = "nvfp4"
    """Format of the weights; None keeps them all (of use in an override: keep what the pattern names)."""
    activations: Activations = None
    """None: weight only (W4A16). "nvfp4": the input of a layer is quantized too (W4A4), with a global scale taken from
    each input. "nvfp4-static": with a global scale measured once, on the example inputs. Only a layer that runs its op
    on its own input can do this; other sites stay weight-only and the plan says why."""
    skip_first: int = 1
    """Keep the first so many uses of a weight by linears and convolutions, in execution order; others do not count."""
    skip_last: int = 1
    """Keep the last so many uses of a weight by linears and convolutions, in execution order; others do not count."""
    skip_norms: bool = True
    """Keep the affine weights of normalisations; False quantizes them too, for studies."""
    embeddings: bool = False
    """Quantize `nn.Embedding` tables too."""
    depthwise: bool = False
    """Quantize depthwise convolutions too: blocks then run along the taps of one channel, and few bytes are gained."""
    max_kurtosis: float | None = None
    """Keep a site whose weight has an excess kurtosis above this (0 is a Gaussian); None: no limit. It says little
    about the error of blocks of 16 (see docs/thresholds.md); `for_budget` looks at the error itself."""
    min_sqnr: float | None = None
    """Keep a site whose weight would have a signal to quantization noise ratio below this many dB, measured with
    a global scale of its own (a Gaussian has 21.8 dB with "search", 20.4 with "max"); None: no limit."""
    min_numel: int = 0
    """Keep a site whose weight has fewer values than this."""
    min_channels: int = 1
    """Keep a site with fewer input channels per group than this; 16 is one block. 1 keeps none."""
    include: tuple[Pattern, ...] = ()
    """If not empty, only sites that match one of these patterns (see `fp4fx.patterns`) may be quantized."""
    exclude: tuple[Pattern, ...] = ()
    """Keep the sites that match one of these patterns."""
    keep: tuple[tuple[Pattern, str], ...] = ()
    """Pattern -> why the sites that match it are kept, as a mapping or pairs; the plan shows the reason."""
    overrides: tuple[tuple[Pattern, Changes], ...] = ()
    """Pattern -> changed fields, as a mapping or pairs; the first pattern that matches a site gives it its own version
    of the policy. What is about the whole model (skip_first/last, include, exclude, on_fallback) cannot be changed."""
    scale_rule: WeightRule | None = None
    """How weights are encoded (see `fp4fx.scales`). "max": the scale of a block is its maximum / 6. "search": the one
    of least squared error among those around it, a quarter less error in eight times the time. "unbiased": the same
    with a global scale that makes up for what rounding takes off the weight's own direction, which adds up from layer
    to layer, and with codes of convolutions whose errors cancel over a kernel and a row (`fp4fx.balance`).
    "four_over_six", "four_over_six_mae": block maximum / 6 or / 4, by squared or absolute error. None: "unbiased", or
    "max" for tiles of 16x16."""
    activation_scale_rule: ScaleRule = "max"
    """The same for activations that are quantized, on every call: "four_over_six" makes a sixth less error and takes
    longer, "search" a quarter less."""
    block: Block = (1, 16)
    """(rows, columns) of weight that share one scale: (1, 16), or (16, 16) for training, so that W and Wᵀ agree."""
    compute: Compute = "bf16"
    """Precision that a kernel may compute in; sums are fp32 in any case. "bf16": operands may be rounded to bf16 where
    the model is in fp32, as 4-bit weights lose nothing by it, and where the processor multiplies bf16, what lies
    between layers may be stored in bf16. "bf16_operands": operands alone. "fp32": an fp32 model is computed to fp32
    accuracy. "int8": activations may be rounded to int8 with a scale per row of a linear layer or per image, and
    decoded weights to int8 with a scale per output channel, whatever the model's dtype, and else as "bf16": W4A8,
    twice as fast where VNNI is. A kernel that offers no more than the model's own dtype, such as a library's, computes
    in that."""
    on_fallback: Literal["report", "raise"] = "report"
    """What happens where something cannot be had as asked (a site refused, an opaque module, a W4A4 site that stays
    weight-only): report it, or raise FallbackError. `quantize` and `options={"policy": ...}` read it; a compile of an
    already quantized model takes `options={"on_fallback": "raise"}` for its kernels."""

    def __post_init__(self) -> None:
        """Bring lists and mappings into hashable form and check every field."""
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "keep", _reasons(self.keep))
        object.__setattr__(self, "overrides", _pairs(self.overrides))
        _check_values(self)
        if self.weights is None and self.activations is not None:
            raise PolicyError(
                f"Policy: weights=None contradicts activations={self.activations!r}: a W4A4 layer needs NVFP4 weights; "
                "set weights='nvfp4' or activations=None"
            )
        if self.scale_rule not in (None, "max") and self.block != (1, 16):
            raise PolicyError(
                f"Policy: scale_rule={self.scale_rule!r} needs block=(1, 16): it chooses a scale per 16 values, and "
                "hardly gains where 256 share one; use scale_rule='max' with block=(16, 16)"
            )
        for pattern, _ in self.overrides:
            self.overridden(pattern)

    @property
    def weight_rule(self) -> WeightRule:
        """`scale_rule`, or the best for the block where that is None."""
        return self.scale_rule or ("unbiased" if self.block == (1, 16) else "max")

    def overridden(self, pattern: Pattern) -> Policy:
        """The policy of the sites that fall under the override `pattern`."""
        changes = dict(dict(self.overrides)[pattern])
        where = f"Policy.overrides[{pattern!r}]"
        _check_names(changes, where)
        for name in changes:
            if name in _OF_THE_MODEL:
                raise PolicyError(f"{where}: {name!r} is about the whole model; set it on the policy itself")
        if changes.get("weights", "nvfp4") is None:
            changes.setdefault("activations", None)
        try:
            return replace(self, overrides=(), **changes)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from error

    @classmethod
    def weight_only(cls, **changes: Any) -> Policy:
        """W4A16: packed weights, activations as they are."""
        return cls.from_dict({"activations": None, **changes})

    @classmethod
    def w4a4(cls, **changes: Any) -> Policy:
        """W4A4: packed weights, and each layer's input quantized on the fly."""
        return cls.from_dict({"activations": "nvfp4", **changes})

    @classmethod
    def segmentation(cls, **changes: Any) -> Policy:
        """All convolutions and transposed ones, the first included; normalisations and the output convolution kept.

        The output convolution is the one that runs last; a model with several heads needs `exclude` for the others.
        """
        return cls.from_dict({"include": ("op:conv*",), "skip_first": 0, "skip_last": 1, **changes})

    @classmethod
    def for_budget(
        cls,
        model: nn.Module,
        *,
        bits: float | None = None,
        sqnr: float | None = None,
        accuracy_drop: float | None = None,
        batches: Iterable[Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        policy: Policy | None = None,
    ) -> Policy:
        """The policy that keeps the sites which NVFP4 costs most, within a budget; the reasons are in its `keep`.

        Sites that read one activation (q/k/v) are decided together. Their costs are added up and the least sum is
        found by integer programming: with `batches` the error of the model's output with the group alone in NVFP4
        (for `bits` then measured anew around what was chosen, as errors add up only about), with a `loss` too the
        Fisher score of `fp4fx.sensitivity`, without data the noise of the layers' own outputs.

        Args:
            model: Dense; it is only read.
            bits: At most so many bits per parameter, as stored, on average over all sites of the model.
            sqnr: At least so many dB between the model's output and its change, measured on `batches`.
            accuracy_drop: At most so much less of what `evaluate` returns than the dense model has.
            batches: Inputs as `fp4fx.sensitivity` takes them, held in memory; with a loss pairs (inputs, target).
            evaluate: `evaluate(model)` gives a number, higher is better.
            loss: `loss(output, target)` gives a scalar.
            policy: Of which sites, and how they are quantized; its `skip_first` and `skip_last` do not count.

        Raises:
            BudgetError: The budget cannot be met; says the best that can.
            PolicyError: Not exactly one of the three budgets, or nothing to measure it by.
            CalibrationError: The data are not what the model takes, or `evaluate` or the loss is not finite.
        """
        from fp4fx.budget import choose  # noqa: PLC0415  (which needs policies)

        budget = {"bits": bits, "sqnr": sqnr, "accuracy_drop": accuracy_drop}
        return choose(model, **budget, batches=batches, evaluate=evaluate, loss=loss, policy=policy).policy

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The policy with these fields; fields that are not given keep their defaults."""
        if not isinstance(data, Mapping):
            raise PolicyError(f"Policy: found {type(data).__name__}, expected a mapping of fields to values")
        _check_names(data, "Policy")
        return cls(**data)

    @classmethod
    def from_toml(cls, source: str | PathLike[str]) -> Policy:
        """The policy in a TOML document; a path object or a string that ends in `.toml` is read as a file."""
        is_path = not isinstance(source, str) or source.endswith(".toml")
        try:
            return cls.from_dict(tomllib.loads(Path(source).read_text("utf-8") if is_path else str(source)))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PolicyError(f"Policy.from_toml: {source!r} cannot be read: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON-ready values; PolicyError for a callable pattern, which has no such form."""
        for pattern in (*self.include, *self.exclude, *(p for p, _ in (*self.keep, *self.overrides))):
            if callable(pattern):
                raise PolicyError(
                    f"Policy.to_dict: the pattern {pattern!r} is a callable and cannot be written down; "
                    "use a glob, or the policy of a plan, where callables stand as the names they picked"
                )
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "include": list(self.include),
            "exclude": list(self.exclude),
            "keep": [list(pair) for pair in self.keep],
            "overrides": [[pattern, {k: _plain(v) for k, v in changes}] for pattern, changes in self.overrides],
            "block": list(self.block),
        }

    def require_matches(self, sites: Sequence[Site], others: Iterable[str] = ()) -> None:
        """Raise PolicyError if a pattern names no site; `others` are names without a site, which may be excluded."""
        for name, patterns, also in (
            ("include", self.include, ()),
            ("exclude", self.exclude, tuple(others)),
            ("keep", tuple(pattern for pattern, _ in self.keep), tuple(others)),
            ("overrides", tuple(pattern for pattern, _ in self.overrides), ()),
        ):
            for pattern in patterns:
                require_match(pattern, f"Policy.{name}", sites, also)

    def resolved(self, sites: Sequence[Site]) -> Policy:
        """The same policy for these sites, each callable pattern replaced by the names of the parameters it picks."""
        overrides: dict[str, Changes] = {}
        for pattern, changes in self.overrides:
            overrides.setdefault(literal(pattern, sites), changes)
        return replace(
            self,
            include=tuple(literal(p, sites) for p in self.include),
            exclude=tuple(literal(p, sites) for p in self.exclude),
            keep=tuple({literal(p, sites): why for p, why in reversed(self.keep)}.items())[::-1],
            overrides=tuple(overrides.items()),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    if isinstance(value, str) or callable(value):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise PolicyError(f"Policy.{name}: found {value!r}, expected a list of patterns")
    for pattern in value:
        check(pattern, f"Policy.{name}")
    return tuple(value)


def _reasons(value: Any) -> tuple[tuple[Pattern, str], ...]:
    """A mapping or pairs of pattern and reason, as pairs."""
    where = "Policy.keep"
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[1], str) for p in pairs
    ):
        raise PolicyError(f"{where}: found {value!r}, expected {{pattern: reason}}")
    for pattern, _ in pairs:
        check(pattern, where)
    return tuple((pattern, why) for pattern, why in pairs)


def _pairs(value: Any) -> tuple[tuple[Pattern, Changes], ...]:
    """A mapping or pairs of pattern and changes, as pairs of hashable values."""
    where = "Policy.overrides"
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise PolicyError(f"{where}: found {value!r}, expected {{pattern: {{field: value}}}}")
    result: dict[Pattern, Changes] = {}
    for pattern, changes in pairs:
        check(pattern, where)
        items = list(changes.items()) if isinstance(changes, Mapping) else changes
        if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
            raise PolicyError(f"{where}[{pattern!r}]: found {changes!r}, expected {{field: value}}")
        if pattern in result:
            raise PolicyError(f"{where}: pattern {pattern!r} stands there twice; the second never matches: remove it")
        result[pattern] = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in items)
    return tuple(result.items())


def _check_names(data: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in fields(Policy)]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise PolicyError(f"{where}: unknown field {name!r}; {advice}")


def _check_values(policy: Policy) -> None:
    def check_field(name: str, good: bool, expected: str) -> None:
        if not good:
            raise PolicyError(f"Policy.{name}: found {getattr(policy, name)!r}, expected {expected}")

    for name, choices in _CHOICES.items():
        check_field(name, getattr(policy, name) in choices, " or ".join(map(repr, choices)))
    for name in _FLAGS:
        check_field(name, isinstance(getattr(policy, name), bool), "True or False")
    for name in _COUNTS:
        value = getattr(policy, name)
        check_field(
            name, isinstance(value, int) and not isinstance(value, bool) and value >= 0, "an integer, 0 or more"
        )
    for name in _THRESHOLDS:
        value = getattr(policy, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        check_field(name, value is None or is_number, "a finite number, or None for no limit")
