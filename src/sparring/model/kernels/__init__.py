"""From hidden states to log-probs of tokens. `reference.py` is the specification, `chunked.py` what runs: products of
torch's, and between them `rows.py`, or `triton.py` on a GPU."""

from sparring.model.kernels.chunked import linear_logprob

__all__ = ["linear_logprob"]
