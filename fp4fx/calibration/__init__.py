"""Better weights, scales and biases of a quantized model, from data and from the original: `fp4fx.calibrate`."""

from fp4fx.calibration.bias import BiasCorrection
from fp4fx.calibration.calibrate import calibrate
from fp4fx.calibration.gptq import GPTQ
from fp4fx.calibration.record import Calibration, Step, calibration_of
from fp4fx.calibration.rounding import AdaRound
from fp4fx.calibration.scales import StaticScales
from fp4fx.calibration.smoothing import Smoothing

__all__ = [
    "GPTQ",
    "AdaRound",
    "BiasCorrection",
    "Calibration",
    "Smoothing",
    "StaticScales",
    "Step",
    "calibrate",
    "calibration_of",
]
