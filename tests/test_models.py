import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from torch import nn

from fp4fx import models
from fp4fx.errors import Error, HubError, MissingPackageError, ModelError
from fp4fx.models import create, input_shape, require


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a module of its own; the import path is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    text = """
import torch
class Tiny(torch.nn.Module):
    pass
def tiny():
    return Tiny().train()
class zoo:
    tiny = tiny
nothing = 3
def number():
    return 3
"""
    (tmp_path / "models_for_test.py").write_text(text)
    (tmp_path / "broken_for_test.py").write_text("import no_such_package_at_all\n")
    yield tmp_path
    sys.modules.pop("models_for_test", None)


def test_a_callable_in_the_current_directory(folder):
    for source in ("models_for_test:tiny", "models_for_test:Tiny", "models_for_test:zoo.tiny"):
        model = create(source, pretrained=True)
        assert type(model).__name__ == "Tiny"
        assert not model.training


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("resnet50", "expected timm:NAME, torchvision:NAME or module:callable"),
        ("models_for_test:", "expected timm:NAME"),
        ("models_for_test:tinny", "near names: models_for_test:tiny"),
        ("models_for_test:nothing", "found int, expected something to call"),
        ("models_for_test:number", "found int, expected a torch.nn.Module"),
        ("no_such_module_for_test:f", "no module named 'no_such_module_for_test'"),
        ("timm:resnet5O", "near names: timm:resnet50"),
        ("timm:resnet50.no_such_tag", "no such model; near names: timm:resnet50."),
        ("torchvision:resnet81", "near names: torchvision:resnet18"),
    ],
)
def test_names_of_nothing(folder, source, expected):
    if source.startswith(("timm", "torchvision")):
        pytest.importorskip(source.partition(":")[0])
    with pytest.raises(ModelError) as caught:
        create(source, pretrained=False)
    assert expected in str(caught.value)
    assert isinstance(caught.value, Error)


def test_a_broken_import_inside_the_module_is_not_hidden(folder):
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        create("broken_for_test:f", pretrained=False)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"timm is not installed; pip install 'fp4fx\[vision\]'"):
        create("timm:resnet50", pretrained=False)
    with pytest.raises(MissingPackageError, match=r"fp4fx\[demo\]"):
        require("no_such_package_at_all.datasets", "demo")


def test_timm_and_torchvision_make_models_in_evaluation_mode():
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    model = create("timm:vit_tiny_patch16_384", pretrained=False)
    assert not model.training
    assert input_shape("timm:vit_tiny_patch16_384", model) == (1, 3, 384, 384)
    model = create("torchvision:squeezenet1_1", pretrained=False)
    assert not model.training
    assert input_shape("torchvision:squeezenet1_1", model) == (1, 3, 224, 224)
    assert input_shape("module:callable", nn.Identity()) is None


def test_an_untrained_detector_fetches_no_backbone(monkeypatch):
    pytest.importorskip("torchvision")

    def fetched(*args, **kwargs):
        raise AssertionError("fetched weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", fetched)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    assert create("torchvision:lraspp_mobilenet_v3_large", pretrained=False) is not None


def test_a_silent_hub_is_an_error_at_once(monkeypatch):
    pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(models, "_silence", lambda url: f"{url} cannot be reached (no network)\nsecond line")
    start = time.perf_counter()
    with pytest.raises(HubError, match=r"timm:resnet18: no pretrained weights.*--no-pretrained") as caught:
        create("timm:resnet18", pretrained=True)
    assert time.perf_counter() - start < 3
    assert caught.value.reason.endswith("cannot be reached (no network)")
    assert "\n" not in str(caught.value)


def test_cached_weights_are_used_without_asking_the_hub(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = timm.create_model("resnet18")
    file = tmp_path / "model.safetensors"
    safetensors.save_file({name: t.contiguous() for name, t in wanted.state_dict().items()}, file)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(file))
    monkeypatch.setattr(models, "_silence", lambda url: pytest.fail("asked the hub"))
    model = create("timm:resnet18", pretrained=True)
    assert torch.equal(model.fc.weight, wanted.fc.weight)


class _Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *args):
        pass


def test_silence_tells_a_refusal_from_nobody():
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert models._silence(address) is None
    server.server_close()
    assert "cannot be reached" in models._silence(address)


def test_silence_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(models, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        start = time.perf_counter()
        assert models._silence(f"http://127.0.0.1:{listening.getsockname()[1]}") is not None
        assert time.perf_counter() - start < 3
