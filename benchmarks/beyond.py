"""Steps beyond the papers, tried on the demo's task in memory before any of them becomes code.

    python benchmarks/beyond.py FOLDER pool|adaptive|kept_out --seed 0
    python benchmarks/beyond_page.py FOLDER          writes results/beyond.json and the tables of docs/results.md

pool: the opponent is a mixture of past iterations. Each row is answered by one of them, drawn by weight, and the
reward is log p_policy - log sum_k w_k p_k: as many answers and updates as plain SPACE.
adaptive: rounds that play a part of the rows, with chances by what there is to learn and weights that correct for them.
kept_out: games on rows that SFT did not see, and opponents that were not trained on the row that they answer.

The objective, scoring, sampling, optimizer and schedule are the package's own. Seconds are CPU seconds of one thread
for everything but evaluation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from sparring.commands.demo import GAME, START, demo_recipe, write_task
from sparring.data.tables import read_rendered
from sparring.loop import play
from sparring.model.load import load_model, load_tokenizer, texts_of
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.packing import arrange, micro_batches
from sparring.objectives import Sft, Space
from sparring.recipe.schema import Recipe, Train
from sparring.run.iteration import DataSummary
from sparring.run.seeds import permutation, seed_of, uniforms
from sparring.stages.evaluate.checkers import is_correct, number
from sparring.stages.generate.hf import HfBackend
from sparring.stages.train.loop import learning_rate
from sparring.stages.train.optimizers import make_optimizer
from sparring.types import Group, Objective, Prompt, Rendered, TokenIds

BUDGET = 8192
Point = dict[str, float]
"""What an arm has reached after a round, and the CPU seconds that it has used by then."""


@dataclass(frozen=True)
class Game:
    """How an arm is played; the defaults are plain SPACE."""

    rounds: int
    rate: float = 3e-4
    objective: Objective = Space()  # noqa: RUF009  (frozen)
    past: float = 0.0
    """The weight of all past iterations together in the pool of opponents."""
    only_first: bool = False
    """That weight is the first iteration's alone."""
    share: float = 1.0
    """The rows that a round plays."""
    chances: str = "all alike"
    """Or "by signal": 1 - p(real answer), what the opponent has left to learn; or "top": the highest of it for certain,
    and a fifth of the round for all others."""
    is_weighted: bool = True


class Task:
    """A seed's problems, and models trained on them from scratch."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        write_task(folder / "task", seed)
        data = play(self.recipe("sft", 1), folder / "start").data
        self.train, self.held_out = (read_rendered(data / f"{name}.parquet") for name in ("train", "held_out"))
        self.end_ids = DataSummary.read(data / "summary.json").end_ids
        self.tokenizer = load_tokenizer(folder / "task" / "model")
        self.settings = Train.model_validate(GAME)

    def recipe(self, method: str, iterations: int) -> Recipe:
        model = self.folder / "task" / "model"
        return demo_recipe(self.folder, model, method, self.seed, iterations=iterations, train=START)

    def blank(self) -> PreTrainedModel:
        return load_model(self.folder / "task" / "model", dtype=torch.float32, device=torch.device("cpu"))

    def start(self) -> PreTrainedModel:
        path = self.folder / "start" / "iter-00" / "train" / "model"
        return load_model(path, dtype=torch.float32, device=torch.device("cpu"))

    def draw(self, model: PreTrainedModel, rows: Sequence[Rendered], *place: str | int, greedy: bool = False) -> dict:
        ordered = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.id))
        prompts = [Prompt(r.id, 0, r.prompt_ids, 24, seed_of(self.seed, *place, r.id)) for r in ordered]
        backend = HfBackend(model, end_ids=self.end_ids, batch_size=256)
        return {answer.id: answer for answer in backend.generate(prompts, greedy=greedy)}

    def evaluate(self, model: PreTrainedModel) -> Point:
        scores = score_groups(Scorer(model), [group_of(row) for row in self.held_out], BUDGET)["real"]
        answers = self.draw(model, self.held_out, greedy=True)
        texts = texts_of(self.tokenizer, [answers[row.id] for row in self.held_out])
        correct = [bool(is_correct(number, t, row.real)) for t, row in zip(texts, self.held_out, strict=True)]
        tokens = sum(len(row.real_ids) for row in self.held_out)
        return {"held_out_nll": float(-scores.sum() / tokens), "greedy_accuracy": float(np.mean(correct))}

    def copy_rate(self, model: PreTrainedModel, rows: Sequence[Rendered]) -> float:
        answers = self.draw(model, rows, "copies")
        return float(np.mean([np.array_equal(answers[row.id].token_ids, row.real_ids) for row in rows]))


def group_of(row: Rendered, generated: TokenIds | None = None) -> Group:
    answers = {} if generated is None else {"generated": (generated,)}
    return Group(row.id, row.prompt_ids, {"real": (row.real_ids,), **answers})


Opponents = Callable[[Rendered], PreTrainedModel]


def play_rounds(
    task: Task,
    game: Game,
    model: PreTrainedModel,
    rows: Sequence[Rendered],
    opponents: Mapping[str, PreTrainedModel] | None = None,
) -> list[Point]:
    """Plays from `model`; returns a point for the start and each round. `opponents`: a fixed one for each row's id."""
    model = copy.deepcopy(model)
    past: list[PreTrainedModel] = []
    points = [{**task.evaluate(model), "seconds": 0.0}]
    seconds = 0.0
    for t in range(game.rounds):
        began = time.process_time()
        chosen, weights = choose_rows(task, game, model, rows, t)
        groups, opponent = [group_of(row) for row in chosen], {}
        if game.objective.needs.rounds:
            past.append(copy.deepcopy(model))
            if opponents is not None:
                groups, opponent = meet_fixed(task, chosen, opponents, t)
            else:
                groups, opponent = meet_pool(task, chosen, past, pool_weights(game, t), t)
        train(task, game, model, groups, opponent, weights, t)
        seconds += time.process_time() - began
        points.append({**task.evaluate(model), "seconds": seconds, "rows": len(chosen)})
    return points


