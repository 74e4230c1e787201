#!/usr/bin/env bash
# What one GPU can show in eight minutes: benchmarks/gpu.sh [FOLDER OF THE FOUR MNIST FILES] [FOLDER FOR THE RESULTS]
#
# The folder of data may also be in NL_DATA; without one, the 5,000 digits of the sample are used. Each part writes
# its result as soon as it is there, and has a time of its own, 470 s in all. A rehearsal with tiny sizes on a
# machine without a GPU: NL_DEVICE=cpu benchmarks/gpu.sh
set -uo pipefail
data=${1:-${NL_DATA:-}} out=${2:-runs/gpu} device=${NL_DEVICE:-cuda} python=${PYTHON:-python}
if [ -n "$data" ]; then
    [ -d "$data" ] || { echo "gpu.sh: there is no folder of data $data" >&2; exit 2; }
    data=$(cd "$data" && pwd)
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} MPLBACKEND=agg PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" - "$device" <<'PY' | tee "$out/machine.txt"
import sys
try: import torch
except ImportError: sys.exit("gpu.sh: PyTorch is not installed for this Python")
if sys.argv[1] == "cuda" and not torch.cuda.is_available(): sys.exit(
    f"gpu.sh: PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "a rehearsal on the CPU"
print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
PY
[ "${PIPESTATUS[0]}" = 0 ] || exit 2

part() { # name, seconds, command: what it says goes to a file of its name, how it went to summary.txt
    local name=$1 limit=$2 start=$SECONDS code; shift 2
    timeout -k 5 "$limit" "$@" > "$out/$name.txt" 2>&1; code=$?
    case $code in 0) how=ok;; 124|137) how="stopped after $limit s";; *) how="failed (exit code $code)";; esac
    echo "$name: $how, $((SECONDS - start)) s; $out/$name.txt" | tee -a "$out/summary.txt"
    tail -n 12 "$out/$name.txt"
}
: > "$out/summary.txt"
digits=(); [ -z "$data" ] || digits=(--data-dir "$data")
bench=("$python" -m newton_losses_nb.lab.cli)
if [ "$device" = cuda ]; then
    precision=tf32 sort=(--network cnn --steps 400 --eval-every 200) step=()
    path=(--network resnet18 --epochs 2 --train 1400 --valid 200 --test 200 --batch 70)
else # the rehearsal
    precision=float32 sort=(--network cnn --steps 2 --eval-every 2 --eval-sets 5 --batch 2) step=(--steps 1 --batch 2)
    path=(--network small --epochs 1 --train 20 --valid 5 --test 5 --batch 10)
fi

[ "$device" != cuda ] || part capture 70 "$python" benchmarks/capture.py
part tests 120 "$python" -m pytest -v -n 0 -p no:cacheprovider tests/test_experiment.py tests/test_notebooks.py \
    -k "captured or notebook and (lab/03_experiment or lab/05_tasks)"
part step 120 "$python" benchmarks/step.py --device "$device" "${digits[@]}" "${step[@]}" --out "$out/step.jsonl"
part sorting 90 "${bench[@]}" sorting --engine together --device "$device" --precision "$precision" \
    --relaxations neural_sort,cauchy --methods none,fisher,whiten,clip,rms --seeds 2 "${sort[@]}" "${digits[@]}" --out "$out/sorting"
part paths 70 "${bench[@]}" paths --engine together --device "$device" --precision "$precision" \
    --losses fenchel_young,relaxed_bf --methods none,fisher,clip --seeds 2 "${path[@]}" --out "$out/paths"
cat "$out/summary.txt"
! grep -q "failed" "$out/summary.txt"
