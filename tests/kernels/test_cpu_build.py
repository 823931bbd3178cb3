"""Building, caching and loading the CPU kernels. A script that notes its calls stands in for the slow compiler."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4fx.errors import KernelError
from fp4fx.kernels.cpu import build

COMPILER = """#!/bin/sh
echo "$@" >> {calls}
case "$1" in --version) echo "stand-in {version}"; exit 0;; esac
sleep {seconds}
while [ "$1" != "-o" ]; do shift; done
echo "$2" > "$2"
{end}
"""


class Compiler:
    """A stand-in for g++, in `$CXX`, with an empty cache."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = folder, folder / "calls"
        self.cache = folder / "cache"
        monkeypatch.setenv("CXX", str(folder / "cxx"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        self.write()

    def write(self, version=1, seconds=0, end="exit 0"):
        path = self.folder / "cxx"
        path.write_text(COMPILER.format(calls=self.calls, version=version, seconds=seconds, end=end))
        path.chmod(0o755)

    def count(self):
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return sum("--version" not in line for line in lines)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    return Compiler(tmp_path, monkeypatch)


EVERYTHING = len(build.tiers()) + 3  # binding, dispatch, linking


def test_it_is_built_once(compiler):
    path = build.library()
    assert path.parent == compiler.cache / "fp4fx" and compiler.count() == EVERYTHING
    assert build.library() == path and compiler.count() == EVERYTHING
    assert not list(path.parent.glob("build-*")), "nothing temporary is left behind"


def test_what_it_is_made_of_is_in_its_name(compiler, monkeypatch, tmp_path):
    first = build.library()
    compiler.write(version=2)
    second = build.library()
    assert second != first and compiler.count() == 2 * EVERYTHING

    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    assert build.library() == second
    (copy / "dispatch.cpp").write_text("// other\n")
    third = build.library()
    assert third != second and compiler.count() == 2 * EVERYTHING + 2, "one object and the library are new"

    monkeypatch.setattr(build.torch, "__version__", "99.0")
    assert build.library() != third


def test_a_processor_gets_the_tiers_that_it_can_run(monkeypatch):
    features = dict.fromkeys(build.TIERS["avx512_bf16"])
    monkeypatch.setattr(build, "target_of", lambda _: type("Target", (), {"features": frozenset(features)}))
    monkeypatch.setattr(build, "extra_tiers", ())
    assert build.tiers() == ("avx512_bf16", "avx512", "avx2", "portable")
    del features["avx512bw"]
    assert build.tiers() == ("avx2", "portable")
    features.clear()
    assert build.tiers() == ("portable",)


def test_processes_that_build_at_once_build_once(compiler):
    compiler.write(seconds=0.3)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        paths = {job.get(60) for job in [pool.apply_async(build.library) for _ in range(3)]}
    assert len(paths) == 1 and compiler.count() == EVERYTHING


def test_a_damaged_library_is_built_again(compiler):
    path = build.library()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:1] + b"x" + whole[2:]):
        path.write_bytes(damaged)
        before = compiler.count()
        assert build.library() == path and path.read_bytes()[-32:] != damaged[-32:]
        assert compiler.count() == before + 1, "the objects are there, so it is only linked"


def test_without_a_compiler_a_library_in_the_cache_is_used(compiler, monkeypatch):
    path = build.library()
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.library() == path
    path.unlink()
    with pytest.raises(KernelError, match=r"no C\+\+ compiler found: '/nonexistent/g\+\+' is not there; install g\+\+"):
        build.library()


def test_a_failing_compiler_names_its_log_and_is_not_tried_at_every_start(compiler):
    compiler.write(end="echo it does not like this >&2; exit 1")
    with pytest.raises(KernelError, match="failed, see") as failure:
        build.library()
    (log,) = (compiler.cache / "fp4fx").glob("*.log")
    assert str(log) in str(failure.value) and "it does not like this" in log.read_text()
    assert "\n" not in str(failure.value)
    before = compiler.count()
    with pytest.raises(KernelError, match=r"failed before, see .*delete that file"):
        build.library()
    assert compiler.count() == before
    compiler.write()
    log.unlink()
    assert build.library().exists()


def test_where_nothing_can_be_cached_it_is_built_for_the_process(compiler, monkeypatch, caplog):
    occupied = compiler.folder / "file"
    occupied.write_text("")
    for variable, value in (("XDG_CACHE_HOME", str(occupied)), ("XDG_CACHE_HOME", "~nobody-of-that-name")):
        monkeypatch.setenv(variable, value)
        caplog.clear()
        path = build.library()
        assert path.exists() and occupied not in path.parents
        assert "for this process only" in caplog.text
        shutil.rmtree(path.parent)


def aged(path, days):
    """The file, as if last used so many days ago."""
    then = time.time() - days * 86400
    os.utime(path, (then, then))
    return path


def test_a_build_removes_what_was_not_used_for_a_month(compiler):
    first = build.library()
    cache = first.parent
    killed = cache / "build-killed"
    killed.mkdir()
    (killed / "half.o").write_text("")
    (cache / "failed.log").write_text("")
    others = [cache / name for name in ("notes.txt", "lock")]
    others[0].write_text("not of this build")
    for path in cache.iterdir():
        aged(path, 31)
    compiler.write(version=2)
    second = build.library()
    kept = {path.name for path in cache.iterdir()}
    assert kept == {second.name, *(path.name for path in others), *(path.name for path in cache.glob("*.o"))}
    assert len(list(cache.glob("*.o"))) == EVERYTHING - 1, "the objects of the second build alone"


