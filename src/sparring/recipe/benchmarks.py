"""Benchmark names of lm-evaluation-harness in a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SUITES: Mapping[str, tuple[str, ...]] = {
    # T-SPIN (2601.08198), Table 1: ten tasks with their shots; leaderboard_* have the metrics that it reports
    "tspin": (
        *("gsm8k:5", "leaderboard_math_hard:4", "leaderboard_musr:0", "mmlu:5", "leaderboard_mmlu_pro:5"),
        *("leaderboard_gpqa:0", "hellaswag:10", "winogrande:5", "leaderboard_bbh:3", "ifeval:0"),
    ),
    # SPIN (2401.01335): the first Open LLM Leaderboard
    "spin": ("arc_challenge:25", "truthfulqa_mc2:0", "winogrande:5", "gsm8k:5", "hellaswag:10", "mmlu:5"),
}


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness: its name or a YAML file, and its shots (None: the task's default)."""

    name: str
    num_shots: int | None

    @property
    def label(self) -> str:
        stem = Path(self.name).stem if self.name.endswith((".yaml", ".yml")) else self.name
        return stem if self.num_shots is None else f"{stem}-{self.num_shots}shot"


def parse_tasks(words: Sequence[str]) -> list[Task]:
    found = []
    for word in (w for each in words for w in SUITES.get(each, (each,))):
        name, colon, shots = word.rpartition(":")
        found.append(Task(name, int(shots)) if colon and shots.isdecimal() else Task(word, None))
    return found
