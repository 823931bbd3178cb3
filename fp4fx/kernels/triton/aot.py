"""Compiles every kernel, in every configuration of the tuning table, for GPUs that need not be there.

`python -m fp4fx.kernels.triton.aot --targets 80,90,100,120` asks each module of this package for its `variants()`,
compiles them for the targets that they claim, and prints what came of it: registers, stack, shared memory, the matrix
instruction. It ends with 1 if a register spills, shared memory does not fit, the matrix instruction is missing, another
is there that changes promised bits, or a variant does not compile where it says it does; what this Triton is too old
for is a row with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4fx.kernels.triton.variant import Variant

TARGETS = (80, 90, 100, 120)
"""What variants claim. Another target is taken for the nearest of these below it."""

SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have, by target."""

_PROCESSES = 2
_PACKAGE = "fp4fx.kernels.triton"
_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]+")
_RESOURCES = re.compile(r"\b(REG|STACK):(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one variant for one target."""

    module: str
    """Without the package."""
    variant: str
    target: int
    problems: tuple[str, ...] = ()
    """Why the command fails; empty if all is well."""
    skipped: str | None = None
    """Why it was not compiled, though nothing is wrong."""
    registers: int | None = None
    stack: int | None = None
    """Bytes a thread; a spill is some of them."""
    spilled: int | None = None
    """Bytes stored by spills."""
    shared: int | None = None
    """Bytes of shared memory."""
    matrix: tuple[str, ...] = ()
    """The matrix instructions in the PTX."""


@dataclass(frozen=True)
class Job:
    """One variant for one target, by names that another process can look up."""

    module: str
    variant: str
    target: int

    def row(self, **found: Any) -> Row:
        """Its row."""
        return Row(module=self.module.removeprefix(f"{_PACKAGE}."), variant=self.variant, target=self.target, **found)


@dataclass
class Plan:
    """What is to be compiled, and the rows that need no compiling."""

    jobs: list[Job] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def kernel_modules() -> tuple[str, ...]:
    """The modules of this package that have `variants`."""
    package = importlib.import_module(_PACKAGE)
    names = (f"{_PACKAGE}.{module.name}" for module in pkgutil.iter_modules(package.__path__) if module.name != "aot")
    return tuple(name for name in names if hasattr(importlib.import_module(name), "variants"))


@functools.cache
def variants_of(module: str) -> Mapping[str, Variant]:
    """The variants of a module by name; one that is there twice counts once.

    Raises:
        ValueError: two that differ have the same name.
    """
    found: dict[str, Variant] = {}
    for variant in importlib.import_module(module).variants():
        if found.setdefault(variant.name, variant) != variant:
            raise ValueError(f"{module}: two different variants are called {variant.name!r}")
    return found


def plan(modules: Iterable[str], targets: Sequence[int], only: str = "") -> Plan:
    """Each variant whose "module.name" has the text in it, for each of the targets that it claims."""
    planned = Plan()
    for module in modules:
        try:
            variants = variants_of(module)
        except Exception as error:  # noqa: BLE001  (one module that cannot say what it has must not hide the others)
            job = Job(module, "variants()", targets[0])
            planned.rows.append(job.row(problems=(_reason(error),)))
            continue
        for variant in variants.values():
            for target in targets if only in f"{module}.{variant.name}" else ():
                job, since = Job(module, variant.name, target), variant.since.get(claimed(target))
                if claimed(target) not in variant.targets:
                    continue
                if since is None or _release(triton.__version__) >= _release(since):
                    planned.jobs.append(job)
                else:
                    reason = f"needs triton {since}, this is {triton.__version__}"
                    planned.rows.append(job.row(skipped=reason))
    return planned


def claimed(target: int) -> int:
    """The target of `TARGETS` whose variants run on this one."""
    return max((known for known in TARGETS if known <= target), default=TARGETS[0])


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


# --- one compilation --------------------------------------------------------------------------------------------------


def check(job: Job) -> Row:
    """Compile one variant for one target and hold it against what it claims."""
    variant = variants_of(job.module)[job.variant]
    try:
        compiled, _ = compile_variant(variant, job.target)
    except Exception as error:  # noqa: BLE001  (whatever the compiler raises is the problem of this row)
        return job.row(problems=(f"does not compile: {_reason(error)}",))
    ptx, shared = compiled.asm["ptx"], int(compiled.metadata.shared)
    registers, stack = _resources(compiled.asm["cubin"])
    spilled = _spilled(variant, job.target) if stack else 0
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > SHARED[job.target] << 10:
        problems.append(f"{shared / 1024:.0f} KiB of shared memory, the target has {SHARED[job.target]}")
    wanted = variant.matrix.get(claimed(job.target))
    if wanted is not None and not any(all(word in line for word in wanted.split()) for line in ptx.splitlines()):
        problems.append(f"no {wanted} in the PTX")
    problems += [f"{word} in the PTX" for word in variant.absent if word in ptx]
    return job.row(
        problems=tuple(problems),
        registers=registers,
        stack=stack,
        spilled=spilled,
        shared=shared,
        matrix=matrix_instructions(ptx),
    )


def compile_variant(variant: Variant, target: int) -> tuple[Any, str]:
    """The compiled kernel, with `asm["ptx"]`, `asm["cubin"]` and `metadata`; and what was printed on the way.

    Raises:
        ValueError: the signature is not the kernel's.
    """
    names = list(variant.kernel.arg_names)
    if list(variant.signature) != names:
        raise ValueError(f"the kernel's arguments are {names}, the signature's {list(variant.signature)}")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled, printed.getvalue()


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  (Triton's own)
    found = dict(_RESOURCES.findall(text.stdout))
    return int(found["REG"]), int(found["STACK"])


def _spilled(variant: Variant, target: int) -> int:
    """Bytes that spills store, as the assembler says; a stack may also be what the program asked for."""
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        _, log = compile_variant(variant, target)
    return max(int(stores) for stores in _SPILLS.findall(log))


def matrix_instructions(ptx: str) -> tuple[str, ...]:
    """Those in the PTX in short: "wgmma m64n64k16 bf16 RS", "tcgen05 mxf4nvf4 block_scale", "mma.sync m16n8k16 f16".

    RS and SS say whether the left side of a wgmma is in registers or in shared memory.
    """
    found: dict[str, None] = {}
    for line in ptx.splitlines():
        for match in _MATRIX.finditer(line):
            name = match.group()
            words = [name.split(".", 1)[0] if name[0] != "m" else "mma.sync"]
            words += re.findall(r"m\d+n\d+k\d+", name) + re.findall(r"kind::(\w+)", name)
            words += re.findall(r"block_scale", name)
            if "kind" not in name:
                words += re.findall(r"\.(bf16|f16|tf32|e4m3|e5m2|s8|u8)\b", name)[:1]
            if name.startswith("wgmma"):
                words.append("RS" if re.search(r"\}\s*,\s*\{", line[match.end() :]) else "SS")
            found[" ".join(words)] = None
    return tuple(found)


def _reason(error: BaseException) -> str:
    """The line of an error that says most: Triton's begin with the place in the source, ptxas's with a heading."""
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "unsupported" in line.lower()]
    line = (telling or lines[-1:] or [""])[-1]
    return f"{type(error).__name__}: {line}"[:200]


# --- many -------------------------------------------------------------------------------------------------------------


def compile_all(jobs: Sequence[Job], processes: int = _PROCESSES) -> Iterator[Row]:
    """The rows of the jobs, in their order; a job that takes the compiler's process down is a row as well."""
    pending: list[tuple[Job, Future[Row]]] = []
    with _pool(min(processes, _PROCESSES)) as (pool, _):
        with contextlib.suppress(BrokenProcessPool):
            pending.extend((job, pool.submit(check, job)) for job in jobs)
        for job, future in tqdm(pending, desc="compiling", unit="kernel", disable=None, leave=False):
            try:
                yield future.result()
            except BrokenProcessPool:  # of this job, or of one beside it
                yield _alone(job)
    for job in jobs[len(pending) :]:
        yield _alone(job)


def _alone(job: Job) -> Row:
    with _pool(1) as (pool, log):
        try:
            return pool.submit(check, job).result()
        except BrokenProcessPool:
            words = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if "ERROR" in line]
            return job.row(problems=(f"the compiler's process died: {(words or ['without a word'])[0]}"[:200],))


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[tuple[ProcessPoolExecutor, Path]]:
    """Processes and the file of what they say: with an error the compiler prints the whole kernel."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_write_to, initargs=(log,)) as pool:
            yield pool, log


def _write_to(log: Path) -> None:
    """Let standard error of this process be that file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)


