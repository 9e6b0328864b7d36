"""The evaluate stage: what each iteration's policy has become, on rows that it never trained on."""

from sparring.evaluate.held_out import evaluate

__all__ = ["evaluate"]
