"""Tests the papers' claims at a small size, for docs/results.md.

    python benchmarks/claims.py play FOLDER [--stories FILE --model FOLDER] [--smollm2 FOLDER] [--minutes 4]
    python benchmarks/claims.py sample FOLDER --chats FILE   SmolLM2's finished plays: temperatures, pass@8, forgetting
    python benchmarks/claims.py gather FOLDER          adds to benchmarks/results/claims.json

`play` plays the trials that neither FOLDER nor claims.json has, until the time is up, and resumes when it is run again.
Several processes may share a folder. The stories are TinyStories as JSON lines with the field `text`; the model is the
260,000-parameter Llama of llama2.c in the Hugging Face layout; SmolLM2 is what `make real` leaves in
runs/real/task/model. Without them only the demo's problems are played. The chats are instruction rows in any format.

Each arm's learning rate is chosen on a separate seed with its own problems, split and starting model: the rate with the
lowest held-out NLL at the best iteration. SmolLM2's sweep of an arm begins at 1e-5 and ends when both neighbors of the
best rate are worse. Reported seeds (0 and up) are played at the chosen rate. The best iteration is chosen on one half
of the held-out rows and evaluated on the other.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from claims_samples import measure_samples
from demo_seeds import cpu_name

from sparring.commands.compare import copy_rows, reuse_stages
from sparring.commands.demo import LARGEST, START, TRAIN, demo_recipe, problems, write_task
from sparring.commands.real_demo import LARGEST as REAL_LARGEST
from sparring.loop import begin, play, run_stage
from sparring.recipe.schema import Recipe
from sparring.report.comparison import Arm as Played
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest, replace_file
from sparring.run.results import MEASURED, Results
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings

SWEEP_SEED = 100
TARGET = Path(__file__).parent / "results" / "claims.json"

KEPT = {
    "reward_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "higher_reward_higher_likelihood": "quadrants/higher_reward_higher_likelihood",
    "higher_reward_lower_likelihood": "quadrants/higher_reward_lower_likelihood",
    "lower_reward_higher_likelihood": "quadrants/lower_reward_higher_likelihood",
    "lower_reward_lower_likelihood": "quadrants/lower_reward_lower_likelihood",
    "likelihood_gap": "advantages/current",
    "kl_from_start": "kl_from_start",
    "entropy": "entropy",
    "length": "length",
    "end_rate": "end_rate",
}
"""Column -> metric of an evaluation. NLL and accuracies are kept too, for both halves."""


@dataclass(frozen=True)
class Arm:
    label: str
    method: Mapping[str, object]
    samples: int = 1
    rate_of: str | None = None
    """Not swept: uses the rate that this arm chose."""
    share: float = 1.0
    iterations: int = 99


SFT = Arm("sft", {"name": "sft"})
SPIN = Arm("spin 0.1", {"name": "spin", "lambda": 0.1})
SPIN_1 = Arm("spin 1", {"name": "spin", "lambda": 1.0})
TSPIN = Arm("tspin 1", {"name": "tspin", "alpha": 1.0, "beta": 0.1})
TSPIN_SMALL = Arm("tspin 0.1", {"name": "tspin", "alpha": 0.1, "beta": 0.1})
TSPIN_NO_HISTORY = Arm("tspin 1, beta 0", {"name": "tspin", "alpha": 1.0, "beta": 0.0}, rate_of="tspin 1")
SPACE = Arm("space 1", {"name": "space", "mu": 1.0})
SPACE_3 = Arm("space 3", {"name": "space", "mu": 3.0}, samples=3, rate_of="space 1", iterations=2)
SPACE_7 = Arm("space 7", {"name": "space", "mu": 7.0}, samples=7, rate_of="space 1", iterations=2)
MAIN = (SFT, SPIN, TSPIN, SPACE)


def quarter(arm: Arm) -> Arm:
    return replace(arm, label=f"{arm.label}, 25 %", rate_of=arm.label, share=0.25)


@dataclass(frozen=True)
class Task:
    """A starting model, training rows and held-out rows. `seeds` are reported."""

    name: str
    rates: tuple[float, ...]
    seeds: int
    iterations: int
    sweep_iterations: int
    swept: tuple[Arm, ...]
    further: tuple[Arm, ...] = ()
    only_swept: tuple[Arm, ...] = ()
    train: Mapping[str, object] = field(default_factory=lambda: {**TRAIN, "epochs": 2})
    max_new_tokens: int = 24
    data: Mapping[str, object] = field(default_factory=dict)
    checker: str | None = "number"
    first_rate: float | None = None
    """The sweep of an arm begins here and ends when both neighbors of its best rate are worse. None: all rates."""

    def arms(self) -> tuple[Arm, ...]:
        return (*self.swept, *self.further)


PROBLEMS = Task(
    "problems", (3e-5, 1e-4, 3e-4, 1e-3), 3, 5, 3, MAIN, (TSPIN_NO_HISTORY, SPACE_3, SPACE_7), (SPIN_1, TSPIN_SMALL)
)
STORY_ROWS, STORY_HELD_OUT = 192, 192
STORIES = Task(
    "stories",
    (1e-5, 3e-5, 1e-4, 3e-4),
    3,
    5,
    2,
    MAIN,
    (TSPIN_NO_HISTORY, SPACE_3),
    train={**TRAIN, "max_length": 256, "epochs": 1},
    max_new_tokens=48,
    data={"split_on": "sentence", "end_token": "<s>"},
    checker=None,
)
FRESH = Task("fresh rows", (1e-4, 3e-4, 1e-3), 3, 5, 2, (SFT, *(replace(quarter(arm), rate_of=None) for arm in MAIN)))
REAL_ROWS, REAL_HELD_OUT = 128, 160
TRANSFER, LARGER_NUMBERS = 96, 5 * REAL_LARGEST
REAL_TRAIN = {"optimizer": "adamw", "batch_size": 8, "max_length": 128, "warmup_ratio": 0.05, "epochs": 1}
# the model's own chat format without the system prompt of 25 tokens, which a CPU would spend a third of its time on
CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
REAL = Task(
    "SmolLM2",
    (1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
    3,
    2,
    1,
    MAIN,
    train=REAL_TRAIN,
    max_new_tokens=32,
    data={"template": CHAT, "end_token": "<|im_end|>"},
    first_rate=1e-5,
)
REAL_START = {**REAL_TRAIN, "learning_rate": 1e-4, "schedule": "constant", "epochs": 2}
TASKS = (PROBLEMS, STORIES, FRESH, REAL)
"""problems: the demo, on the 1,000 rows that the start was trained on for 40 epochs. fresh rows: the same models on
1,000 other rows, or on a quarter of them. SmolLM2: the problems of `make real` in words, after two epochs of SFT."""


@dataclass(frozen=True)
class Trial:
    task: Task
    arm: Arm
    rate: float
    seed: int

    @property
    def is_sweep(self) -> bool:
        return self.seed == SWEEP_SEED

    @property
    def iterations(self) -> int:
        return min(self.arm.iterations, self.task.sweep_iterations if self.is_sweep else self.task.iterations)

    def folder(self, root: Path) -> Path:
        name = f"{self.arm.label}-{self.rate:g}".replace(" ", "_").replace("%", "percent").replace(",", "")
        return root / self.task.name.replace(" ", "-") / f"seed-{self.seed}" / name


@dataclass(frozen=True)
class Place:
    """Paths from the command line."""

    root: Path
    stories: Path | None
    model: Path | None
    smollm2: Path | None

    @cached_property
    def tasks(self) -> list[Task]:
        there = {"stories": self.stories and self.model, "SmolLM2": self.smollm2}
        return [task for task in TASKS if there.get(task.name, True)]

    @cached_property
    def gathered(self) -> dict[tuple[object, ...], dict[str, object]]:
        """What an earlier folder had: (task, arm, rate, seed) -> result."""
        plays = json.loads(TARGET.read_text(encoding="utf-8"))["plays"]
        return {(p["task"], p["arm"], p["rate"], p["seed"]): p for p in plays}

    def result(self, one: Trial) -> dict[str, object] | None:
        path = one.folder(self.root) / "result.json"
        samples = path.with_name("samples.json")
        if path.is_file():
            more = {"samples": json.loads(samples.read_text(encoding="utf-8"))} if samples.is_file() else {}
            return json.loads(path.read_text(encoding="utf-8")) | more
        return self.gathered.get((one.task.name, one.arm.label, one.rate, one.seed))


def sweep_trials(task: Task) -> list[Trial]:
    return [Trial(task, arm, rate, SWEEP_SEED) for arm in (*task.swept, *task.only_swept) for rate in task.rates]


def swept_so_far(place: Place, task: Task, arm: Arm) -> tuple[dict[float, float], Trial | None]:
    """(lowest held-out NLL by rate, next trial of the sweep), of the arm whose rate this one uses."""
    label = arm.rate_of or arm.label
    found: dict[float, float] = {}
    left: dict[float, Trial] = {}
    for one in sweep_trials(task):
        if one.arm.label == label:
            result = place.result(one)
            if result is None:
                left[one.rate] = one
            else:
                found[one.rate] = min(result["metrics"]["nll"])  # type: ignore[index]
    if task.first_rate is None:
        wanted = list(task.rates)
    elif not found:
        wanted = [task.first_rate]
    else:  # the neighbors of the best, the higher one first
        best = task.rates.index(min(found, key=lambda rate: found[rate]))
        wanted = [*task.rates[best + 1 : best + 2], *task.rates[max(0, best - 1) : best]]
    return found, next((left[rate] for rate in wanted if rate in left), None)


def chosen_rate(place: Place, task: Task, arm: Arm) -> float | None:
    """The rate with the lowest held-out NLL at its best iteration. None if the sweep is not finished."""
    found, following = swept_so_far(place, task, arm)
    return min(found, key=lambda rate: found[rate]) if following is None else None


def to_play(place: Place) -> Iterator[Trial]:
    """Trials that can be played now: sweeps, then reported seeds, most important first."""
    for task in place.tasks:
        for _ in task.rates:
            for arm in task.swept:
                following = swept_so_far(place, task, arm)[1]
                if following is not None:
                    yield following
    wanted = ((REAL, MAIN), (PROBLEMS, MAIN), (PROBLEMS, PROBLEMS.further[:1]), (FRESH, FRESH.swept), (STORIES, MAIN))
    for task, arms in (*wanted, (STORIES, STORIES.further), (PROBLEMS, PROBLEMS.further)):
        for seed in range(task.seeds) if task in place.tasks else ():
            for arm in arms:
                rate = chosen_rate(place, task, arm)
                if rate is not None:
                    yield Trial(task, arm, rate, seed)
    yield from sweep_trials(PROBLEMS)


@contextmanager
def only_one(path: Path, *, patient: bool = False) -> Iterator[bool]:
    """Yields whether this process got the lock. The lock ends with the process. `patient`: wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def start_of(place: Place, task: Task, seed: int) -> tuple[Path, Path]:
    """Returns the starting model and the folder with train.jsonl and held_out.jsonl; creates missing ones."""
    root = place.root / task.name.replace(" ", "-") / f"seed-{seed}"
    rows = root / "rows"
    if task.name == "stories":
        assert place.stories and place.model
        if not rows.is_dir():
            lines = place.stories.read_text(encoding="utf-8").splitlines()
            every = [json.loads(line) for line in lines if line]
            random.Random(seed).shuffle(every)  # noqa: S311
            write_rows(rows / "held_out.jsonl", every[:STORY_HELD_OUT])
            write_rows(rows / "train.jsonl", every[STORY_HELD_OUT : STORY_HELD_OUT + STORY_ROWS])
        return place.model, rows
    if task.name == "SmolLM2":
        assert place.smollm2
        if not rows.is_dir():
            every = problems(REAL_HELD_OUT + REAL_ROWS, seed, REAL_LARGEST, in_words=True)
            write_rows(rows / "held_out.jsonl", every[:REAL_HELD_OUT])
            write_rows(rows / "train.jsonl", every[REAL_HELD_OUT:])
        return play(recipe_of(place.smollm2, rows, task, SFT, seed, 1, REAL_START), root / "start").run.model(0), rows
    shared = place.root / "problems" / f"seed-{seed}"  # one start for both tasks
    write_task(shared / "task", seed)
    start = play(
        demo_recipe(shared, shared / "task" / "model", "sft", seed, iterations=1, train=START), shared / "start"
    ).run
    if task.name == "fresh rows" and not rows.is_dir():
        write_rows(rows / "train.jsonl", problems(3000, seed, LARGEST)[2000:])
        held_out = (shared / "task" / "held_out.jsonl").read_text(encoding="utf-8")
        replace_file(rows / "held_out.jsonl", held_out)
    return start.model(0), rows if task.name == "fresh rows" else shared / "task"


