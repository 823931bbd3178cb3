"""Ahead-of-time compilation in a process of its own: one that interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("fp4fx.kernels.triton." + sys.argv[1])
variants = {v.name: v for v in module.variants()}
assert len(variants) == len(list(module.variants())), "a name twice"
for name in sys.argv[2:]:
    v = variants[name]
    attrs = {(list(v.signature).index(a),): [["tt.divisibility", 16]] for a in v.aligned}
    for target in (v.targets[0], v.targets[-1]):
        source = ASTSource(v.kernel, dict(v.signature), dict(v.constants), attrs)
        options = {"num_warps": v.num_warps, "num_stages": v.num_stages, **v.options}
        ptx = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
        assert not [word for word in (".local", ".ftz", *v.absent) if word in ptx], (name, target)
"""


def compile_variants(module, names):
    """Compile variants of a module by their names, for the oldest and the newest target that they are for."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(Path.cwd()), env.get("PYTHONPATH"))))
    command = [sys.executable, "-c", _PROGRAM, module, *names]
    done = subprocess.run(command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