# --- the command ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """What was compiled, and below it what was not, with the reason."""
    lines = [
        (
            f"{row.module}.{row.variant}",
            row.target,
            row.registers,
            row.stack,
            row.spilled,
            None if row.shared is None else row.shared / 1024,
            ", ".join(row.matrix) or "-",
            "; ".join(row.problems) or "ok",
        )
        for row in rows
        if row.skipped is None
    ]
    heads = ("variant", "sm", "registers", "stack B", "spilled B", "shared KiB", "matrix instruction", "")
    text = str(tabulate(lines, heads, floatfmt=".1f", missingval="-"))
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.skipped is not None:
            skipped.setdefault((f"{row.module}.{row.variant}", row.skipped), []).append(str(row.target))
    if skipped:
        missing = [(name, " ".join(targets), reason) for (name, reason), targets in skipped.items()]
        text += "\n\nnot compiled\n\n" + str(tabulate(missing, ("variant", "sm", "reason"), disable_numparse=True))
    return text


def verdict(rows: Sequence[Row]) -> str:
    """One line."""
    compiled = [row for row in rows if row.skipped is None]
    bad = sum(bool(row.problems) for row in compiled)
    stacked = sum(bool(row.stack) and not row.spilled for row in compiled)
    text = f"triton {triton.__version__}: {len(compiled) - bad} of {len(compiled)} compilations are as claimed"
    return text + (f"; {stacked} have a stack without a spill" if stacked else "")


