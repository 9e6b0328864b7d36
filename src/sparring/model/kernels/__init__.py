"""Log-probs of tokens from hidden states. `reference.py` is the specification. `chunked.py` runs: torch's matrix
products in chunks, and between them `rows.py`, or `triton.py` on a GPU."""

from sparring.model.kernels.chunked import linear_logprob, linear_topk

__all__ = ["linear_logprob", "linear_topk"]
