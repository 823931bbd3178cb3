"""`fp4fx.calibrate`: the methods, one after another, on a quantized model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fp4fx.calibration.bias import BiasCorrection
from fp4fx.calibration.data import Batch, Batches, large_tensors_mapped
from fp4fx.calibration.gptq import GPTQ
from fp4fx.calibration.job import Job, Method
from fp4fx.calibration.record import calibration_of
from fp4fx.calibration.rounding import AdaRound
from fp4fx.calibration.scales import StaticScales
from fp4fx.calibration.smoothing import Smoothing
from fp4fx.errors import CalibrationError
from fp4fx.packed import plan_of

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (StaticScales, Smoothing, GPTQ, AdaRound, BiasCorrection)
}


def calibrate(
    qmodel: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    reference: nn.Module | None = None,
    methods: Sequence[str | Method] = ("static_scales", "gptq", "bias_correction"),
    again: bool = False,
) -> nn.Module:
    """Improve a quantized model in place, by data, and return it.

    The reference is left as it was; where they share a tensor that a method changes, the quantized model gets its own.
    What was done to each site, with its error before and after, is in `fp4fx.report(qmodel).calibration`. Each site is
    written when it is ready: after an interruption the model is as good as it got, and the same call goes on where it
    stopped.

    Args:
        qmodel: What `fp4fx.quantize` or `fp4fx.load` returned, in evaluation; may be compiled.
        batches: Inputs of a forward: tensors, tuples of positional or dicts of keyword arguments, without labels; a
            list or DataLoader, as most methods read them more than once. 100 to 500 samples like those of use will do.
            Only `bias_correction` works without, from the statistics of BatchNorms.
        reference: The model that was quantized, on the same device, for methods that compare with it.
        methods: Names, or instances of the classes in `fp4fx.calibration` for other than default options, in order.
        again: Deal with sites anew that a method of the same options has dealt with, as for other data.

    Raises:
        CalibrationError: A method lacks the reference or the data, the data does not fit the model, is empty, has a NaN
            or is on another device, or the models do not fit each other. What was done by then stays.
    """
    model: nn.Module = getattr(qmodel, "_orig_mod", qmodel)
    chosen = [_method(method) for method in methods]
    if not isinstance(model, nn.Module) or plan_of(model) is None:
        found = type(model).__name__
        raise CalibrationError(f"calibrate: found a {found} without a plan; pass what fp4fx.quantize returned")
    if model.training:
        raise CalibrationError("calibrate: found a model in training mode, expected evaluation; call model.eval()")
    data = None if batches is None else Batches(batches, model)
    job = Job(model, getattr(reference, "_orig_mod", reference), data, again)
    _check(job, chosen)
    with large_tensors_mapped():
        for method in chosen:
            method.run(job)
    return qmodel


def _method(method: str | Method) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise CalibrationError(f"methods: found {method!r}, expected one of {', '.join(METHODS)}")
        return METHODS[method]()
    if not isinstance(method, tuple(METHODS.values())):
        found = f"{method!r}, which is no instance of a method"
        raise CalibrationError(f"methods: found {found}, expected one of {', '.join(METHODS)}")
    return method


def _check(job: Job, methods: Sequence[Method]) -> None:
    """Refuse what no method could start with, before anything has changed."""
    for method in methods:
        if method.needs_reference and job.original is None:
            todo = f"reference=model, the one that was quantized, for methods=[{method.name!r}]"
            raise CalibrationError(f"{method.name}: found no reference, whose weights it compares with; pass {todo}")
    passes = sum(method.passes(job.data) for method in methods)
    if job.data is not None and job.data.once and passes > 1:
        names = ", ".join(method.name for method in methods)
        raise CalibrationError(
            f"batches: found an iterator, which can be read once, expected more for {names}; pass a list, a DataLoader"
        )
    if job.original is None:
        return
    if job.original.training:
        raise CalibrationError("reference: found a model in training mode, expected evaluation; call model.eval()")
    record = calibration_of(job.model)
    lost = [s.parameter for s in (record.steps if record else ()) if s.method == Smoothing.name and s.changed]
    lost = [site.parameter for site in job.sites if site.parameter in lost and job.smoothing(site) is None]
    if lost:
        todo = "calibrate to the end before saving, or quantize anew"
        raise CalibrationError(
            f"{lost[0]}: found it smoothed, and its factors gone, as a file does not hold them; {todo}"
        )
    parameters = dict(job.original.named_parameters())
    for site in job.sites:
        try:
            found = getattr(job.original.get_submodule(site.module), site.attribute, None)
        except AttributeError:
            found = None
        if found is None or tuple(found.shape) != site.shape or plan_of(job.original) is not None:
            what = "a quantized model" if plan_of(job.original) else f"{site.parameter} of another shape, or none"
            raise CalibrationError(
                f"reference: found {what}, expected the model that was quantized, with dense weights"
            )
    device = next(job.model.buffers()).device
    if any(p.device != device for p in parameters.values()):
        raise CalibrationError(f"reference: found weights on another device, expected {device}; move it there")
