#!/bin/sh
# Tunes an engine on this GPU, and measures it: sh tests/gpu/tune_check.sh REGISTRY REF [SECONDS]
#
# REGISTRY has the engine REF of the cuda compiler (with or without a checkpoint: no weight is read). Needs what serving needs, and
# triton. Leaves tuned.yaml (the section), tune.json (every figure) in ${OUT:-.}. Exit status 1 if a variant gave other results than
# the default kernel, or if nothing was measured.
set -eu
cd "$(dirname "$0")/../.."
registry=$1 ref=$2 seconds=${3:-300} out=${OUT:-.}
export PYTHONPATH="$PWD/tests/gpu/bare:$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
begun=$(date +%s)
"$python" -m zoo.cli tune "$ref" --registry "$registry" --seconds "$seconds" --write "$out/tuned.yaml" --json > "$out/tune.json"
echo "tuned in $(($(date +%s) - begun)) s"
"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

data = json.loads((Path(sys.argv[1]) / "tune.json").read_text())
print(f"{data['ref']} on {data['gpu']}")
for row in data["rows"]:
    beside = f"cuBLASLt {row['cublas_us']:8.2f}" if row["cublas_us"] else ""
    print(f"{row['what']:34} {row['load']:18} {row['us']:9.2f} us {row['tb_per_s']:6.2f} TB/s {row['tflop_per_s']:7.1f} TFLOP/s "
          f"default {row['default_us']:9.2f} {beside} of {row['tried']:3}: {row['best']}")
print("left out:", data["left_out"] or "nothing")
for what, why in data["wrong"].items():
    print("WRONG", what, why[:160])
if (Path(sys.argv[1]) / "tuned.yaml").exists():
    print((Path(sys.argv[1]) / "tuned.yaml").read_text())
sys.exit(bool(data["wrong"]) or not data["rows"])
PYTHON