def recipe_of(
    model: Path, rows: Path, task: Task, arm: Arm, seed: int, iterations: int, train: Mapping[str, object]
) -> Recipe:
    data = {"train": str(rows / "train.jsonl"), "held_out": str(rows / "held_out.jsonl"), **task.data}
    if arm.share < 1:
        data["limit"] = int(arm.share * len((rows / "train.jsonl").read_text(encoding="utf-8").splitlines()))
    return Recipe.model_validate(
        {
            "model": str(model),
            "method": dict(arm.method),
            "iterations": iterations,
            "data": data,
            "generate": {"max_new_tokens": task.max_new_tokens, "batch_size": 256, "samples": arm.samples},
            "train": dict(train),
            "evaluate": {"checker": task.checker},
            "seed": seed,
            "threads": 1,
        }
    )


def play_one(place: Place, one: Trial) -> None:
    with only_one(place.root / f"start-{one.seed}.lock", patient=True):
        model, rows = start_of(place, one.task, one.seed)
    train = {**one.task.train, "learning_rate": one.rate, "schedule": "linear"}
    recipe = recipe_of(model, rows, one.task, one.arm, one.seed, one.iterations, train)
    run = RunDir(one.folder(place.root) / "run")
    run.root.mkdir(parents=True, exist_ok=True)
    donors = [
        RunDir(path.parent / "run")
        for path in sorted(one.folder(place.root).parent.glob("*/result.json"))
        if json.loads(path.read_text(encoding="utf-8"))["data"] == [one.arm.share, one.arm.samples]
    ]
    with run.own():
        check_settings(run, recipe)
        if donors:
            copy_rows(donors[0], run, 1.0, one.seed)  # already prepared
        begin(run, recipe, {})
        reuse_stages(Iteration(run, recipe.at(0), 0), donors)
        for index in range(-1, one.iterations):
            iteration = Iteration(run, recipe.at(index), index)
            for stage in iteration.stages:
                run_stage(iteration, stage)
    result = {
        "task": one.task.name,
        "arm": one.arm.label,
        "rate": one.rate,
        "seed": one.seed,
        "data": [one.arm.share, one.arm.samples],
        "dtype": recipe.train.dtype,
        **measure(run),
        "recipe": recipe.model_dump(by_alias=True, mode="json"),
    }
    replace_file(one.folder(place.root) / "result.json", json.dumps(result))


