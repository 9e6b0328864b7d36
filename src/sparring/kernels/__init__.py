"""From hidden states to log-probs of tokens. `reference.py` is the specification."""

from sparring.kernels.reference import linear_logprob

__all__ = ["linear_logprob"]
