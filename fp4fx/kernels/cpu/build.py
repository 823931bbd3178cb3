"""Compiles the CPU kernels with the machine's C++ compiler: once, into the user's cache, offline.

A library's name says what it was made from (sources, flags, torch, instruction sets, compiler), so a change of any of
them makes another one. Objects are kept under such names too: what has not changed is not compiled again. The time of a
file is that of its last use, and a build removes what was not used for a month.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fp4fx.errors import KernelError
from fp4fx.target import target_of

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
_AVX512 = _AVX2 | {flag: f"-m{flag}" for flag in ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
_BF16 = _AVX512 | {"avx512_bf16": "-mavx512bf16", "avx512_vnni": "-mavx512vnni", "avx512vbmi": "-mavx512vbmi"}
_AMX = _BF16 | {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}

TIERS: dict[str, dict[str, str]] = {
    "amx": _AMX,
    "avx512_bf16": _BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": {},
    "amx_emulated": _BF16,
}
"""Best first: what a tier needs of the processor (the names of /proc/cpuinfo), with the compiler's flag for it."""

extra_tiers: tuple[str, ...] = ()
"""Tiers to build besides those that calls choose from: `amx_emulated`, AMX tiles in plain C++, for tests."""

_COMMON = ("-fPIC", "-fvisibility=hidden", "-DNDEBUG")
_TIER = (*_COMMON, "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math")
_TORCH = (*_COMMON, "-std=c++20", "-O2", "-fopenmp")
_RETRY = 24 * 3600.0
"""Seconds after which a compiler that failed is tried again."""
_KEPT = 30 * 24 * 3600.0
"""Seconds after which a file of the cache that was not used is removed."""


def tiers() -> tuple[str, ...]:
    """The tiers that this processor can run, best first; `extra_tiers` last."""
    features = target_of(torch.device("cpu")).features
    wanted = [name for name in TIERS if name != "amx_emulated" or name in extra_tiers]
    return tuple(name for name in wanted if features.issuperset(TIERS[name]))


def library(*, build: bool = True) -> Path:
    """The shared library of the kernels; one that the cache does not have is built if `build` allows it.

    Raises:
        KernelError: this platform has no kernels, there is no compiler, or it failed; one line that says which.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelError(f"found {sys.platform} on {platform.machine()}, the CPU kernels need Linux on x86-64")
    compiler = _compiler()
    base = _digest(*_contents("*.h", "*.cpp"), torch.__version__, *(" ".join(_tier_flags(name)) for name in tiers()))
    cache = _cache()
    if compiler is None:  # there may have been one when the cache was filled
        built = sorted(cache.glob(f"{base}-*.so")) if cache is not None else []
        path = next((path for path in built if _used(path) and _intact(path)), None)
        if path is None:
            raise KernelError(f"no C++ compiler found: {_command()[0]!r} is not there; install g++ or set CXX")
        return path
    name = f"{base}-{_digest(*compiler)}.so"
    if cache is not None and _used(cache / name) and _intact(cache / name):
        return cache / name
    if not build:
        raise KernelError("the CPU kernels are not built yet")
    path = _writable(cache) / name
    try:
        with (path.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds the library
            if not _intact(path):
                _build(path)
                _prune(path.parent)
    except OSError as error:
        raise KernelError(f"the CPU kernels cannot be built in {path.parent}: {error}") from error
    return path


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fp4fx"
    except RuntimeError:  # no home
        return None


def _writable(cache: Path | None) -> Path:
    """The cache, or, where nothing can be written there, a folder of this process alone."""
    reason: object = "there is no home directory"
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache):
                return cache
        except OSError as error:
            reason = error
    folder = Path(tempfile.mkdtemp(prefix="fp4fx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("the CPU kernels are built for this process only: %s; set XDG_CACHE_HOME to keep them", reason)
    return folder


def _used(path: Path) -> bool:
    """Whether a file is there; its time becomes now, before anything else, so that no build removes it."""
    if not path.exists():
        return False
    with contextlib.suppress(OSError):  # somebody else's file, or a cache that cannot be written
        os.utime(path)
    return True


def _prune(cache: Path) -> None:
    """Remove what no process has used for long, and what builds that were killed left; under the lock.

    Whoever has loaded such a library keeps it: its memory outlives its name.
    """
    oldest = time.time() - _KEPT
    for path in (path for pattern in ("*.so", "*.o", "*.log", "build-*") for path in cache.glob(pattern)):
        with contextlib.suppress(OSError):  # somebody else's file
            if path.stat().st_mtime >= oldest:
                continue
            log.info("removing %s, which was not used for %.0f days", path, _KEPT / 86400)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _digest(*parts: str | bytes) -> str:
    """A name for what was made from these."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _contents(*patterns: str) -> list[bytes]:
    files = sorted(path for pattern in patterns for path in SOURCES.glob(pattern))
    return [part for path in files for part in (path.name.encode(), path.read_bytes())]


