#!/usr/bin/env bash
# All that is measured on a Hopper GPU, written to kernels_pallas/results/<device>/ (or $OUT): needs an environment with
# ".[cuda]", and beside transformers ".[parity]" too, with a torch for CUDA. PYTHON names its interpreter. 80 GB are enough.
#   check_device.json    every kernel against its float32 oracle, forward and backward
#   bench.json, .png     times against the roofline, cuDNN's attention and dense products of the same FLOPs
#   model.jsonl          a training step of two and of four layers of Lite: two blocks are the difference; decoding; and
#                        transformers at the same shapes, where it is installed
# Exit code 1: a part failed; the others were still run. Gone through on a CPU:
#   SHAPES=small PRESET=tiny BATCH=1 SEQ=64 OUT=runs/gone kernels_pallas/on_gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} PYTHONPATH=$PWD
out=${OUT:-$("$python" -c 'from kernels_pallas import measuring; print(measuring.results_folder())')} || exit 1
mkdir -p "$out"
failed=0
run() { # run COMMAND...: says so where it fails, and goes on
    echo "==== $*" >&2
    "$@" || { failed=1; echo "==== FAILED: $*" >&2; return 1; }
}
lines() { # lines COMMAND...: the same; what it prints is added to model.jsonl
    run "$@" | tee -a "$out/model.jsonl"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}

shapes=${SHAPES:-full}
run "$python" -m kernels_pallas.check_device --shapes="$shapes" --out="$out"
run "$python" -m kernels_pallas.bench --shapes="$shapes" --out="$out"
: >"$out/model.jsonl"
step="train --preset=${PRESET:-v2_lite} --batch=${BATCH:-4} --seq=${SEQ:-4096} --dtype=bfloat16"
decoding="decode --preset=${PRESET:-v2_lite} --batch=${BATCH:-16} --prompt=64 --new=128 --dtype=bfloat16"
peer=0
"$python" -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null && peer=1
for layers in 2 4; do
    lines "$python" experiments/benchmark.py $step --layers=$layers
    ((peer)) && lines "$python" tests/parity/peer_benchmark.py $step --layers=$layers --device=cuda
done
lines "$python" experiments/benchmark.py $decoding --layers=4
((peer)) && lines "$python" tests/parity/peer_benchmark.py $decoding --layers=4 --device=cuda
((peer)) || echo "==== torch sees no GPU here, or transformers is not installed: nothing was timed beside them" >&2
exit $failed
