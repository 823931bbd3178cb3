"""One exception type per kind of mistake, all under `Error`.

A message names the layer, what was found, what was expected and what to do about it.
"""


class Error(Exception):
    """Base class of every error that fp4fx raises on purpose."""


class PolicyError(Error, ValueError):
    """A policy has an unknown field, a contradiction, or a pattern that matches nothing."""


class TraceError(Error):
    """The model cannot be traced at all (a lazy parameter, a scripted or compiled model, not a module)."""


class PlanError(Error, ValueError):
    """A plan does not fit the model it is applied to, or cannot be read from its dictionary."""


class LayoutError(Error, ValueError):
    """A tensor's shape, dtype or order does not fit what is asked of it."""


class NonFiniteWeightError(Error, ValueError):
    """A weight that was to be quantized holds NaN or Inf."""


class CheckpointError(Error, ValueError):
    """A checkpoint is damaged, of another format or version, or does not fit the model."""


class CalibrationError(Error, ValueError):
    """Calibration data, or the model to be calibrated, cannot be used as it is."""


class BudgetError(Error, ValueError):
    """No choice of layers meets a budget; says the best that one does."""


class BackendError(Error):
    """An option of the torch.compile backend is unknown or contradictory."""


class PassError(Error):
    """A graph pass broke or left an invalid graph; names the passes that ran before it."""


class GradientError(Error, RuntimeError):
    """A gradient is asked of an op that has none."""


class KernelError(Error):
    """The native kernels cannot be built or loaded on this machine."""


class FallbackError(Error):
    """Something fell back to a slower or less precise path and `on_fallback="raise"` forbids it."""


class ModelError(Error, ValueError):
    """A MODEL argument names nothing that can be made."""


class HubError(ModelError):
    """Pretrained weights are out of reach: no network, or a hub that does not answer."""

    def __init__(self, source: str, reason: str) -> None:
        self.reason = reason.strip().partition("\n")[0]
        advice = "try again later, or take random ones (--no-pretrained)"
        super().__init__(f"{source}: no pretrained weights: {self.reason}; {advice}")


class MissingPackageError(Error, ImportError):
    """An optional package is not installed."""
