"""fp4fx: any PyTorch model in NVFP4.

`quantize` decides on a traced graph which weights become 4-bit floats and packs them into the modules; the
torch.compile backend "fp4fx" fuses their decoding into the ops that read them; `report` says for every weight what
happened and why.
"""

from fp4fx import nvfp4
from fp4fx.calibration import calibrate
from fp4fx.checkpoint import load, save
from fp4fx.errors import (
    BackendError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    Error,
    FallbackError,
    GradientError,
    LayoutError,
    NonFiniteWeightError,
    PassError,
    PlanError,
    PolicyError,
    TraceError,
)
from fp4fx.explain import Explanation, explain
from fp4fx.plan import Plan, plan
from fp4fx.policy import Policy
from fp4fx.programs import lower
from fp4fx.quantize import quantize
from fp4fx.report import Report, report
from fp4fx.sensitivity import Sensitivity, sensitivity

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "Error",
    "Explanation",
    "FallbackError",
    "GradientError",
    "LayoutError",
    "NonFiniteWeightError",
    "PassError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "Report",
    "Sensitivity",
    "TraceError",
    "calibrate",
    "explain",
    "load",
    "lower",
    "nvfp4",
    "plan",
    "quantize",
    "report",
    "save",
    "sensitivity",
]
