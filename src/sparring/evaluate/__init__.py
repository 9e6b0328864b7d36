"""The evaluate stage: what each iteration's policy has become, on rows that it never trained on."""

from sparring.evaluate.harness import benchmark
from sparring.evaluate.held_out import evaluate
from sparring.evaluate.mt_bench import answer_questions

__all__ = ["answer_questions", "benchmark", "evaluate"]
