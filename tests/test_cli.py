import json
import sys

import numpy as np
import pytest
import torch

import fp4fx
from fp4fx import demo
from fp4fx.cli import main

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 4)
        self.norm = nn.LayerNorm(48)

    def forward(self, x):
        return self.last(self.norm(self.middle(self.first(x).relu())).relu())

def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current directory with the module of a small model; the import path is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "net_for_cli.py").write_text(NET)
    yield tmp_path
    sys.modules.pop("net_for_cli", None)


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def usage(capsys, *argv):
    """Stderr of a command that is used wrongly."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


def labels(out):
    """Decision by parameter in a plan's JSON."""
    decisions = fp4fx.Plan.from_dict(json.loads(out)).decisions
    return {d.site.parameter: d.label for d in decisions if d.rule != "skip_norms"}


def test_plan_prints_the_table(capsys):
    code, out, err = run(capsys, "plan", "net_for_cli:net")
    assert code == 0
    assert "middle.weight" in out
    assert "1 of 4 sites in NVFP4" in out
    assert "Traceback" not in err


def test_plan_says_that_an_input_does_not_fit(capsys):
    code, out, _ = run(capsys, "plan", "net_for_cli:net", "--input-shape", "1,31")
    assert code == 0
    assert "the example inputs were not used" in out
    assert "1 of 4 sites in NVFP4" in out


def test_plan_as_json_is_a_plan(capsys):
    code, out, _ = run(capsys, "plan", "net_for_cli:net", "--json", "--input-shape", "1,32")
    assert code == 0
    assert labels(out) == {"first.weight": "kept", "middle.weight": "W4A16", "last.weight": "kept"}


def test_set_changes_fields_of_the_policy(capsys):
    _, out, _ = run(
        capsys, "plan", "net_for_cli:net", "--json",
        "--set", "skip_first=0", "--set", "skip_last = 0", "--set", "activations=nvfp4", "--set", 'exclude=["mid*"]',
    )  # fmt: skip
    assert labels(out) == {"first.weight": "W4A4", "middle.weight": "kept", "last.weight": "W4A4"}


def test_words_of_set(capsys):
    _, out, _ = run(
        capsys, "plan", "net_for_cli:net", "--json", "--preset", "w4a4",
        "--set", "activations=none", "--set", "depthwise=True", "--set", "max_kurtosis=2.5",
    )  # fmt: skip
    policy = json.loads(out)["policy"]
    assert (policy["activations"], policy["depthwise"], policy["max_kurtosis"]) == (None, True, 2.5)


def test_policy_file_and_set_on_top(capsys, folder):
    (folder / "p.toml").write_text('activations = "nvfp4"\nskip_first = 0\n')
    _, out, _ = run(capsys, "plan", "net_for_cli:net", "--json", "--policy", "p.toml", "--set", "skip_last=0")
    assert labels(out) == {"first.weight": "W4A4", "middle.weight": "W4A4", "last.weight": "W4A4"}


