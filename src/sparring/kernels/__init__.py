"""From hidden states to log-probs of tokens. `reference.py` is the specification, `chunked.py` what runs."""

from sparring.kernels.chunked import linear_logprob

__all__ = ["linear_logprob"]
