#!/bin/sh
# Measures everything that needs a GPU, in at most 8 minutes, and prints one line of JSON:
#
#     benchmarks/on_gpu.sh > benchmarks/results/on_gpu.json
#     benchmarks/on_gpu.sh --tiny                               small sizes on a CPU, in seconds, to test the script
#
# Compares the kernels with their specification and with installed libraries, and packed rows with padded ones. Measures
# throughput, share of the matrix peak and memory of training steps at 1, 3 and 8 billion parameters.
# Needs torch 2.11, transformers 5.17, accelerate, jaxtyping, annotated-types, rich, xxhash and, for the fast paths,
# Triton; no network. Missing packages may be in a folder next to this script: pip install --no-deps --target carried NAME.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../src:$here/carried${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$here/on_gpu.py" "$@"
