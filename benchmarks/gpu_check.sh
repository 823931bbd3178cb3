#!/usr/bin/env bash
# What there is to find out about fp4fx on a GPU, in less than 8 minutes and without a network: see gpu_check.py.
# Needs Python >= 3.11 with torch >= 2.11, triton >= 3.6 and fp4fx's other requirements; `--dry` needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" - <<'EOF'
import importlib.util
import sys

needed = ("torch", "triton", "numpy", "safetensors", "tabulate", "tqdm")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11) or missing:
    sys.exit(f"gpu_check: Python {sys.version.split()[0]}, not installed: {', '.join(missing) or 'nothing'}; "
             f"needs Python 3.11 or newer with {', '.join(needed)}")
EOF
exec "$python" -m benchmarks.gpu_check "$@"
