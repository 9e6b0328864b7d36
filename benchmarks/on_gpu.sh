#!/bin/sh
# Shows everything that needs a GPU in one call of at most 9 minutes. Prints one line of JSON per part as it goes:
#
#     benchmarks/on_gpu.sh > benchmarks/results/on_gpu.jsonl
#     benchmarks/on_gpu.sh --tiny                               small sizes on a CPU, to test the script
#     benchmarks/on_gpu.sh --part layouts                       one part, without a time limit
#
# In this order: play() of a 0.6B-shaped model, in full and with LoRA; FSDP2 on one rank; kernels and layouts against
# float32; steps of 0.6B and 3B against the matrix peak and TRL; the head against Liger, cut-cross-entropy and torch; a
# run that is killed and continued. Each part is a process with its own time limit, so that none costs the others.
# Needs sparring's dependencies and, for the fast paths, Triton and a C compiler; no network. Missing packages may be in
# a folder next to this script: pip install --no-deps --target carried NAME.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../src:$here/carried${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$here/on_gpu.py" "$@"