def sample(place: Place, chats: Path) -> None:
    """Writes samples.json beside the result of each finished play of SmolLM2 that is reported."""
    for path in sorted((place.root / REAL.name).glob("seed-*/*/result.json")):
        seed, target = int(path.parts[-3].removeprefix("seed-")), path.with_name("samples.json")
        with only_one(path.parent / "lock") as is_mine:
            if not is_mine or target.is_file() or seed == SWEEP_SEED:
                continue
            transfer = path.parents[1] / "transfer.jsonl"
            write_rows(transfer, problems(TRANSFER, 1000 + seed, LARGER_NUMBERS, in_words=True))
            replace_file(target, json.dumps(measure_samples(path.parent / "run", transfer, chats)))


def measure(run: RunDir) -> dict[str, object]:
    """Returns the budget, the share of copies among the first answers, and metrics per evaluation, the start first."""
    results = Results(run.root)
    played = Played("", 0, 1.0, run)
    choosing, judging = results.halves
    halves = {"": results.all_rows, "_dev": choosing, "_test": judging}
    metrics: dict[str, list[float | None]] = {}
    for index, evaluation in results.evaluations().items():
        names = ["nll"] if results.recipe.evaluate.checker is None else ["nll", "greedy", "sampled"]
        for name in names:
            metric = {"nll": "held_out_nll"}.get(name, f"{name}_accuracy")
            for half, rows in halves.items():
                metrics.setdefault(name + half, []).append(round(results.value(metric, index, rows).mean, 5))
        for name, metric in KEPT.items():
            value = evaluation.get(metric)
            metrics.setdefault(name, []).append(None if value is None else round(value, 4))
    first = run.stage(0, "generate")
    copies = read_manifest(first).info["copy_rate"] if first.is_dir() else None
    budget = played.budget()
    del budget["seconds"]  # the machine was shared
    return {
        "budget": {name: round(value) for name, value in budget.items()},
        "copies_of_the_start": copies,
        "metrics": metrics,
        "judged": judged(results),
    }


