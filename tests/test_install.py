"""The wheel, built here and used from elsewhere."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _setuptools():
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


pytestmark = [
    pytest.mark.skipif(
        _setuptools() < 77, reason="building without a network needs setuptools >= 77 in the environment"
    ),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the tests run without the source tree"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel file, built from a copy of the tree so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("fp4fx", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed, cwd, code):
    """Run code in a new process, elsewhere, with the wheel's contents and without the clone."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_module_and_the_type_marker_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fp4fx").rglob("*.py")}
    assert modules <= set(names)
    assert "fp4fx/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"fp4fx"}


def test_entry_points(installed):
    (file,) = installed.glob("*.dist-info/entry_points.txt")
    parsed = ConfigParser()
    parsed.read(file)
    assert dict(parsed["console_scripts"]) == {"fp4fx": "fp4fx.cli:main"}
    assert dict(parsed["torch_dynamo_backends"]) == {"fp4fx": "fp4fx.backend:fp4fx"}


def test_torch_compile_finds_the_backend_without_importing_fp4fx(installed, tmp_path):
    code = """
import sys, torch
x, model = torch.randn(2, 16), torch.nn.Linear(16, 4)
assert "fp4fx" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "fp4fx" not in sys.modules
compiled = torch.compile(model, backend="fp4fx")
torch.testing.assert_close(compiled(x), model(x))
print(sys.modules["fp4fx"].__file__)
"""
    assert run(installed, tmp_path, code).strip() == str(installed / "fp4fx" / "__init__.py")


def test_the_api_works_elsewhere(installed, tmp_path):
    code = """
import torch, fp4fx
torch.manual_seed(0)
model = torch.nn.Linear(32, 32)
packed = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0))
x = torch.randn(2, 32)
assert 10 < fp4fx.nvfp4.sqnr(model(x), packed(x)) < 40
print(fp4fx.__file__)
"""
    assert run(installed, tmp_path, code).strip() == str(installed / "fp4fx" / "__init__.py")


def test_the_command_runs_elsewhere(installed, tmp_path):
    (tmp_path / "elsewhere.py").write_text("import torch\ndef model():\n    return torch.nn.Linear(32, 32)\n")
    code = """
import sys
from importlib.metadata import entry_points
command = next(e for e in entry_points(group="console_scripts") if e.name == "fp4fx").load()
sys.path.remove("")  # an installed command does not see the current directory by itself
sys.exit(command(["plan", "elsewhere:model", "--set", "skip_first=0", "--set", "skip_last=0"]))
"""
    assert "1 of 1 sites in NVFP4" in run(installed, tmp_path, code)
