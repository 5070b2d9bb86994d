#!/usr/bin/env bash
# Evidence from a machine without network, one stage at a time, each within ten minutes:
#   scripts/gpu.sh STAGE OUTDIR [--wheels DIR] [--dry] [-- ARGUMENTS]
# STAGE: build         compile everything, table every kernel's registers
#        test          the whole test suite; notes which kernels ran
#        sanitize      compute-sanitizer's four tools over the ops' small cases
#        tune          measure backends and tiles for GoogLeNet and ResNet-50
#        bench-ops, bench-models, bench-train    time ops, inference, training steps
#        all           all of these, one after the other, whatever fails
# Writes OUTDIR/STAGE.log and one compact OUTDIR/STAGE.json, with what failed by name. Missing packages, nvidia-cutlass among them, come from DIR;
# ARGUMENTS go to the stage's command (pytest, or fused-cnn). Without a GPU the same stages run on the CPU; --dry runs each on a small piece.
set -euo pipefail

usage() { sed -n '3,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
stages=(build test sanitize tune bench-ops bench-models bench-train)
(($# >= 2)) || usage
stage=$1 outdir=$2
shift 2
wheels='' dry='' options=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(cd "${2:?--wheels needs a folder}" && pwd); options+=(--wheels "$wheels"); shift 2 ;;
    --dry) dry=1; options+=(--dry); shift ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
mkdir -p "$outdir"
outdir=$(cd "$outdir" && pwd)
cd "$(dirname "$0")/.."
if [[ $stage == all ]]; then
  worst=0
  for each in "${stages[@]}"; do
    bash scripts/gpu.sh "$each" "$outdir" "${options[@]}" || worst=$?
  done
  exit "$worst"
fi
[[ " ${stages[*]} " == *" $stage "* ]] || usage

export PYTHONPATH=$PWD
gpu=$(command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$' | sort -u | sed 's/^9\.0$/9.0a/' | paste -sd ';' || true)
if [[ -n $gpu && -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then # for the GPU at hand alone
  export TORCH_CUDA_ARCH_LIST=$gpu
fi
log=$outdir/$stage.log part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT
if [[ -n $dry ]]; then export FUSED_CNN_CACHE_DIR=$part/cache; fi # what a dry run measures decides nothing
start=$SECONDS

within() { # a stage has ten minutes, its start and its end included
  local left=$((540 - SECONDS + start))
  ((left > 0)) || return 124
  timeout --signal=INT --kill-after=15 "$left" "$@"
}
fused_cnn() { within python3 -m fused_cnn.cli "$@"; }
bench() {
  local small=(--minutes 8)
  [[ -z $dry ]] || small=(--seconds 0 --batch 2 --size 64 --model resnet18 --dtype float32)
  fused_cnn bench "$@" "${small[@]}" --out "$part/result.json"
}

sanitize() { # a line for each tool and backend: what it was, its exit code, its summary
  local tool backend code failed=0
  if [[ -n $gpu ]] && ! compute-sanitizer --error-exitcode 9 python3 -c 'import torch; torch.ones(1).cuda()' >"$part/out" 2>&1; then
    cat "$part/out"
    printf 'compute-sanitizer does not work here\t1\t%s\n' "$(grep -m 1 -iE 'error|not' "$part/out")" >>"$part/sanitize"
    return 1
  fi
  for backend in native triton; do
    [[ $backend == native || -n $gpu ]] || continue # Triton's interpreter launches no kernel to look at
    for tool in memcheck racecheck initcheck synccheck; do
      local run=(python3 scripts/small_cases.py --backend "$backend" ${dry:+--op add_relu})
      if [[ -n $gpu ]]; then run=(compute-sanitizer --tool "$tool" --error-exitcode 9 "${run[@]}"); fi
      code=0
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 within "${run[@]}" "$@" >"$part/out" 2>&1 || code=$?
      cat "$part/out"
      printf '%s %s\t%s\t%s\n' "$tool" "$backend" "$code" "$(grep -E 'ERROR SUMMARY|small_cases:' "$part/out" | tail -n 1)" >>"$part/sanitize"
      ((code == 0)) || failed=1
      [[ -n $gpu ]] || break # the same calls again would show nothing new
    done
  done
  return "$failed"
}

tune() {
  local model train failed=0
  for model in $([[ -n $dry ]] && echo resnet18 || echo googlenet resnet50); do
    for train in '' --train; do
      [[ -z $dry || -z $train ]] || continue
      local size=(--batch "$([[ -n $train ]] && echo 256 || echo 32)" --dtype bfloat16) # what the benchmarks run
      [[ -z $dry ]] || size=(--batch 1 --size 64)
      fused_cnn tune "$model" $train "${size[@]}" --out "$part/tune-$model$train.json" "$@" || failed=$?
    done
  done
  return "$failed"
}

run_stage() {
  echo "gpu.sh: ${gpu:-no GPU}, TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-not set}"
  if [[ -n $wheels ]]; then
    python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
  fi
  within python3 setup.py --quiet build_ext --inplace
  case $stage in
    build) within python3 scripts/compile_check.py --json "$part/result.json" ${dry:+--only cuda} "$@" ;;
    test) within python3 -m pytest -q -n auto --junit-xml "$part/junit.xml" --ran "$part/result.json" \
      ${dry:+tests/test_ops.py -k "test_forward and add_relu-native-resnet50"} "$@" ;;
    sanitize) sanitize "$@" ;;
    tune) tune "$@" ;;
    bench-ops) bench ops --seconds 0.2 ${dry:+--op add_relu} "$@" ;;
    bench-models) bench inference --seconds 3 ${gpu:+--autotune} "$@" ;;
    bench-train) bench training --seconds 5 ${gpu:+--compile} "$@" ;;
  esac
}

set +e # `|| rc=$?` would switch -e off inside the stage as well
(set -e; run_stage "$@") >"$log" 2>&1
rc=$?
set -e
python3 -m fused_cnn.cli info --json >"$part/info.json" 2>>"$log" || true
python3 scripts/stage_result.py "$part" "$outdir/$stage.json" "$stage" "$rc" $((SECONDS - start)) "$dry"
tail -n 3 "$log"
exit "$rc"
