"""Every warning on the record of a sick run, and none on those of healthy ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sparring.data.tables import write_generations, write_rows, write_table
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
        random = np.random.default_rng(0)
        real, start, last = (self.responses(form, random) for form in (self.real, self.start, self.last))
        rows = [row(n, ids, finish) for n, (ids, finish) in enumerate(real)]
        drawn = [Generation(str(n), 0, ids, finish) for n, (ids, finish) in enumerate(start)]
        after = [Generation(str(n), 0, ids, finish) for n, (ids, finish) in enumerate(last)]
        tokens = np.array([len(one.real_ids) for one in rows])
        nll = 1.5 + random.normal(0, 0.3, ROWS)
        changes = (random.normal(0, 0.02, ROWS), self.nll_change + random.normal(0, 0.02, ROWS))
        metrics = [text_metrics(g, [one.real_ids for one in rows]) | real_form(rows) for g in (drawn, after)]
        return write_run(
            root,
            rows,
            rows,
            drawn,
            [-(nll + change) * tokens for change in changes],
            metrics,
            self.scored,
            (drawn, after),
        )


def row(number: int, ids: TokenIds, finish: Finish) -> Rendered:
    return Rendered(str(number), number, np.array([5], dtype=np.int32), ids, finish, "", "", prompt_key=str(number))


def write_run(
    root: Path,
    train: Sequence[Rendered],
    held_out: Sequence[Rendered],
    drawn: Sequence[Generation],
    real_logprob: Sequence[np.ndarray],
    metrics: Sequence[Mapping[str, float]],
    scored: Mapping[str, float],
    responses: Sequence[Sequence[Generation]] = (),
) -> Results:
    """A run directory of one iteration that has what the warnings read, as the stages would have written it.

    `real_logprob`, `metrics` and held-out `responses` are those of the start and of iteration 0, `scored` is in the
    manifest of `score`.
    """
    run, nothing = RunDir(root), [None] * len(held_out)
    recipe = Recipe.model_validate({"model": "m", "method": "spin", "iterations": 1, "data": {"train": "t"}})
    root.mkdir()
    run.recipe.write_text(seal_recipe(recipe))
    with commit(run.data, input_digests={}) as folder:
        write_rows(folder / "train.parquet", train)
        write_rows(folder / "held_out.parquet", held_out)
        DataSummary("m", "", len(train), len(held_out), {}, 0, "", (END,), "", 512, 1.0, 17.0).write(
            folder / "summary.json"
        )
    evaluations = zip((run.start, run.iteration(0)), real_logprob, metrics, strict=True)
    for index, (folder, logprob, measured) in enumerate(evaluations):
        columns: dict[str, Sequence[object] | np.ndarray] = dict.fromkeys(ANSWERS.names, nothing)
        columns |= {"id": [one.id for one in held_out], "real_logprob": logprob.astype(np.float32)}
        if responses:
            columns["token_ids"] = [one.token_ids for one in responses[index]]
        with commit(folder / "evaluate", input_digests={}) as work:
            write_json(work / "metrics.json", measured | likelihood(held_out, logprob))
            write_table(work / "answers.parquet", ANSWERS, columns)
    with commit(run.stage(0, "generate"), input_digests={}) as work:
        write_generations(work / "part-00000.parquet", drawn, [""] * len(drawn))
    with commit(run.stage(0, "score"), input_digests={}, info=dict(scored)) as work:
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


SMOLLM2 = json.loads(Path(__file__).with_name("smollm2.json").read_text())


def captured(root: Path, last: Mapping[str, float], rise: float = 0.0) -> Results:
    """The record of a run of a real chat model, with other metrics of the last model and a held-out NLL that rises."""

    def ids(length: int, first: int) -> TokenIds:
        return np.array([first] + [5] * (length - 1), dtype=np.int32)

    finish: dict[int, Finish] = {0: "length", 1: "stop"}
    pairs, real = SMOLLM2["train"], SMOLLM2["held_out"]
    train = [row(n, ids(length, first), finish[ends]) for n, ((length, ends, first), _) in enumerate(pairs)]
    drawn = [Generation(str(n), 0, ids(k, first), finish[ends]) for n, (_, (k, ends, first)) in enumerate(pairs)]
    held_out = [row(n, ids(length, first), finish[ends]) for n, (length, ends, first) in enumerate(real)]
    before, after = (np.array(values) for values in SMOLLM2["real_logprob"])
    start, end = SMOLLM2["metrics"]
    after -= rise * np.array([length for length, _, _ in real])
    responses = [
        [Generation(str(n), 0, ids(round(found["length_ratio"] * length), 5), "stop") for n, (length, _, _) in rows]
        for found, rows in ((start, enumerate(real)), (end | last, enumerate(real)))
    ]
    return write_run(root, train, held_out, drawn, [before, after], [start, end | last], {}, responses)


def test_no_warning_on_the_record_of_a_real_chat_model(tmp_path: Path) -> None:
    assert find_warnings(captured(tmp_path / "run", {})) == []


@pytest.mark.parametrize(
    ("text", "last", "rise"),
    [
        ("The likelihood of real responses falls: ", {}, 0.2),
        ("The response length drifts away from that of the real responses: ", {"length_ratio": 1.6}, 0.0),
        ("The model stops emitting its end token: ", {"end_rate": 0.04}, 0.0),
        ("Responses repeat themselves: ", {"repetition": 0.3}, 0.0),
    ],
)
def test_each_warning_where_only_one_thing_of_it_is_sick(
    text: str, last: dict[str, float], rise: float, tmp_path: Path
) -> None:
    (warning,) = find_warnings(captured(tmp_path / "run", last, rise))
    assert warning.startswith(text)


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
