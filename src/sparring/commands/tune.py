"""`sparring tune`: finds the method, learning rate and coefficient that get the most out of the rows in a given time.

A trial is an ordinary run directory that grows by one iteration at a time. Optuna proposes its settings, and ends it
early where others were better after as many iterations (Hyperband, arXiv 1603.06560). The first trials are a grid, the
same for every method. One half of the held-out prompts chooses; the other judges the best other method against the best
SFT, once.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparring.commands.compare import check_comparison_settings, comparison_settings, parse_method, play_arm
from sparring.commands.export import export_model
from sparring.commands.forecast import empty_model
from sparring.data.tables import read_rendered
from sparring.errors import NothingToTrainOn, UserError
from sparring.logging import info
from sparring.model.load import resolve_model
from sparring.recipe.load import Overrides, load_recipe
from sparring.recipe.schema import Recipe
from sparring.report.bars import format_duration
from sparring.report.tuning import Played, Tuning, write_tuning
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import is_done
from sparring.stages.prepare import prepare

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import BaseTrial

COEFFICIENTS = {"spin": ("lambda", 0.1), "tspin": ("alpha", 1.0)}
"""Method -> its tuned coefficient and the paper's value; the range is a factor of 10 to both sides."""
GRID = (0.5, 0.25, 0.75)
"""Where in the range of learning rates, on its logarithmic scale, the first trials of every method lie."""
LABEL, METHODS, SECONDS, LONGEST = "label", "methods", "seconds", "longest"


@dataclass(frozen=True)
class Space:
    """What is searched: methods, and the range of their learning rates."""

    methods: tuple[str, ...]
    low: float
    high: float

    def rate(self, place: float) -> float:
        return self.low * (self.high / self.low) ** place

    def grid(self) -> list[dict[str, str | float]]:
        """The first trials: three rates for every method, with the paper's coefficients."""
        found: list[dict[str, str | float]] = []
        for place in GRID:
            for method in self.methods:
                one: dict[str, str | float] = {"method": method, f"{method}.learning_rate": self.rate(place)}
                if method in COEFFICIENTS:
                    key, value = COEFFICIENTS[method]
                    one[f"{method}.{key}"] = value
                found.append(one)
        return found

    def propose(self, trial: BaseTrial) -> str:
        """A trial as an entry of `compare --methods`, such as spin:lambda=0.3:train.learning_rate=1e-05."""
        method = trial.suggest_categorical("method", self.methods)
        rate = trial.suggest_float(f"{method}.learning_rate", self.low, self.high, log=True)
        parts = [str(method), f"train.learning_rate={rate:.3g}"]
        if method in COEFFICIENTS:
            key, value = COEFFICIENTS[method]
            drawn = trial.suggest_float(f"{method}.{key}", value / 10, value * 10, log=True)
            parts.insert(1, f"{key}={drawn:.3g}")
        return ":".join(parts)


def rate_range(num_parameters: int, *, is_adapter: bool) -> tuple[float, float]:
    """The learning rates to search, by the model's size.

    Around 1e-4 for 135 million parameters and 2e-5 for 7 billion, as full fine-tuning uses them; adapters take ten
    times as much (LoRA Without Regret, Schulman et al., 2025). The range reaches a factor of 30 below, since games are
    published with 5e-7 for 7 billion, and 5 above.
    """
    center = min(5e-4, 1e-4 * (135e6 / num_parameters) ** 0.42) * (10 if is_adapter else 1)
    return center / 30, center * 5


def tune(
    recipe: Recipe | str | Path,
    root: str | Path,
    budget: str,
    *,
    methods: Sequence[str] = (),
    overrides: Overrides = (),
) -> Tuning:
    """Plays trials for `budget` ("2h", "1h30m"), then writes the report, the best recipe and the best model.

    The same call continues, and a larger budget adds to it. Raises `UserError` without Optuna or held-out rows, if the
    methods lack sft, or if they are not those that the directory was started with.
    """
    if find_spec("optuna") is None:
        raise UserError("sparring tune needs Optuna. Run pip install 'sparring[tune]'.")
    recipe = load_recipe(recipe, overrides)
    seconds = parse_budget(budget)
    shared = RunDir(root)
    recipe = comparison_settings(shared, recipe)
    wanted = tuple(dict.fromkeys(methods or default_methods(recipe)))
    for label in wanted:
        if parse_method(label).settings:
            raise UserError(f"--methods {label}: tune chooses the settings itself. Give names only.")
    if "sft" not in wanted:
        raise UserError("--methods: sft must be among them, since all others are judged against tuned SFT.")
    wanted = ("sft", *(name for name in wanted if name != "sft"))  # it is played whatever the budget
    with shared.own():
        check_comparison_settings(shared, recipe)
        if not is_done(shared, shared.data):
            prepare(shared, recipe, [parse_method(name).recipe(recipe, recipe.seed).method for name in wanted])
        if len({row.prompt_key for row in read_rendered(shared.data / "held_out.parquet")}) < 4:
            raise UserError("data.held_out: tune chooses on one half and judges on the other, so it needs 4 prompts.")
        model = empty_model(resolve_model(recipe.model))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        space = Space(wanted, *rate_range(num_parameters, is_adapter=recipe.adapter is not None))
        trials = Trials(shared, recipe)
        study = open_study(shared.root / "tune.log", trials.is_lower_better, recipe.iterations, recipe.seed)
        if (others := study.user_attrs.get(METHODS, list(wanted))) != list(wanted):
            raise UserError(
                f"--methods: {shared.root} was started with {','.join(others)}. Use these, or another folder."
            )
        study.set_user_attr(METHODS, list(wanted))
        search(study, space, recipe.iterations, trials.play, seconds)
        tuning = trials.judge(study, space)
        export_best(tuning)
        write_tuning(tuning)
    return tuning


