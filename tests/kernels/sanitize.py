"""`make sanitize`: the CPU kernels under AddressSanitizer and UBSan, at every instruction set of this machine."""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp4fx.kernels.cpu import build

FLAGS = (
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wno-psabi",
)
DRIVER = Path(__file__).with_suffix(".cpp")


def main() -> int:
    """Compile the tiers, dispatch.cpp and the driver, and run; returns what the driver returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tiers", nargs="*", help="all that this machine can run, if none is given")
    build.extra_tiers = ("amx_emulated",)
    names = parser.parse_args().tiers or build.tiers()
    sources = build.SOURCES
    jobs = [
        *((sources / "tier.cpp", build._tier_flags(name), f"{name}.o") for name in names),
        (sources / "dispatch.cpp", build._dispatch_flags(names), "dispatch.o"),
        (DRIVER, ("-std=c++17", "-Wall", "-Wextra", f"-I{sources}"), "driver.o"),
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def run(job) -> str:
            source, flags, name = job
            out = str(Path(folder) / name)
            subprocess.run([*build._command(), *flags, *FLAGS, "-c", str(source), "-o", out], check=True)
            return out

        objects = list(pool.map(run, jobs))
        program = str(Path(folder) / "sanitize")
        subprocess.run([*build._command(), *FLAGS, *objects, "-o", program], check=True)
        return subprocess.run([program], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
