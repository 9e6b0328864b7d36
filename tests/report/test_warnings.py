"""Every warning on the record of a sick run, and none on those of healthy ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sparring.data.tables import write_generations, write_rows, write_table
from sparring.loop import play
from sparring.recipe.schema import Recipe
from sparring.report.warnings import drifts_from_real, find_warnings
from sparring.run.iteration import DataSummary
from sparring.run.manifest import commit, write_json
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import seal_recipe
from sparring.stages.evaluate.held_out import ANSWERS, likelihood
from sparring.stages.evaluate.text_metrics import real_form, text_metrics
from sparring.types import Finish, Generation, Rendered, TokenIds

ROWS = 200
END = 3


class Form(NamedTuple):
    """How a model responds: tokens on average, the share of responses that end, and the share of repeated tokens."""

    length: float
    end_rate: float = 1.0
    repetition: float = 0.0


NORMAL = Form(17)


@dataclass(frozen=True)
class Record:
    """What a run of one iteration left: the real responses, those of the start and of the last model, and the rest."""

    real: Form = NORMAL
    start: Form = NORMAL
    last: Form = NORMAL
    nll_change: float = -0.05  # nats per token, from the start to the last model
    scored: dict[str, float] = field(default_factory=dict[str, float])  # of the manifest of the score stage

    def responses(self, form: Form, random: np.random.Generator) -> list[tuple[TokenIds, Finish]]:
        found: list[tuple[TokenIds, Finish]] = []
        for _ in range(ROWS):
            body = random.integers(10, 200, size=max(2, int(form.length * np.exp(random.normal(-0.045, 0.3)))))
            repeated = round(form.repetition * len(body))
            body[len(body) - repeated :] = 7
            is_end = bool(random.random() < form.end_rate)
            ids = np.append(body, END) if is_end else body
            found.append((ids.astype(np.int32), "stop" if is_end else "length"))
        return found

    def write(self, root: Path) -> Results:
        """A run directory that has what the warnings read, as the stages would have written it."""
        random = np.random.default_rng(0)
        run = RunDir(root)
        recipe = Recipe.model_validate({"model": "m", "method": "spin", "iterations": 1, "data": {"train": "t"}})
        root.mkdir()
        run.recipe.write_text(seal_recipe(recipe))
        real, start, last = (self.responses(form, random) for form in (self.real, self.start, self.last))
        nothing = np.array([5], dtype=np.int32)
        rows = [
            Rendered(str(n), n, nothing, ids, finish, "", "", prompt_key=str(n)) for n, (ids, finish) in enumerate(real)
        ]
        summary = DataSummary("m", "", ROWS, ROWS, {}, 0, "", (END,), "", 512, 1.0, 17.0)
        with commit(run.data, input_digests={}) as folder:
            write_rows(folder / "train.parquet", rows)
            write_rows(folder / "held_out.parquet", rows)
            summary.write(folder / "summary.json")
        tokens = np.array([len(row.real_ids) for row in rows])
        nll = (1.5 + random.normal(0, 0.3, ROWS)) * tokens
        for folder, responses, change in ((run.start, start, 0.0), (run.iteration(0), last, self.nll_change)):
            logprob = -(nll + (change + random.normal(0, 0.02, ROWS)) * tokens).astype(np.float32)
            generations = [Generation(str(n), 0, ids, finish) for n, (ids, finish) in enumerate(responses)]
            metrics = text_metrics(generations, [row.real_ids for row in rows]) | real_form(rows)
            columns: dict[str, Sequence[object] | np.ndarray] = {name: [None] * ROWS for name in ANSWERS.names}
            columns |= {"id": [row.id for row in rows], "real_logprob": logprob}
            with commit(folder / "evaluate", input_digests={}) as work:
                write_json(work / "metrics.json", metrics | likelihood(rows, logprob))
                write_table(work / "answers.parquet", ANSWERS, columns)
        drawn = [Generation(str(n), 0, ids, finish) for n, (ids, finish) in enumerate(start)]
        with commit(run.stage(0, "generate"), input_digests={}) as work:
            write_generations(work / "part-00000.parquet", drawn, [""] * ROWS)
        with commit(run.stage(0, "score"), input_digests={}, info=self.scored) as work:
            write_json(work / "nothing.json", {})
        return Results(root)


HEALTHY = Record()
ENGINE = {"engine_difference": 0.004, "engine_allowed": 0.03, "engine_answers": 64.0}
LIMIT = Form(47, end_rate=0.1)
"""Responses that the length limit cuts."""


@pytest.mark.parametrize(
    "record",
    [
        HEALTHY,
        replace(HEALTHY, nll_change=0.0),
        replace(HEALTHY, scored=ENGINE),
        replace(HEALTHY, real=Form(40, end_rate=0.3), start=Form(40, end_rate=0.9), last=Form(40, end_rate=0.35)),
        replace(HEALTHY, real=Form(60, repetition=0.6), start=Form(60), last=Form(60, repetition=0.55)),
        replace(HEALTHY, start=Form(19), last=Form(15)),
    ],
    ids=["better", "unchanged", "engine", "real responses are cut", "real responses repeat", "a little shorter"],
)
def test_no_warning_on_a_healthy_record(record: Record, tmp_path: Path) -> None:
    warnings = find_warnings(record.write(tmp_path / "run"))
    if record.start.end_rate != record.real.end_rate:  # ends tell the two apart
        assert warnings.pop().startswith("Iteration 0 has a shortcut")
    assert warnings == []


def test_responses_that_become_as_long_as_the_real_ones_do_not_drift(tmp_path: Path) -> None:
    """At the start the limit cuts responses at 47 tokens; in the end they have the 17 tokens of the real ones."""
    results = replace(HEALTHY, start=LIMIT).write(tmp_path / "run")
    start, last = results.evaluations()[-1], results.evaluations()[0]
    assert start["length"] > 45 and last["length"] < 20 and 0.9 < last["length_ratio"] < 1.1
    assert not any("length" in text for text in find_warnings(results) if "shortcut" not in text)


SICK = {
    "The likelihood of real responses falls: ": replace(HEALTHY, nll_change=0.03),
    "The response length drifts away from that of the real responses: ": replace(HEALTHY, last=Form(30)),
    "The model stops emitting its end token: ": replace(HEALTHY, last=Form(17, end_rate=0.6)),
    "Responses repeat themselves: ": replace(HEALTHY, last=Form(17, repetition=0.7)),
    "Iteration 0 has a shortcut: ": replace(HEALTHY, start=LIMIT),
    "The engine samples from a different model in iteration 0: ": replace(
        HEALTHY, scored=ENGINE | {"engine_difference": 0.4}
    ),
}


@pytest.mark.parametrize("text", SICK)
def test_each_warning_on_a_sick_record(text: str, tmp_path: Path) -> None:
    warnings = find_warnings(SICK[text].write(tmp_path / "run"))
    assert [warning[: len(text)] for warning in warnings] == [text], "this one and no other"


def test_drift_is_away_from_the_real_length() -> None:
    assert drifts_from_real(1.0, 1.6) and drifts_from_real(1.0, 0.6) and drifts_from_real(2.0, 2.5)
    assert not drifts_from_real(1.0, 1.4) and not drifts_from_real(3.0, 1.0) and not drifts_from_real(3.0, 3.1)
    assert not drifts_from_real(2.0, 1.8), "still far, and nearer than before"
    assert drifts_from_real(2.5, 0.2), "from too long to far too short"


def test_an_unknown_interval_is_no_warning(tmp_path: Path) -> None:
    """Rows of one prompt only: nothing is known about others."""
    results = replace(HEALTHY, nll_change=0.5).write(tmp_path / "run")
    results.__dict__["held_out"] = (np.array(["one prompt"] * ROWS), results.held_out[1])
    assert find_warnings(results) == []


@pytest.mark.slow
def test_no_warning_on_a_healthy_run_of_a_pretrained_model(shared: Path, tmp_path: Path) -> None:
    """A model of stories continues stories: its form is that of the real ones from the start."""
    run = play(
        Path(__file__).parents[2] / "recipes" / "tiny-space.yaml",
        tmp_path / "run",
        [
            f"model={shared / 'models' / 'stories260K'}",
            f"data.train={shared / 'data' / 'tinystories' / 'stories.jsonl'}",
            "iterations=1",
            "data.limit=96",
            "data.held_out=32",
            "generate.max_new_tokens=32",
        ],
    )
    results = Results(run.root)
    assert find_warnings(results) == [], json.dumps(results.evaluations())
