"""What calibration did to every site, kept on the model: for a reader, and for an interrupted call to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from fp4fx.fields import read

HEADERS = ("parameter", "calibration", "error before", "after", "what")
_RECORD = "_fp4fx_calibration"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one method did to one site."""

    method: str
    options: str
    """The method with all its options, by which it is known again."""
    parameter: str
    before: float | None
    """Relative squared error of what the method works on, ‖found - wanted‖² / ‖wanted‖²; None if not measured.

    The op's output on the same inputs for gptq and adaround, on what calibration did not learn from; the output against
    the reference's own for bias_correction and smoothing; the input for static_scales.
    """
    after: float | None
    changed: bool
    reason: str
    """What was done, or why the site was left as it was."""


@dataclass(frozen=True)
class Calibration:
    """The steps of all calls so far, in order; of one method and site the last."""

    steps: tuple[Step, ...] = ()

    def done(self, options: str, parameter: str) -> bool:
        """Whether a method with these options has dealt with the site, and nothing that it builds on changed since."""
        return any(s.options == options and s.parameter == parameter for s in self.steps)

    def with_step(self, step: Step, stale: Iterable[str] = ()) -> Calibration:
        """With one more step, in place of those of its method, and of the `stale` methods, for the same site."""
        methods = {step.method, *stale}
        kept = (s for s in self.steps if s.parameter != step.parameter or s.method not in methods)
        return Calibration((*kept, step))

    def __str__(self) -> str:
        """A table."""
        rows = [(s.parameter, s.method, s.before, s.after, s.reason) for s in self.steps]
        return tabulate(rows, HEADERS, floatfmt=".2e", missingval="-")

    def to_dict(self) -> dict[str, Any]:
        """The steps as plain JSON-ready values."""
        return {"steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; PlanError says what is wrong and where."""
        return read(cls, data, "calibration")


def calibration_of(model: nn.Module) -> Calibration | None:
    """What calibration did to a quantized model, or None if there was none."""
    found: Calibration | None = model.__dict__.get(_RECORD)
    return found


def remember_calibration(model: nn.Module, calibration: Calibration) -> None:
    """Let a quantized model carry its record through copies and pickles."""
    model.__dict__[_RECORD] = calibration