def test_what_was_used_since_stays(compiler, monkeypatch, tmp_path):
    """A library is used by asking for it, with a compiler or without, and an object by linking it."""
    first = build.library()
    cache = first.parent
    young = cache / "young.so"
    young.write_text("")
    for path in cache.iterdir():
        aged(path, 29 if path == young else 31)
    assert build.library() == first
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    (copy / "dispatch.cpp").write_text("// other\n")
    second = build.library()
    assert set(cache.glob("*.so")) == {first, second, young}
    assert len(list(cache.glob("*.o"))) == EVERYTHING - 1, "all are linked into the second but the first's dispatch"

    aged(second, 31)
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.library() == second and time.time() - second.stat().st_mtime < 3600


def test_it_is_not_built_unless_asked(compiler):
    with pytest.raises(KernelError, match="not built yet"):
        build.library(build=False)
    assert compiler.count() == 0
    path = build.library()
    assert build.library(build=False) == path


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(KernelError, match="found linux on aarch64, the CPU kernels need Linux on x86-64"):
        build.library()


# --- the real library ------------------------------------------------------------------------------------------------


def run(script, **environment):
    """A Python process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in build.TIERS if name not in build.tiers()])
def test_the_compiler_takes_the_tiers_of_other_processors(name, cpu_ops, tmp_path):
    """To the object file: an assembler has the last word on instructions."""
    build._run(
        [*build._command(), *build._tier_flags(name), "-c", str(build.SOURCES / "tier.cpp"), "-o", str(tmp_path / "o")]
    )


def test_the_objects_of_tiers_share_no_function(cpu_ops, tmp_path):
    """The linker keeps one of several weak definitions: it could be that of an instruction set which is not there."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    path = build.library()
    for name in build.tiers():
        kept = build._object(path, tmp_path, "tier.cpp", build._tier_flags(name))
        symbols = subprocess.run([nm, "-C", "--defined-only", kept], capture_output=True, text=True, check=True).stdout
        found = [line[17:].split(maxsplit=1) for line in symbols.splitlines()]
        weak = [symbol for kind, symbol in found if kind in "WVu" and f"fp4fx::{name}::" not in symbol]
        assert [symbol for symbol in weak if not symbol.startswith("DW.ref.")] == [], name
        assert [symbol for kind, symbol in found if kind in "TDRBG"] == [f"fp4fx::tier_{name}"]


LOAD = """
import time, torch
from fp4fx.kernels.cpu import build, library
from tests.kernels import conftest  # the same tiers as the tests
"""


def test_a_warm_start_is_fast(cpu_ops):
    script = LOAD + "t = time.process_time(); assert library.load() is None; print(time.process_time() - t)"
    assert min(float(run(script)) for _ in range(2)) < 0.3


CALL = (
    LOAD
    + """
import os
assert library.load() is None
torch.set_num_threads(THREADS)
codes, scales = (torch.full((96, n), byte, dtype=torch.uint8) for n, byte in ((128, 0x21), (16, 56)))
x, g = torch.randn(64, 256), torch.tensor(1.0)  # all of it too small for torch to take more than one thread
def work():
    return torch.ops.fp4fx_cpu.linear(x, codes, scales, g, None, 256)
def tasks():
    return len(os.listdir("/proc/self/task"))
before = tasks()
"""
)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_those_of_torch(cpu_ops, threads):
    """A process that ran a kernel on n threads has n - 1 more than before."""
    started = run(CALL.replace("THREADS", str(threads)) + "work(); print(tasks() - before)")
    assert int(started) == threads - 1


def test_a_forked_child_runs_kernels_on_as_many_threads(cpu_ops):
    script = (
        CALL.replace("THREADS", "3")
        + """
expected = work()
child = os.fork()
if child == 0:
    alone = tasks()
    same = torch.equal(work(), expected) and torch.equal(work(), expected)
    os._exit(0 if same and alone == 1 and tasks() == 3 else 1)
deadline = time.time() + 60
done = (0, 0)
while done[0] == 0 and time.time() < deadline:
    time.sleep(0.02)
    done = os.waitpid(child, os.WNOHANG)
if done[0] == 0:
    os.kill(child, 9)
assert done == (child, 0), done
assert torch.equal(work(), expected)
"""
    )
    run(script)


QUANTIZE = """
import torch, torch._inductor.config, fp4fx
from fp4fx.kernels.cpu import library
model = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval()
q = fp4fx.quantize(model, fp4fx.Policy(skip_first=0, skip_last=0, min_numel=0))
x = torch.randn(3, 64)
"""


def test_without_the_kernels_a_model_compiles_all_the_same_and_the_report_says_why(tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\ncase "$*" in *csrc*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    script = (
        QUANTIZE
        + """
torch._inductor.config.cpp.cxx = (None, "g++")  # whose probes of g++ are in its cache
with torch.no_grad():
    torch.testing.assert_close(torch.compile(q, backend="fp4fx")(x), q(x), rtol=1e-5, atol=1e-5)
print(fp4fx.report(q))
"""
    )
    printed = run(script, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert "linear: inductor" in printed and "cpu: the C++ compiler failed, see" in printed


def test_without_a_compiler_a_quantized_model_runs(tmp_path):
    printed = run(QUANTIZE + "q(x); print(library.load())", CXX="/nonexistent/g++", XDG_CACHE_HOME=str(tmp_path))
    assert "no C++ compiler found: '/nonexistent/g++' is not there" in printed
