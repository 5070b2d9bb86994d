#!/usr/bin/env bash
# Evidence from a machine without network, one stage at a time:
#   scripts/gpu.sh STAGE OUTDIR [--wheels DIR] [-- ARGUMENTS]
# STAGE is build (compile everything, table every kernel's registers), test (the test suite), or bench-ops (time every op).
# Writes OUTDIR/STAGE.log and one compact OUTDIR/STAGE.json. Missing packages, nvidia-cutlass among them, come from DIR; ARGUMENTS go to the
# stage's command (pytest, or fused-cnn bench). On a machine without a GPU the same stages run on the CPU.
set -euo pipefail

usage() { sed -n '3,3s/^# *//p' "$0" >&2; exit 2; }
(($# >= 2)) || usage
stage=$1 outdir=$2
shift 2
wheels=
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
[[ $stage == build || $stage == test || $stage == bench-ops ]] || usage

mkdir -p "$outdir"
outdir=$(cd "$outdir" && pwd)
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]] && command -v nvidia-smi >/dev/null; then # for the GPU at hand alone: a stage has ten minutes
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | sed 's/^9\.0$/9.0a/' | paste -sd ';')
  export TORCH_CUDA_ARCH_LIST
fi
log=$outdir/$stage.log
part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT

run_stage() {
  if [[ -n $wheels ]]; then
    python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
  fi
  python3 setup.py --quiet build_ext --inplace
  case $stage in
    build) python3 scripts/compile_check.py --json "$part/result.json" ;;
    test) python3 -m pytest -q -n auto --junit-xml "$part/junit.xml" "$@" ;;
    bench-ops) python3 -m fused_cnn.cli bench ops --seconds 0.3 --out "$part/result.json" "$@" ;;
  esac
}

start=$SECONDS
set +e # `|| rc=$?` would switch -e off inside the stage as well
(set -e; run_stage "$@") >"$log" 2>&1
rc=$?
set -e
python3 -m fused_cnn.cli info --json >"$part/info.json" 2>>"$log" || true
python3 - "$part" "$outdir/$stage.json" "$stage" "$rc" $((SECONDS - start)) <<'EOF'
import json, pathlib, sys
import xml.etree.ElementTree as xml

part, target, stage, rc, seconds = pathlib.Path(sys.argv[1]), *sys.argv[2:]
found = {"stage": stage, "exit_code": int(rc), "seconds": int(seconds)}
for name in ("info", "result"):
    file = part / f"{name}.json"
    if file.exists() and file.stat().st_size:
        found[name] = json.loads(file.read_text())
if (part / "junit.xml").exists():
    suite = xml.parse(part / "junit.xml").getroot()[0]
    found["result"] = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = [c for c in suite if c.find("failure") is not None or c.find("error") is not None]
    found["result"]["failed"] = [f"{c.get('classname')}::{c.get('name')}" for c in failed][:200]
pathlib.Path(target).write_text(json.dumps(found, separators=(",", ":")) + "\n")
EOF
tail -n 3 "$log"
echo "gpu.sh: $stage exit code $rc, $outdir/$stage.json"
exit "$rc"