def choose_rows(
    task: Task, game: Game, model: PreTrainedModel, rows: Sequence[Rendered], t: int
) -> tuple[list[Rendered], np.ndarray]:
    """A round's rows and their weights, 1 / chance, so that its loss is the plain round's in expectation."""
    if game.share == 1:
        return list(rows), np.ones(len(rows))
    chances = np.full(len(rows), game.share)
    if game.chances != "all alike":
        real = score_groups(Scorer(model), [group_of(row) for row in rows], BUDGET)["real"]
        signal = -np.expm1(np.minimum(real, 0.0)) + 1e-6
        if game.chances == "top":
            top = np.argsort(-signal)[: round(0.8 * game.share * len(rows))]
            chances[:] = 0.2 * game.share * len(rows) / (len(rows) - len(top))
            chances[top] = 1.0
        else:
            chances = proportional(signal, game.share)
    drawn = systematic(chances, seed_of(task.seed, "rows", t))
    weights = game.share / chances[drawn] if game.is_weighted else np.ones(len(drawn))
    return [rows[i] for i in drawn], weights


def proportional(signal: np.ndarray, share: float, least: float = 0.2) -> np.ndarray:
    """Chances in proportion to the signal, at least `least` of the share and at most 1, whose mean is the share."""
    low, high = 0.0, 1 / signal.min()
    for _ in range(100):
        middle = (low + high) / 2
        chances = np.clip(middle * signal, least * share, 1.0)
        low, high = (middle, high) if chances.mean() < share else (low, middle)
    return np.clip(high * signal, least * share, 1.0)


def systematic(chances: np.ndarray, seed: int) -> np.ndarray:
    """Indices drawn each with its chance, their number fixed up to rounding: points at equal distances on the sums."""
    order = permutation(len(chances), seed)
    sums = np.concatenate([[0.0], chances[order].cumsum()]) + uniforms(1, seed)[0]
    return np.sort(order[np.floor(sums[1:]) > np.floor(sums[:-1])])


def pool_weights(game: Game, t: int) -> np.ndarray:
    """Of the iterations 0 to t: 1 - past for the last one, the rest for the first, or spread over all before it."""
    weights = np.zeros(t + 1)
    weights[: 1 if game.only_first else max(t, 1)] = game.past / (1 if game.only_first else max(t, 1))
    weights[t] += 1 - game.past
    return weights


def meet_pool(
    task: Task, rows: Sequence[Rendered], pool: Sequence[PreTrainedModel], weights: np.ndarray, t: int
) -> tuple[list[Group], dict[str, np.ndarray]]:
    """Every row's answer, drawn by one member of the pool, and the log-probs of the whole mixture."""
    bounds = weights.cumsum()
    who = [int(np.searchsorted(bounds[:-1], uniforms(1, seed_of(task.seed, "who", t, r.id))[0], "right")) for r in rows]
    answers = {}
    for k, member in enumerate(pool):
        mine = [row for row, w in zip(rows, who, strict=True) if w == k]
        answers |= task.draw(member, mine, "round", t) if mine else {}
    groups = [group_of(row, answers[row.id].token_ids) for row in rows]
    found = [score_groups(Scorer(pool[k]), groups, BUDGET) for k in range(len(pool)) if weights[k] > 0]
    logs = np.log(weights[weights > 0])
    mixed = {role: np.logaddexp.reduce([f[role] + w for f, w in zip(found, logs, strict=True)]) for role in found[0]}
    return groups, mixed


def meet_fixed(
    task: Task, rows: Sequence[Rendered], opponents: Mapping[str, PreTrainedModel], t: int
) -> tuple[list[Group], dict[str, np.ndarray]]:
    """Every row's answer and scores by the row's own opponent."""
    parts: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        parts.setdefault(id(opponents[row.id]), []).append(i)
    groups: dict[int, Group] = {}
    scores = {"real": np.empty(len(rows), np.float32), "generated": np.empty((len(rows), 1), np.float32)}
    for places in parts.values():
        model = opponents[rows[places[0]].id]
        answers = task.draw(model, [rows[i] for i in places], "round", t)
        mine = [group_of(rows[i], answers[rows[i].id].token_ids) for i in places]
        found = score_groups(Scorer(model), mine, BUDGET)
        groups |= dict(zip(places, mine, strict=True))
        for role, values in found.items():
            scores[role][places] = values
    return [groups[i] for i in range(len(rows))], scores