def test_preset(capsys):
    _, out, _ = run(capsys, "plan", "net_for_cli:net", "--json", "--preset", "w4a4")
    assert labels(out)["middle.weight"] == "W4A4"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("plan", "net_for_cli:net", "--set", "skip_frist=0"), "did you mean 'skip_first'?"),
        (("plan", "net_for_cli:net", "--set", "skip_first=-1"), "expected an integer, 0 or more"),
        (("plan", "net_for_cli:net", "--set", 'exclude=["no.such"]'), "no.such"),
        (("plan", "net_for_cli:net", "--policy", "missing.toml"), "missing.toml"),
        (("plan", "net_for_cli:nett"), "near names: net_for_cli:net"),
        (("report", "net_for_cli:net", "net_for_cli.py"), "net_for_cli.py"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(capsys, argv, expected):
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert err.startswith(f"fp4fx {argv[0]}: ")
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "COMMAND"),
        (("plan",), "MODEL"),
        (("quantize", "net_for_cli:net"), "--out"),
        (("quantize", "net_for_cli:net", "--out", "no/such/folder/x"), "there is no folder no/such/folder"),
        (("plan", "net_for_cli:net", "--set", "skip_first"), "expected FIELD=VALUE"),
        (("plan", "net_for_cli:net", "--input-shape", "1,x"), "expected sizes such as"),
        (("plan", "net_for_cli:net", "--input-shape", "0,3"), "expected sizes such as"),
        (("plan", "net_for_cli:net", "--preset", "w4a4", "--policy", "p.toml"), "not allowed with"),
        (("plan", "net_for_cli:net", "--preset", "w2a2"), "invalid choice"),
        (("bench", "net_for_cli:net", "--rounds", "0"), "1 or more"),
        (("bench", "net_for_cli:net"), "--input-shape: net_for_cli:net has to be run"),
        (("report", "net_for_cli:net", "x.safetensors", "--set", "skip_first=0"), "FILE has its policy in it"),
        (("report", "net_for_cli:net", "missing.safetensors"), "there is no file missing.safetensors"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, argv, expected):
    assert expected in usage(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_data_that_cannot_be_read_is_wrong_usage(capsys, folder):
    (folder / "x.npy").write_text("no array")
    np.savez(folder / "x.npz", x=np.zeros(3))
    assert "there is no folder" in usage(capsys, "sensitivity", "net_for_cli:net", "--plot", "none/x.png")
    for file, expected in (("x.npy", "cannot be read"), ("none.npy", "cannot be read"), ("x.npz", "holds no array")):
        assert expected in usage(capsys, "sensitivity", "net_for_cli:net", "--data", file)


def test_bench_on_a_device_that_is_not_there(capsys):
    assert "no CUDA device" in usage(capsys, "bench", "net_for_cli:net", "--input-shape", "1,32", "--device", "cuda")


def test_quantize_writes_a_file_that_report_reads(capsys, folder):
    code, out, _ = run(capsys, "quantize", "net_for_cli:net", "--out", "net.safetensors", "--json")
    written = json.loads(out)
    assert code == 0
    assert written["file_bytes"] == (folder / "net.safetensors").stat().st_size
    code, out, _ = run(capsys, "report", "net_for_cli:net", "net.safetensors", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["resident"] == written["report"]["resident"] < shown["dense"]
    assert [r["decision"] for r in shown["rows"]] == [r["decision"] for r in written["report"]["rows"]]


def test_quantize_says_what_it_wrote(capsys):
    code, out, _ = run(capsys, "quantize", "net_for_cli:net", "--out", "net.safetensors")
    assert code == 0
    assert "middle.weight" in out
    assert "fp4fx report net_for_cli:net net.safetensors" in out


def test_report_of_a_model_quantized_now_names_kernels_once_compiled(capsys):
    _, out, _ = run(capsys, "report", "net_for_cli:net")
    assert "not compiled yet" in out
    code, out, _ = run(capsys, "report", "net_for_cli:net", "--compile", "--input-shape", "1,32", "--json")
    assert code == 0
    (row,) = (r for r in json.loads(out)["rows"] if r["decision"] == "W4A16")
    assert row["kernels"]


def test_sensitivity_without_data_on_noise_and_on_a_file(capsys, folder):
    code, out, err = run(capsys, "sensitivity", "net_for_cli:net")
    assert (code, err) == (0, "")
    assert "unit normal, ReLU" in out and "norm, ReLU" in out
    noise = run(capsys, "sensitivity", "net_for_cli:net", "--input-shape", "40,32", "--json")
    np.save(folder / "x.npy", torch.randn((40, 32), generator=torch.Generator().manual_seed(0)).numpy())
    given = run(capsys, "sensitivity", "net_for_cli:net", "--data", "x.npy", "--batch", 16, "--json")
    for _, out, _ in (noise, given):
        assert {row["inputs"] for row in json.loads(out)["rows"]} == {"data"}
    ours, theirs = (json.loads(out)["rows"][0]["output_sqnr"] for _, out, _ in (noise, given))
    assert ours == pytest.approx(theirs)  # the same values, in one batch and in three
    _, out, _ = run(capsys, "sensitivity", "net_for_cli:net", "--preset", "w4a4", "--plot", "figure.svg")
    assert "kept: first.weight: first of 3" in out and "W4A4" in out
    assert "<svg" in (folder / "figure.svg").read_text()


def test_bench_measures_all_candidates(capsys):
    argv = ("bench", "net_for_cli:net", "--input-shape", "1,32", "--rounds", "2", "--warmup", "1", "--json")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    measured = json.loads(out)
    names = ["eager fp32", "Inductor fp32", "Inductor bf16", "fp4fx fp32", "fp4fx bf16"]
    assert [r["candidate"] for r in measured["rows"]] == names
    assert all(r["median_ms"] > 0 and r["rounds"] == 2 for r in measured["rows"])
    assert measured["input_shapes"] == [[1, 32]]
    assert measured["environment"]["torch"] == torch.__version__


def test_a_torchvision_model(capsys):
    pytest.importorskip("torchvision")
    code, out, _ = run(capsys, "plan", "torchvision:resnet18", "--no-pretrained", "--json")
    assert code == 0
    found = labels(out)
    assert found["layer1.0.conv1.weight"] == "W4A16"
    assert (found["conv1.weight"], found["fc.weight"]) == ("kept", "kept")


def test_a_missing_package_is_a_clear_error(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(capsys, "plan", "timm:resnet18")
    assert code == 1
    assert "pip install 'fp4fx[vision]'" in err


def test_demo_keeps_stdout_for_json(capsys, monkeypatch, folder):
    def run_demo(out, say):
        say("text")
        return {"folder": str(out)}

    monkeypatch.setattr(demo, "run", run_demo)
    assert run(capsys, "demo", "--json", "--out", "there") == (0, '{\n  "folder": "there"\n}\n', "text\n")
    assert run(capsys, "demo") == (0, "text\n", "")


def test_help_and_version(capsys):
    for argv, expected in (
        (["--help"], "examples:"),
        (["plan", "--help"], "--preset"),
        (["--version"], fp4fx.__version__),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out