def default_methods(recipe: Recipe) -> tuple[str, ...]:
    """SFT and the published games; with a checker also rft, and dft where accuracy chooses, since it raises the NLL."""
    found = ["sft", "spin", "tspin", "space"]
    if recipe.evaluate.checker is not None:
        found.append("rft")
        if recipe.evaluate.save_best_by != "held_out_nll":
            found.append("dft")
    return tuple(found)


def parse_budget(text: str) -> float:
    """Seconds of a time such as "2h", "90m" or "1h30m"."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or found is None:
        raise UserError(f"--budget {text}: write hours, minutes or seconds, such as 2h, 90m or 1h30m.")
    return sum(float(number or 0) * unit for number, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def open_study(file: Path | None, is_lower_better: bool, iterations: int, seed: int) -> Study:
    """Optuna's study in `file`, which only grows: a killed search continues with its trials. None: in memory."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="tune",
        storage=None if file is None else JournalStorage(JournalFileBackend(str(file))),
        load_if_exists=True,
        direction="minimize" if is_lower_better else "maximize",
        pruner=optuna.pruners.HyperbandPruner(max_resource=max(2, iterations), reduction_factor=2),
    )
    seed += len(study.trials)  # continued with the same one, it would propose what it has tried
    study.sampler = optuna.samplers.TPESampler(
        seed=seed, group=True, multivariate=True, warn_independent_sampling=False
    )
    return study


def search(
    study: Study, space: Space, iterations: int, play: Callable[[str, int], tuple[float | None, float]], budget: float
) -> None:
    """Plays trials until the budget, in seconds, has no room for another iteration as long as the longest one.

    `play(label, index)` plays an iteration of a trial, and returns the trial's best value so far and the seconds it
    took; None if the method has nothing to train on, which ends the trial. The first one is played in any case.
    """
    from optuna.trial import Trial, TrialState

    if not study.trials:
        for one in space.grid():
            study.enqueue_trial(one)
    while True:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        trial = Trial(study, running[0]._trial_id) if running else study.ask()  # one that was killed continues
        known = running[0].intermediate_values if running else {}
        label, index, state = space.propose(trial), len(known), TrialState.COMPLETE
        trial.set_user_attr(LABEL, label)
        value = known.get(index)
        while index < iterations and state == TrialState.COMPLETE:
            spent, longest = (study.user_attrs.get(key, 0.0) for key in (SECONDS, LONGEST))
            if spent + longest > budget and (trial.number or index):
                return
            value, seconds = play(label, index)
            study.set_user_attr(SECONDS, spent + seconds)
            study.set_user_attr(LONGEST, max(longest, seconds))
            index += 1
            if value is None:
                state = TrialState.FAIL
                break
            trial.report(value, index)
            if trial.should_prune():
                state = TrialState.PRUNED
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)


class Trials:
    """Plays and judges the trials of one tuning."""

    def __init__(self, shared: RunDir, recipe: Recipe) -> None:
        self.shared, self.recipe = shared, recipe
        self.is_lower_better = recipe.evaluate.save_best_by == "held_out_nll"
        self.folder = shared.root / "trials"

    def run(self, label: str) -> RunDir:
        return RunDir(self.folder / parse_method(label).folder)

    def play(self, label: str, index: int) -> tuple[float | None, float]:
        """Plays a trial up to iteration `index`; returns its best value on the prompts that choose, and seconds."""
        info(f"\n{label}, iteration {index}")
        start = time.monotonic()
        settings = parse_method(label).recipe(self.recipe, self.recipe.seed)
        run = self.run(label)
        others = [RunDir(recipe.parent) for recipe in sorted(self.folder.glob("*/recipe.yaml"))]
        donors = [other for other in others if other.root != run.root]
        try:
            play_arm(self.shared, run, settings.model_copy(update={"iterations": index + 1}), 1.0, donors)
        except NothingToTrainOn as error:
            info(f"{label} ends here: {error}")
            return None, time.monotonic() - start
        results = Results(run.root)
        choosing, _ = results.halves
        best = results.best_of(range(-1, index + 1), choosing)
        return results.value(self.recipe.evaluate.save_best_by, best, choosing).mean, time.monotonic() - start

    def judge(self, study: Study, space: Space) -> Tuning:
        """Compares the best trial of another method with the best one of sft, on the prompts that chose neither."""
        played = [
            Played(
                label=trial.user_attrs[LABEL],
                iterations=len(trial.intermediate_values),
                value=(min if self.is_lower_better else max)(trial.intermediate_values.values()),
                results=Results(self.run(trial.user_attrs[LABEL]).root),
            )
            for trial in study.get_trials(deepcopy=False)
            if trial.intermediate_values
        ]
        unique = list({one.label: one for one in sorted(played, key=lambda one: one.iterations)}.values())
        return Tuning(self.shared.root, self.recipe, unique, (space.low, space.high), study.user_attrs[SECONDS])


def export_best(tuning: Tuning) -> None:
    """Writes best.yaml and, unless the starting model is the best, the model in model/."""
    best, folder = tuning.returned, tuning.root / "model"
    shutil.copyfile(best.results.run.recipe, tuning.root / "best.yaml")
    shutil.rmtree(folder, ignore_errors=True)  # of a smaller budget
    if best.iteration >= 0:
        export_model(best.results, folder, iteration=str(best.iteration))
    info(f"\n{tuning.verdict}\nSearched for {format_duration(tuning.seconds)}. Report: {tuning.root / 'report.html'}")