_SUM = 32
"""Bytes of the checksum that ends a library: loading one that was cut off would kill the process."""


def _intact(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return data[-_SUM:] == hashlib.blake2b(data[:-_SUM], digest_size=_SUM).digest()


# --- the compiler -----------------------------------------------------------------------------------------------------


def _command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _compiler() -> tuple[str, ...] | None:
    """What tells one compiler from another: its command, the file it is, its version."""
    command = _command()
    found = shutil.which(command[0])
    if found is None:
        return None
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return (*command, found, run.stdout) if run.returncode == 0 else None


def _tier_flags(name: str) -> tuple[str, ...]:
    emulated = ("-DFP4FX_EMULATE_AMX",) if name == "amx_emulated" else ()
    return (*_TIER, f"-DFP4FX_TIER={name}", *emulated, *TIERS[name].values())


def _dispatch_flags(names: Sequence[str]) -> tuple[str, ...]:
    every = " ".join(f"X({name})" for name in names)
    return (*_TIER, f"-DFP4FX_TIERS(X)={every}")


def _torch_flags() -> tuple[str, ...]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return (*_TORCH, abi, "-isystem", str(Path(torch.__file__).parent / "include"))


def _link_flags() -> tuple[str, ...]:
    """Of torch's own OpenMP where it brings one: a second would have threads of its own."""
    folder = Path(torch.__file__).parent / "lib"
    openmp = [str(path) for path in sorted(folder.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    return ("-shared", f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10", *openmp)


def _build(path: Path) -> None:
    """Compile what is not there as an object yet, link, and put the library where it belongs in one step."""
    failed = path.with_suffix(".log")
    if failed.exists() and time.time() - failed.stat().st_mtime < _RETRY:
        raise KernelError(f"the C++ compiler failed before, see {failed}; delete that file to try again")
    names = tiers()
    log.info("building the CPU kernels (%s), once, less than a minute", ", ".join(names))
    started = time.perf_counter()
    jobs: list[tuple[str, tuple[str, ...]]] = [
        ("binding.cpp", _torch_flags()),
        *(("tier.cpp", _tier_flags(name)) for name in names),
        ("dispatch.cpp", _dispatch_flags(names)),
    ]
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            objects = list(pool.map(lambda job: _object(path, Path(work), *job), jobs))
            linked = Path(work) / "linked.so"
            _run([*_command(), *map(str, objects), *_link_flags(), "-o", str(linked)])
            with linked.open("ab") as file:
                file.write(hashlib.blake2b(linked.read_bytes(), digest_size=_SUM).digest())
            linked.replace(path)
    except _FailedError as error:
        failed.write_text(str(error))
        raise KernelError(f"the C++ compiler failed, see {failed}; install another, name it in CXX") from error
    log.info("built the CPU kernels in %.0f s: %s", time.perf_counter() - started, path)


class _FailedError(Exception):
    """A command failed; the message is the command and what it printed."""


def _object(path: Path, work: Path, source: str, flags: Sequence[str]) -> Path:
    """The object of one source file, of the cache or new. Only tier.cpp includes more than api.h."""
    used = _contents(source, "*.h" if source == "tier.cpp" else "api.h")
    compiler = path.stem.partition("-")[2]
    kept = path.parent / f"{Path(source).stem}-{_digest(*used, *flags, torch.__version__, compiler)}.o"
    if not _used(kept):
        new = work / kept.name
        _run([*_command(), *flags, "-c", str(SOURCES / source), "-o", str(new)])
        new.replace(kept)
    return kept


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (g++ or the user's $CXX)
    if run.returncode:
        raise _FailedError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")