def _write(path: Path, rows: Sequence[Row]) -> None:
    """One row a line, without what is not known of it."""
    given = ({name: value for name, value in asdict(row).items() if value is not None} for row in rows)
    facts = {"triton": triton.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime()), "verdict": verdict(rows)}
    lines = ",\n  ".join(map(json.dumps, given))
    path.write_text(f'{json.dumps(facts, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100,120", metavar="N,N", help="compute capabilities times 10")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose module.name has this in it")
    parser.add_argument("--modules", nargs="*", metavar="MODULE", help="with `variants()`; default: this package's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    given = parser.parse_args(arguments)
    targets = [int(text) for text in given.targets.split(",") if text.strip().isdigit()]
    if not targets or len(targets) != len(given.targets.split(",")) or not set(targets) <= set(SHARED):
        parser.error(f"--targets {given.targets}: expected some of {', '.join(map(str, SHARED))}")
    if triton.knobs.runtime.interpret:
        parser.error("the kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    start = time.perf_counter()
    planned = plan(given.modules or kernel_modules(), targets, given.only)
    if not planned.jobs and not planned.rows:
        parser.error("no kernel has a variant of that name" if given.only else "no module has variants")
    rows = [*compile_all(planned.jobs), *planned.rows]
    print(table(rows))
    print(f"\n{verdict(rows)}; {time.perf_counter() - start:.0f} s")
    if given.json is not None:
        _write(given.json, rows)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