def judged(results: Results) -> dict[str, list[float]]:
    """Each judging row's value at the iteration that the metric chooses on the other half, and its tokens.

    In the order of the held-out rows, which is the same for every arm of a seed.
    """
    choosing, judging = results.halves
    found = {"tokens": results.held_out[1][judging].tolist()}
    for metric in MEASURED[: 1 if results.recipe.evaluate.checker is None else 3]:
        sign = 1 if metric == "held_out_nll" else -1
        values = {index: sign * results.value(metric, index, choosing).mean for index in results.evaluations()}
        best = min(values, key=lambda index: values[index])
        found[metric] = np.round(results.per_row(metric, best)[judging], 4).tolist()
    return found


def gather(place: Place) -> None:
    """Adds to benchmarks/results/claims.json: one line per play."""
    earlier = json.loads(TARGET.read_text(encoding="utf-8"))
    plays: list[dict[str, object]] = []
    tasks: dict[str, object] = earlier["tasks"]
    for task in TASKS:
        wanted = sweep_trials(task) + [
            Trial(task, arm, rate, seed)
            for arm in task.arms()
            for seed in range(task.seeds)
            if (rate := chosen_rate(place, task, arm)) is not None
        ]
        found = [result for one in wanted if (result := place.result(one)) is not None]
        plays += found
        new = [result for result in found if "recipe" in result]
        if not new:
            continue
        recipe: dict[str, object] = new[0]["recipe"]  # type: ignore[assignment]
        for result in new:
            del result["recipe"]
            result["budget"].pop("seconds", None)  # type: ignore[attr-defined]
        for section, keys in (("data", ("train", "held_out", "limit")), ("train", ("learning_rate",))):
            for key in keys:  # paths, and keys that differ between arms
                del recipe[section][key]  # type: ignore[attr-defined]
        tasks[task.name] = {
            "rates": task.rates,
            "planned_seeds": task.seeds,
            "iterations": task.iterations,
            "sweep_iterations": task.sweep_iterations,
            "arms": [asdict(arm) | {"chosen_rate": chosen_rate(place, task, arm)} for arm in task.arms()],
            "only_swept": [asdict(arm) for arm in task.only_swept],
            "recipe": {key: recipe[key] for key in ("data", "generate", "train", "evaluate", "threads")},
            "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, one thread per play",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("sparring", "torch", "transformers", "numpy")},
        }
    head = {
        "what": __doc__.split("\n")[0] if __doc__ else "",
        "machine": earlier["machine"],
        "date": earlier["date"],
        "versions": earlier["versions"],
        "sweep_seed": SWEEP_SEED,
        "tasks": tasks,
    }
    lines = ",\n".join(json.dumps(one) for one in plays)
    TARGET.write_text(json.dumps(head, indent=1)[:-2] + f',\n "plays": [\n{lines}\n]\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The papers' claims at a small size.")
    parser.add_argument("what", choices=("play", "sample", "gather"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9)
    arguments = parser.parse_args()
    place = Place(arguments.folder.resolve(), arguments.stories, arguments.model, arguments.smollm2)
    if arguments.what == "gather":
        gather(place)
        return
    if arguments.what == "sample":
        sample(place, arguments.chats)
        return
    end = time.monotonic() + 60 * arguments.minutes
    for one in to_play(place):
        with only_one(one.folder(place.root) / "lock") as is_mine:
            if is_mine and place.result(one) is None:
                play_one(place, one)
        if time.monotonic() > end:
            return


if __name__ == "__main__":
    main()
