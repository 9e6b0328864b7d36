"""What a stage is given: which run, which settings, which iteration. Everything below a stage takes values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparring.data.tables import read_generations, read_rendered
from sparring.recipe.benchmarks import Task
from sparring.recipe.schema import Recipe
from sparring.run.manifest import is_committed, verified, write_json
from sparring.run.rundir import BENCHMARKS, STAGES, RunDir
from sparring.run.seeds import seed_of
from sparring.types import Generation, Rendered, Role, TokenIds


@dataclass(frozen=True)
class DataSummary:
    """What the data stage found, and the token contract that every later stage keeps."""

    model: str  # folder of the model that the run starts from, its exact version
    shape: str
    num_train: int  # those kept for the game among them
    num_held_out: int
    rejected: Mapping[str, int]  # reason -> rows
    num_cut: int  # real answers cut at a length limit, which therefore have no end token
    end_token: str
    end_ids: tuple[int, ...]  # generation stops at any of these
    template_digest: str
    max_length: int  # prompt + response, the model's context taken into account
    mean_prompt_tokens: float
    mean_real_tokens: float
    num_game: int = 0  # rows that sft iterations do not see

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> DataSummary:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return DataSummary(**{**raw, "end_ids": tuple(raw["end_ids"])})


@dataclass(frozen=True)
class Iteration:
    """Iteration `index` of a run; -1 stands for the model that the run starts from."""

    run: RunDir
    recipe: Recipe  # with the settings of this iteration
    index: int

    @cached_property
    def data(self) -> DataSummary:
        return DataSummary.read(verified(self.run.data, "summary.json"))

    @property
    def opponent(self) -> Path:
        """The model of the recipe at first, then what the iteration before trained. Nothing else decides it."""
        return Path(self.data.model) if self.index <= 0 else self.run.model(self.index - 1)

    @property
    def policy(self) -> Path:
        return Path(self.data.model) if self.index < 0 else self.run.model(self.index)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this iteration: those whose work matters to its method."""
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
        """Stages of their own, so that one more can be asked of a run that exists. None: MT-Bench, which is ours."""
        settings = self.recipe.evaluate
        tasks = settings.harness.stages() if settings.harness else {}
        return {**tasks, **({settings.mt_bench.label: None} if settings.mt_bench else {})}

    @property
    def is_evaluated(self) -> bool:
        return self.recipe.evaluate.held_out and self.data.num_held_out > 0

    def stage(self, name: str) -> Path:
        return self.run.stage(self.index, name) if self.index >= 0 else self.run.start / name

    def before(self) -> Iteration:
        return replace(self, index=self.index - 1)

    def rounds(self) -> list[int]:
        """The iterations whose generated answers this one plays with, the newest first. One of sft has drawn none."""
        window = range(self.index, max(-1, self.index - self.recipe.method.needs.rounds), -1)
        return [t for t in window if t == self.index or is_committed(self.run.stage(t, "generate"))]

    @property
    def proto_round(self) -> int:
        """The iteration whose answers are the proto answers: the first that drew any."""
        return next((t for t in range(self.index) if is_committed(self.run.stage(t, "generate"))), self.index)

    def seed(self, *coordinates: str | int) -> int:
        return seed_of(self.recipe.seed, self.index, *coordinates)

    def train_rows(self) -> list[Rendered]:
        """The rows of this iteration: with data.game_rows, those kept for the game unless it is one of sft."""
        is_game = self.recipe.data.game_rows is not None and self.recipe.method.name != "sft"
        return read_rendered(self.run.data / ("game.parquet" if is_game else "train.parquet"))

    def held_out_rows(self) -> list[Rendered]:
        return read_rendered(self.run.data / "held_out.parquet")

    def responses(
        self, row: Rendered, generated: Sequence[Generation], proto: Sequence[Generation]
    ) -> dict[Role, tuple[TokenIds, ...]]:
        """The responses to a row that the method reads, in the order of its roles."""
        every: dict[Role, tuple[TokenIds, ...]] = {
            "real": (row.real_ids,),
            "generated": tuple(answer.token_ids for answer in generated),
            "proto": tuple(answer.token_ids for answer in proto[:1]),
            "rejected": (row.rejected_ids,),
        }
        return {role: every[role] for role in self.recipe.method.needs.roles}

    def generations(self, index: int) -> dict[str, list[Generation]]:
        """The answers that iteration `index` drew, by row id, in the order of samples; only rows that have them all."""
        answers: dict[str, list[Generation]] = {}
        for generation in read_generations(sorted(self.run.stage(index, "generate").glob("part-*.parquet"))):
            answers.setdefault(generation.id, []).append(generation)
        samples = max((len(drawn) for drawn in answers.values()), default=0)
        return {id: drawn for id, drawn in answers.items() if len(drawn) == samples}

    def played_rows(self, rounds: Iterable[Mapping[str, list[Generation]]]) -> list[Rendered]:
        """The training rows that were answered in each of `rounds`: an engine may have failed at some."""
        answers = list(rounds)
        return [row for row in self.train_rows() if all(row.id in drawn for drawn in answers)]
