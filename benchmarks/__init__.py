"""Measurements of fp4fx beside its peers: `benchmarks.ops`, `benchmarks.models`, `benchmarks.accuracy`.

`benchmarks.plot` draws the first two, the last one draws itself.

Several thread pools share the cores. An OpenMP pool that spins for long after its work takes a core from the next
candidate, so it gives up after about 0.1 ms; libgomp reads that when torch is loaded, hence it is set here.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")
