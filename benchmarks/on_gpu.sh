#!/bin/sh
# Everything that needs a GPU, in one call of at most 8 minutes, as one line of JSON:
#
#     benchmarks/on_gpu.sh > benchmarks/results/on_gpu.json
#     benchmarks/on_gpu.sh --tiny                               the same on a CPU within seconds, to check the script
#
# The kernels against their specification and against libraries that are installed, packed rows against padded ones,
# throughput, share of the measured matrix peak and memory of training steps at 1, 3 and 8 billion parameters.
# Needs torch 2.11 or newer, transformers 5.17 or newer, accelerate, jaxtyping, annotated-types, rich, xxhash and, for the
# fast paths, Triton; no network. What is missing may lie beside this script: pip install --no-deps --target carried NAME.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../src:$here/carried${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$here/on_gpu.py" "$@"