def train(
    task: Task,
    game: Game,
    model: PreTrainedModel,
    groups: Sequence[Group],
    opponent: Mapping[str, np.ndarray],
    weights: np.ndarray,
    t: int,
) -> None:
    """The package's inner loop, with a weight for each row."""
    settings = task.settings.model_copy(update={"learning_rate": game.rate})
    model.train()
    scorer, optimizer = (
        Scorer(model),
        make_optimizer(settings.optimizer, model, settings.learning_rate, settings.weight_decay),
    )
    per_epoch = math.ceil(len(groups) / settings.batch_size)
    for step in range(settings.epochs * per_epoch):
        epoch, place = divmod(step, per_epoch)
        order = permutation(len(groups), seed_of(task.seed, "order", t, epoch))
        batch = order[place * settings.batch_size : (place + 1) * settings.batch_size]
        for part in micro_batches(scorer.kind, [groups[i] for i in batch], BUDGET):
            where = batch[part]
            layout = arrange(scorer.kind, [groups[i] for i in where])
            theirs = {role: torch.from_numpy(values[where]) for role, values in opponent.items()}
            loss = game.objective(layout.scores(scorer(layout)), theirs, layout.lengths()).per_example  # type: ignore[arg-type]
            ((loss * torch.from_numpy(weights[where])).sum() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping or math.inf)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, settings.epochs * per_epoch, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def pool(task: Task) -> dict[str, list[Point]]:
    plain = Game(rounds=4)
    arms = {"plain": plain}
    for past in (0.25, 0.5, 0.75):
        arms[f"past {past:g}"] = replace(plain, past=past)
    arms["first 0.5"] = replace(plain, past=0.5, only_first=True)
    start = task.start()
    return {label: show(label, play_rounds(task, game, start, task.train)) for label, game in arms.items()}


def show(label: str, points: list[Point]) -> list[Point]:
    curve = " ".join(f"{point['held_out_nll']:.4f}/{point['greedy_accuracy']:.3f}" for point in points)
    print(f"{label:45} {curve}  {points[-1]['seconds']:.1f} s", flush=True)
    return points


def adaptive(task: Task) -> dict[str, list[Point]]:
    short = Game(rounds=12, share=0.25)
    arms = {
        "plain": Game(rounds=4),
        "quarter, all alike": short,
        "quarter, by signal": replace(short, chances="by signal"),
        "quarter, top": replace(short, chances="top"),
        "quarter, top, unweighted": replace(short, chances="top", is_weighted=False),
    }
    start = task.start()
    return {label: show(label, play_rounds(task, game, start, task.train)) for label, game in arms.items()}


def kept_out(task: Task, count: int, epochs: int) -> dict[str, list[Point]]:
    """Rows seen `epochs` times by a model from scratch, or half of them each by two models; then games from there."""
    rows = task.train[:count]
    one, other = rows[: count // 2], rows[count // 2 :]
    on_one, on_other, on_all = (from_scratch(task, part, epochs) for part in (one, other, rows))
    apart = {row.id: on_other for row in one} | {row.id: on_one for row in other}
    game, sft = Game(rounds=3), Game(rounds=3, objective=Sft())
    plans = {
        "sft on all, then sft on all": (sft, on_all, rows, None),
        "sft on all, then space on all": (game, on_all, rows, None),
        "sft on all, then space against halves": (game, on_all, rows, apart),
        "sft on half, then sft on all": (sft, on_one, rows, None),
        "sft on half, then sft on the other": (sft, on_one, other, None),
        "sft on half, then space on the other": (game, on_one, other, None),
    }
    arms: dict[str, list[Point]] = {}
    for label, (plan, model, played, opponents) in plans.items():
        points = play_rounds(task, plan, model, played, opponents)
        points[0]["copy_rate"] = task.copy_rate(model, played)
        arms[label] = show(label, points)
    return arms


def from_scratch(task: Task, rows: Sequence[Rendered], epochs: int) -> PreTrainedModel:
    """SFT as the demo trains its start."""
    model, settings = task.blank(), task.settings
    task.settings = Train.model_validate({**START, "epochs": epochs})
    game = Game(rounds=1, rate=task.settings.learning_rate, objective=Sft())
    train(task, game, model, [group_of(row) for row in rows], {}, np.ones(len(rows)), -1)
    task.settings = settings
    return model


EXPERIMENTS = {
    "pool": pool,
    "adaptive": adaptive,
    "kept_out": partial(kept_out, count=400, epochs=120),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder / f"seed-{arguments.seed}"
    found = EXPERIMENTS[arguments.experiment](Task(folder, arguments.seed))
    (folder / f"{arguments.experiment}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
