"""A quantized model in one safetensors file: its tensors as stored, and the plan to rebuild the modules around them.

Metadata: `format` "fp4fx", `version`, `model` (class name, for messages), and as JSON `plan` (`Plan.to_dict`), `packed`
({parameter: {dtype, sqnr}}), `tied` ({name: name it is written under}), `non_persistent` (not in the state_dict) and,
of a calibrated model, `calibration` (`Calibration.to_dict`).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fp4fx.calibration.record import Calibration, calibration_of, remember_calibration
from fp4fx.errors import CheckpointError, PlanError
from fp4fx.fields import read
from fp4fx.packed import INPUT_SCALE, PARTS, Packed, odd_scale, plan_of
from fp4fx.plan import Plan
from fp4fx.quantize import apply

FORMAT, VERSION = "fp4fx", 1
EXTRA_STATE = "_extra_state"
UNKNOWN_TO_SAFETENSORS = (torch.complex32, torch.complex128)
DAMAGED = "the file is damaged: save the model again"
REBUILD = "build the model with the arguments that it had when it was saved"


@dataclass(frozen=True)
class _Slot:
    """A place for a tensor in a module."""

    module: nn.Module
    attribute: str
    tensor: Tensor | None
    """What is there now; None for extra state and for a buffer that is not computed yet."""
    persistent: bool = True


@dataclass(frozen=True)
class _Weight:
    """What the file says of a packed parameter beside its bytes."""

    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    sqnr: float | None


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one safetensors file, all of it or nothing.

    Every parameter and buffer is written in its own dtype, non-persistent buffers too, a tied tensor once.

    Args:
        model: What `fp4fx.quantize` or `fp4fx.load` returned, or `torch.compile` of that.
        path: The file to write; one that exists is replaced when the new one is complete.

    Raises:
        CheckpointError: The model is not quantized, has packed parameters other than its plan's, or holds something
            that safetensors cannot: a tensor without values, a sparse one, extra state that is no tensor.
        FileNotFoundError: The directory does not exist.
    """
    path, model = Path(path), _eager(model)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the directory {path.parent} does not exist; create it first")
    plan = plan_of(model)
    if plan is None:
        found = f"a {type(model).__name__} without a plan"
        raise _error(path, found, "all of a quantized model", "pass what fp4fx.quantize returned")
    slots, parameters = _slots(model), _packed_parameters(model)
    if parameters.keys() != _planned(plan):
        found = f"packed {_some(parameters.keys() - _planned(plan))}, dense {_some(_planned(plan) - parameters.keys())}"
        raise _error(path, found, "what the plan says", "replace layers of a model before it is quantized")
    specs = {name: module.nvfp4[attribute] for name, (module, attribute) in parameters.items()}
    tensors, tied = _tensors(slots, path)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": (type(model).__bases__[1] if isinstance(model, Packed) else type(model)).__name__,
        "plan": json.dumps(plan.to_dict()),
        "packed": json.dumps({n: {"dtype": str(s.dtype).split(".")[1], "sqnr": s.sqnr} for n, s in specs.items()}),
        "tied": json.dumps(tied),
        "non_persistent": json.dumps([n for n, s in slots.items() if not s.persistent and s.tensor is not None]),
    }
    calibration = calibration_of(model)
    if calibration is not None:
        metadata["calibration"] = json.dumps(calibration.to_dict())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # that of any new file: safetensors makes one that only its owner can read
        temporary.replace(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> nn.Module:
    """A new quantized model: the modules of `model`, every tensor from the file. `model` stays as it was in any case.

    Nothing in the file is executed. Floating-point dtypes are those of the file.

    Args:
        model: A model like the one that was quantized, with any values, or none (built under `torch.device("meta")`).
            Its training flag and `requires_grad` are taken over.
        path: A file that `fp4fx.save` wrote.
        device: Where the tensors go; by default where the model's first one is, the CPU for a model on the meta device.

    Raises:
        CheckpointError: The file is damaged, of another format or a newer version, or does not fit the model.
        FileNotFoundError: There is no such file.
    """
    path, model = Path(path), _eager(model)
    if plan_of(model) is not None:
        raise _error(path, "a quantized model to load into", "one with dense weights", "build it anew")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that fp4fx.save wrote")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            plan, packed, tied = _header(metadata, set(file.offset_keys()), path)
            calibration = _calibration(metadata, path)
            stored = {name: file.get_tensor(name) for name in file.offset_keys()}  # mapped, not read
    except SafetensorError as error:
        todo = f"it is cut off, damaged or of another kind ({error}): copy or save it again"
        raise _error(path, "no whole safetensors file", "one that fp4fx.save wrote", todo) from error
    try:
        result = apply(model, plan, skeleton=True)
    except PlanError as error:
        raise CheckpointError(f"{path}: a {metadata.get('model')} does not fit here: {error}; {REBUILD}") from error
    if calibration is not None:
        remember_calibration(result, calibration)
    for name, (module, attribute) in _packed_parameters(result).items():
        dtype, sqnr = getattr(torch, packed[name].dtype), packed[name].sqnr
        module.nvfp4 = {**module.nvfp4, attribute: replace(module.nvfp4[attribute], dtype=dtype, sqnr=sqnr)}
    slots = _slots(result)
    _check(slots, stored, tied, path)
    held = (slot.tensor.device for slot in slots.values() if slot.tensor is not None and not slot.tensor.is_meta)
    _fill(slots, stored, tied, torch.device(next(held, "cpu") if device is None else device))
    for name, owner in result.named_modules():
        for attribute, value in owner.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta:
                todo = "register it as a buffer, or build the model on a real device"
                raise _error(f"{path}: {name}.{attribute}", "a plain attribute on the meta device", "values", todo)
    return result


def _error(where: str | Path, found: object, expected: object, todo: str) -> CheckpointError:
    return CheckpointError(f"{where}: found {found}, expected {expected}; {todo}")


def _some(names: Collection[str]) -> str:
    """The first of the names, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _eager(model: nn.Module) -> nn.Module:
    """The module itself, or the one that torch.compile wrapped."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"found {type(model).__name__}, expected a torch.nn.Module; build the model first")
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every place for a tensor by qualified name; a module that is reached by several names has several.

    Not the state_dict: it lacks non-persistent buffers, and a model may rewrite its own as it likes.
    """
    slots = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            persistent = name not in module._non_persistent_buffers_set
            if tensor is not None or not persistent:
                slots[prefix + name] = _Slot(module, name, tensor, persistent)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            slots[prefix + EXTRA_STATE] = _Slot(module, EXTRA_STATE, None)
    return slots


def _packed_parameters(model: nn.Module) -> dict[str, tuple[Packed, str]]:
    """Module and attribute of every packed parameter by qualified name."""
    modules = ((path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Packed))
    return {f"{path}.{name}" if path else name: (m, name) for path, m in modules for name in m.nvfp4}


def _planned(plan: Plan) -> set[str]:
    """The names of all parameters that a plan packs."""
    return {name for d in plan.quantized for name in (d.site.parameter, *d.site.tied)}


def _tensors(slots: Mapping[str, _Slot], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The contiguous tensors to write, which share no memory, and which of them the tied names stand for."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_names: dict[Any, str] = {}
    storages: set[int] = set()
    for name, slot in slots.items():
        tensor = slot.module.get_extra_state() if slot.attribute == EXTRA_STATE else slot.tensor
        if tensor is None and not slot.persistent:
            continue
        if not isinstance(tensor, Tensor):
            todo = "safetensors holds nothing else, let get_extra_state return one (e.g. bytes as uint8)"
            raise _error(f"{path}: {name}", f"a value of type {type(tensor).__name__}", "a tensor", todo)
        odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype in UNKNOWN_TO_SAFETENSORS
        if tensor.is_meta or odd:
            found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise _error(f"{path}: {name}", found, "dense values of a common dtype", "load or convert it before saving")
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        first = first_names.setdefault(place if tensor.numel() else id(tensor), name)
        if first != name:
            tied[name] = first
            continue
        tensors[name] = tensor.detach().contiguous()
        if tensors[name].untyped_storage().data_ptr() in storages:  # other views of one memory are written apart
            tensors[name] = tensors[name].clone()
        storages.add(tensors[name].untyped_storage().data_ptr())
    return tensors, tied


def _header(
    metadata: Mapping[str, str], names: set[str], path: Path
) -> tuple[Plan, dict[str, _Weight], dict[str, str]]:
    """Plan, packed parameters and tied names, from the metadata of a file that holds tensors of these names."""
    if metadata.get("format") != FORMAT:
        found = f"a safetensors file of format {metadata.get('format', 'unknown')!r}"
        raise _error(path, found, repr(FORMAT), "load it by the library that wrote it, then fp4fx.quantize the model")
    if metadata.get("version") != str(VERSION):
        found = f"version {metadata.get('version')}"
        raise _error(path, found, f"version {VERSION}", "install the fp4fx that wrote it, or a newer one")
    try:
        plan, packed, tied = (json.loads(metadata[key]) for key in ("plan", "packed", "tied"))
        plan = Plan.from_dict(plan)
        if not isinstance(packed, dict) or packed.keys() != _planned(plan):
            raise PlanError("packed: found other parameters than in the plan, expected the same")
        packed = {name: read(_Weight, value, f"packed.{name}") for name, value in packed.items()}
        if not isinstance(tied, dict) or not names.isdisjoint(tied) or not names.issuperset(map(str, tied.values())):
            raise PlanError("tied: found a name that is not tied to one of the file's tensors, expected names by name")
    except KeyError as error:
        raise CheckpointError(f"{path}: metadata: {error} is missing; {DAMAGED}") from error
    except ValueError as error:  # of JSON, or a PlanError
        raise CheckpointError(f"{path}: metadata: {error}; {DAMAGED}") from error
    return plan, packed, tied


def _calibration(metadata: Mapping[str, str], path: Path) -> Calibration | None:
    """What calibration had done to the model, if there was any."""
    if "calibration" not in metadata:
        return None
    try:
        return Calibration.from_dict(json.loads(metadata["calibration"]))
    except ValueError as error:  # of JSON, or a PlanError
        raise CheckpointError(f"{path}: metadata: {error}; {DAMAGED}") from error


def _check(slots: dict[str, _Slot], stored: dict[str, Tensor], tied: dict[str, str], path: Path) -> None:
    """The file has what the model needs and nothing else; a computed non-persistent buffer need not be there."""
    found = stored.keys() | tied.keys()
    required = {n for n, s in slots.items() if s.persistent or (s.tensor is not None and s.tensor.is_meta)}
    if not required <= found <= slots.keys():
        differs = f"missing tensors: {_some(required - found)}, extra tensors: {_some(found - slots.keys())}"
        raise _error(path, differs, "those of the model", REBUILD)
    for name, slot in slots.items():
        if slot.tensor is not None and slot.persistent:
            _check_tensor(f"{path}: {name}", slot.module, slot.attribute, slot.tensor, stored[tied.get(name, name)])


def _check_tensor(where: str, module: nn.Module, attribute: str, expected: Tensor, found: Tensor) -> None:
    """A tensor is like the model's, and a part of a packed parameter in the range that `nvfp4.quantize` gives."""
    part = None
    if found.shape != expected.shape:
        raise _error(where, f"shape {tuple(found.shape)}", tuple(expected.shape), REBUILD)
    if isinstance(module, Packed):
        parts = {f"{name}_{part}": part for name in module.nvfp4 for part in PARTS}
        part = {INPUT_SCALE: "global_scale", **parts}.get(attribute)
    both_float = found.is_floating_point() and expected.is_floating_point()
    if found.dtype != expected.dtype and (part or not both_float):
        raise _error(where, found.dtype, expected.dtype, DAMAGED if part else REBUILD)
    odd = odd_scale(found, least=1) if part == "scale" else None
    if odd is not None:
        raise _error(where, odd, "positive E4M3 numbers, 0x01 to 0x7e", DAMAGED)
    if part == "global_scale" and not 0 < found.item() < torch.inf:
        raise _error(where, found.item(), "a positive finite number", DAMAGED)


def _fill(slots: dict[str, _Slot], stored: dict[str, Tensor], tied: dict[str, str], device: torch.device) -> None:
    """Put a copy of every tensor into its slot, one for all that are tied; a buffer that is not in the file moves."""
    placed: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, slot in slots.items():
        source = tied.get(name, name)
        if source in stored and source not in placed:
            placed[source] = stored[source].to(device, copy=True)
        if slot.attribute == EXTRA_STATE:
            slot.module.set_extra_state(placed[source])
        elif isinstance(slot.tensor, nn.Parameter):
            new = nn.Parameter(placed[source], requires_grad=slot.tensor.requires_grad)
            setattr(slot.module, slot.attribute, parameters.setdefault(source, new))
        elif source in placed:
            setattr(slot.module, slot.attribute, placed[source])
        elif slot.tensor is not None:
            setattr(slot.module, slot.attribute, slot.tensor.to(device))
