"""The checker, on kernels of which it is known what is wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).parent)
KERNELS = "aot_kernels"  # not in the package `tests`, which has kernels interpreted


def aot(*arguments, **environ):
    """Run in a process of its own: here the kernels are interpreted."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fp4fx.kernels.triton.aot", *arguments]
    path = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))
    environ = {**clean, "PYTHONPATH": path, **environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole run, its exit status and its rows by variant and target."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    run = aot("--modules", KERNELS, "--targets", "80,90,100,120", "--json", str(path))
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return run, {(row["variant"], row["target"]): row for row in rows}


def test_a_problem_is_the_exit_status_and_the_good_ones_are_not(done):
    run, rows = done
    assert run.returncode == 1, run.stderr
    assert [key for key, row in rows.items() if row["problems"]] == [
        ("large", 120),
        ("no matrix", 90),
        ("spilling", 90),
        ("broken", 80),
        ("contracted", 90),
        ("later", 80),
    ]
    assert "6 of 12 compilations are as claimed" in run.stdout


def test_the_matrix_instruction_is_that_of_the_target(done):
    _, rows = done
    found = {target: rows["good", target]["matrix"] for target in (80, 90, 100, 120)}
    assert found == {
        80: ["mma.sync m16n8k16 bf16"],
        90: ["wgmma m64n64k16 bf16 SS"],
        100: ["tcgen05 f16"],
        120: ["mma.sync m16n8k16 bf16"],
    }
    for target in found:
        row = rows["good", target]
        assert 32 <= row["registers"] <= 255
        assert row["stack"] == row["spilled"] == 0
        assert row["shared"] >= 2 * 64 * 64 * 2 - 1024 or target == 100


def test_what_is_wrong_is_said(done):
    run, rows = done
    assert rows["large", 120]["problems"] == ["128 KiB of shared memory, the target has 99"]
    assert rows["large", 90]["shared"] > 99 << 10
    assert rows["no matrix", 90]["problems"] == ["no tcgen05.mma in the PTX"]
    assert rows["spilling", 90]["spilled"] > 1000
    assert rows["spilling", 90]["problems"] == [f"spills {rows['spilling', 90]['spilled']} bytes"]
    assert rows["contracted", 90]["problems"] == ["fma.rn.f32 in the PTX"]
    assert rows["broken", 80]["problems"] == ["does not compile: CompileTimeAssertionFailure: only one"]
    assert all(row["problems"][0] in run.stdout for row in rows.values() if row["problems"])


def test_what_this_triton_is_too_old_for_is_a_row_and_what_is_not_claimed_is_none(done):
    run, rows = done
    assert rows["later", 90]["skipped"].startswith("needs triton 99.0, this is ")
    assert "needs triton 99.0" in run.stdout
    assert {target for name, target in rows if name == "large"} == {90, 120}
    assert len(rows) == 13


def test_a_module_that_cannot_say_what_it_has_is_a_row():
    run = aot("--modules", f"{KERNELS}_wrong", KERNELS, "--targets", "80", "--only", "good")
    assert run.returncode == 1
    assert "two different variants are called 'same'" in run.stdout
    assert "1 of 2 compilations are as claimed" in run.stdout


def test_a_compiler_that_dies_is_a_row():
    run = aot("--modules", KERNELS, "--targets", "90", "--only", "good", FP4FX_TEST_DEADLY="1")
    assert run.returncode == 1
    assert "the compiler's process died: LLVM ERROR: what it says" in run.stdout
    assert "ten thousand lines" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("--targets", "90,42"), {}, "--targets 90,42: expected some of 80, 86"),
        (("--modules", KERNELS, "--only", "nothing"), {}, "no kernel has a variant of that name"),
        ((), {"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET"),
    ],
)
def test_what_cannot_be_asked(arguments, environ, words):
    run = aot(*arguments, **environ)
    assert run.returncode == 2
    assert words in run.stderr
