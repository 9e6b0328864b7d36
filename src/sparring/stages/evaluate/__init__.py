"""The evaluate stage: what each iteration's policy has become, on rows that it never trained on."""

from sparring.stages.evaluate.harness import benchmark
from sparring.stages.evaluate.held_out import evaluate
from sparring.stages.evaluate.mt_bench import answer_questions

__all__ = ["answer_questions", "benchmark", "evaluate"]
