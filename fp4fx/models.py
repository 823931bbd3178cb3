"""A model by name: what the command line and the benchmarks take as MODEL."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from torch import nn

from fp4fx.errors import HubError, MissingPackageError, ModelError

NETWORK = (URLError, ConnectionError, TimeoutError)
PATIENCE = 4.0
"""Seconds that a hub has to answer at all before its weights count as out of reach."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package of the extra, e.g. `require("timm", "vision")`.

    Raises:
        MissingPackageError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(f"{error.name} is not installed; pip install 'fp4fx[{extra}]'") from error


def create(source: str, *, pretrained: bool) -> nn.Module:
    """The model, in evaluation mode, that `timm:NAME`, `torchvision:NAME` or `module:callable` names.

    Args:
        source: a model of timm or torchvision, or a callable that is imported, from the current directory too, and
            called without arguments.
        pretrained: fetch the trained weights of a timm or torchvision model; a callable makes its own weights.

    Raises:
        ModelError: there is no such model; says which names are near.
        HubError: the pretrained weights are out of reach.
        MissingPackageError: timm or torchvision is not installed.
    """
    kind, _, name = source.partition(":")
    if not kind or not name:
        raise ModelError(f"model: found {source!r}, expected timm:NAME, torchvision:NAME or module:callable")
    if kind == "timm":
        model = _timm(name, pretrained)
    elif kind == "torchvision":
        model = _torchvision(name, pretrained)
    else:
        model = _callable(kind, name)()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source}: found {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def input_shape(source: str, model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one image for a timm or torchvision model; None for a callable, of which nothing is known."""
    kind = source.partition(":")[0]
    if kind == "timm":
        return (1, *getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224)))
    return (1, 3, 224, 224) if kind == "torchvision" else None


def _timm(name: str, pretrained: bool) -> Any:
    timm = require("timm", "vision")
    if not timm.is_model(name):
        raise _unknown(f"timm:{name}", timm.list_models())
    if "." in name and not timm.is_model_pretrained(name):
        raise _unknown(f"timm:{name}", timm.list_pretrained(name.partition(".")[0] + ".*"))
    if not pretrained:
        return timm.create_model(name)
    if not timm.is_model_pretrained(name):
        raise ModelError(f"timm:{name}: timm has no pretrained weights for it; ask for random ones (--no-pretrained)")
    hub = require("huggingface_hub", "vision")
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    overlay = None
    if repository:
        cached = hub.try_to_load_from_cache(repository, "model.safetensors")
        if isinstance(cached, str):
            overlay = {"file": cached}  # asks no hub at all
        elif (silence := _silence(hub.constants.ENDPOINT)) is not None:
            raise HubError(f"timm:{name}", silence)
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HfHubHTTPError, *NETWORK) as error:
        raise HubError(f"timm:{name}", str(error)) from error


def _torchvision(name: str, pretrained: bool) -> Any:
    models = require("torchvision", "vision").models
    if name not in models.list_models():
        raise _unknown(f"torchvision:{name}", models.list_models())
    builder = models.get_model_builder(name)
    choice: dict[str, str | None] = {"weights": "DEFAULT" if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        choice["weights_backbone"] = None  # detectors fetch a trained backbone unless told not to
    try:
        return builder(**choice)
    except NETWORK as error:
        raise HubError(f"torchvision:{name}", str(error)) from error


def _callable(module: str, name: str) -> Callable[[], Any]:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # an installed command does not see the current directory
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModelError(f"{module}:{name}: no module named {error.name!r} on the import path or in {here}") from error
    made = found
    for step in name.split("."):
        if not hasattr(made, step):
            raise _unknown(f"{module}:{name}", [f"{module}:{n}" for n in dir(found) if not n.startswith("_")])
        made = getattr(made, step)
    if not callable(made):
        raise ModelError(f"{module}:{name}: found {type(made).__name__}, expected something to call without arguments")
    return made


def _unknown(source: str, known: list[str]) -> ModelError:
    kind = source.partition(":")[0]
    names = [n if ":" in n else f"{kind}:{n}" for n in known]
    near = difflib.get_close_matches(source, names, n=3)
    return ModelError(f"{source}: no such model; near names: {', '.join(near) or 'none'}")


def _silence(url: str) -> str | None:
    """Why a host does not answer, or None if it does; knows after PATIENCE, also where the name lookup alone hangs."""
    outcome = [f"{url} did not answer within {PATIENCE:g} s"]

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=PATIENCE).close()  # noqa: S310  (the hub's own https address)
        except HTTPError:
            outcome.clear()  # a refusal is an answer
        except URLError as error:
            outcome[:] = [] if "CERTIFICATE" in str(error.reason) else [f"{url} cannot be reached ({error.reason})"]
        except (ConnectionError, TimeoutError) as error:
            outcome[:] = [f"{url} cannot be reached ({error})"]
        else:
            outcome.clear()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return next(iter(list(outcome)), None)
