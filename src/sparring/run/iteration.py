"""What a stage gets: the run, the settings and the iteration. Everything below a stage takes plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from sparring.data.tables import read_rendered
from sparring.recipe.benchmarks import Task
from sparring.recipe.schema import Recipe
from sparring.run.manifest import is_committed, verified, write_json
from sparring.run.rundir import BENCHMARKS, STAGES, RunDir
from sparring.types import Rendered


@dataclass(frozen=True)
class DataSummary:
    """What the data stage found, and the token contract that all later stages keep."""

    model: str  # folder of the starting model, at its exact version
    format: str  # of the rows
    num_train: int  # including those kept for self-play
    num_held_out: int
    skipped: Mapping[str, int]  # reason -> rows
    num_truncated: int  # real answers cut at a length limit, which therefore have no end token
    end_token: str
    end_ids: tuple[int, ...]  # generation stops at any of these
    template_digest: str
    max_length: int  # of prompt + response, at most the model's context
    mean_prompt_tokens: float
    mean_real_tokens: float
    num_self_play: int = 0  # rows that sft iterations never see
    num_near_duplicates: int = 0  # prompts that differ from others in case, white space or system prompt only
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])  # what the template leaves out -> rows
    num_checked: int = 0  # held-out rows with an answer that evaluate.checker finds

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> DataSummary:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return DataSummary(**{**raw, "end_ids": tuple(raw["end_ids"])})


@dataclass(frozen=True)
class Iteration:
    """Iteration `index` of a run; -1 is the starting model."""

    run: RunDir
    recipe: Recipe  # with the settings of this iteration
    index: int

    @cached_property
    def data(self) -> DataSummary:
        return DataSummary.read(verified(self.run.data, "summary.json"))

    @property
    def name(self) -> str:
        return "start" if self.index < 0 else f"iteration {self.index}"

    @property
    def opponent(self) -> Path:
        """The recipe's model in iteration 0, then the model that the previous iteration trained."""
        return Path(self.data.model) if self.index <= 0 else self.run.model(self.index - 1)

    @property
    def policy(self) -> Path:
        return Path(self.data.model) if self.index < 0 else self.run.model(self.index)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this iteration that its method needs."""
        benchmarks = tuple(f"{BENCHMARKS}/{label}" for label in self.benchmarks)
        if self.index < 0:
            return (*(("evaluate",) if self.is_evaluated else ()), *benchmarks)
        needs = self.recipe.method.needs
        needed = {
            "generate": needs.rounds > 0,
            "score": needs.opponent,
            "train": True,
            "evaluate": self.is_evaluated,
        }
        return (*(stage for stage in STAGES if needed[stage]), *benchmarks)

    @property
    def benchmarks(self) -> dict[str, Task | None]:
        """One stage per benchmark, so that benchmarks can be added to an existing run. None stands for MT-Bench."""
        settings = self.recipe.evaluate
        tasks = settings.harness.stages() if settings.harness else {}
        return {**tasks, **({f"mt_bench-{Path(settings.mt_bench).stem}": None} if settings.mt_bench else {})}

    @property
    def is_evaluated(self) -> bool:
        return self.data.num_held_out > 0

    def stage(self, name: str) -> Path:
        return self.run.stage(self.index, name) if self.index >= 0 else self.run.start / name

    def before(self) -> Iteration:
        return replace(self, index=self.index - 1)

    def rounds(self) -> list[int]:
        """The iterations whose generated responses this one trains on, newest first; sft iterations generate none."""
        window = range(self.index, max(-1, self.index - self.recipe.method.needs.rounds), -1)
        return [t for t in window if t == self.index or is_committed(self.run.stage(t, "generate"))]

    @property
    def proto_round(self) -> int:
        """The iteration whose generated responses are the proto responses: the first that has any."""
        return next((t for t in range(self.index) if is_committed(self.run.stage(t, "generate"))), self.index)

    def seed(self, *coordinates: str | int) -> int:
        return seed_of(self.recipe.seed, self.index, *coordinates)

    def train_rows(self) -> list[Rendered]:
        """The training rows; with data.self_play_rows, those kept for self-play unless this is an sft iteration."""
        is_self_play = self.recipe.data.self_play_rows is not None and self.recipe.method.name != "sft"
        return read_rendered(self.run.data / ("self_play.parquet" if is_self_play else "train.parquet"))

    def held_out_rows(self) -> list[Rendered]:
        return read_rendered(self.run.data / "held_out.parquet")


def seed_of(*coordinates: str | int) -> int:
    """A 64-bit seed for a place such as (run seed, "sample", iteration, row id, sample).

    All randomness is a function of such coordinates, so no random state has to be saved.
    """
    return xxhash.xxh3_64_intdigest(json.dumps(coordinates).encode())
