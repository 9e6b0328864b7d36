"""The evaluate stage: each iteration's policy on held-out rows and benchmarks."""

from sparring.stages.evaluate.harness import benchmark
from sparring.stages.evaluate.held_out import evaluate
from sparring.stages.evaluate.mt_bench import answer_questions

__all__ = ["answer_questions", "benchmark", "evaluate"]
