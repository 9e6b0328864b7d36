"""compare(): several methods on one data set, one split and one starting model, over seeds and shares of the data.

Every arm is a run directory like any other, so what is done is not done again, and all that the arms have in common is
made once: the prepared rows, the starting model's evaluation, and the first opponent's answers and scores.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparring.data.tables import read_rendered, write_rows
from sparring.errors import RunMismatch, UserError
from sparring.logging import info
from sparring.loop import check_settings, is_done, play
from sparring.objectives import OBJECTIVES
from sparring.recipe import yaml
from sparring.recipe.load import differences, load_recipe, make_recipe
from sparring.recipe.schema import Recipe
from sparring.report.comparison import Arm, Comparison, write_comparison
from sparring.run.iteration import DataSummary, Iteration, seed_of
from sparring.run.manifest import commit, copy_committed, is_committed, make_folder, read_manifest, replace_file
from sparring.run.rundir import RunDir
from sparring.run.session import load_sealed_recipe, seal_recipe
from sparring.stages.prepare import prepare

FREE = frozenset(
    ("optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "epochs", "batch_size", "sft_weight")
)
"""What of `train` may differ between methods. Everything else decides what is evaluated, and on what."""


@dataclass(frozen=True)
class Method:
    """One of --methods: "space", or with settings "space:mu=3:train.learning_rate=1e-4"."""

    label: str
    name: str
    settings: tuple[tuple[tuple[str, ...], object], ...]

    @property
    def folder(self) -> str:
        return self.label.replace(":", "_")

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The base recipe with this method: its own coefficients where the base names it, else the published ones."""
        raw = {
            **base.model_dump(by_alias=True, mode="json"),
            "seed": seed,
            "stop": {},
        }  # all arms are played to the end
        if base.method.name != self.name:
            raw["method"] = {"name": self.name}
            kept = {
                index: {key: value for key, value in table.items() if key.partition(".")[0] != "method"}
                for index, table in base.per_iteration.items()
            }
            raw["per_iteration"] = {index: table for index, table in kept.items() if table}
            if not raw["per_iteration"]:
                del raw["per_iteration"]  # T-SPIN then has its own
        for path, value in self.settings:
            yaml.set_key(raw, path, value)
        return make_recipe(raw, source=f"--methods {self.label}: ")


def parse_method(label: str) -> Method:
    name, *parts = label.split(":")
    if name not in OBJECTIVES or not re.fullmatch(r"[\w.:=+-]+", label):
        raise UserError(f"--methods: '{name}' is none of {', '.join(OBJECTIVES)}")
    settings = []
    for part in parts:
        key, equals, text = part.partition("=")
        section, dot, setting = key.partition(".")
        if not equals or (dot and (section != "train" or setting not in FREE)):
            raise UserError(
                f"--methods: '{part}' of '{label}' is no setting of one method: a coefficient (lambda=1) or one of "
                f"{', '.join(f'train.{name}' for name in sorted(FREE))}"
            )
        value, _ = yaml.parse(text, f"--methods {label}")
        settings.append(((section, setting) if dot else ("method", key), value))
    return Method(label, name, tuple(settings))


def compare(
    recipe: Recipe | str | Path,
    root: str | Path,
    methods: Sequence[str],
    *,
    seeds: int = 3,
    fractions: Sequence[float] = (1.0,),
    overrides: Sequence[str] = (),
) -> Comparison:
    """Plays every method with every seed on every fraction of the training rows, and writes the comparison.

    The same call again continues it; more methods, seeds and fractions are added to what is there. Raises `UserError`
    where the arms would not be comparable.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), overrides)
    chosen = [parse_method(label) for label in methods]
    if seeds < 1 or len({m.folder for m in chosen}) < len(chosen) or not all(0 < share <= 1 for share in fractions):
        raise UserError("--methods must differ, --seeds be 1 or more, --fractions lie above 0 and up to 1")
    if recipe.data.self_play_rows is not None:
        raise UserError(
            "data.self_play_rows is for one run with an sft phase; to compare games on rows that sft did not see, run the "
            "sft phase by itself and compare from its model, with data.train the other rows"
        )
    plans = [
        (method, seed, share, method.recipe(recipe, recipe.seed + seed))
        for share in sorted(fractions, reverse=True)
        for seed in range(seeds)
        for method in chosen
    ]
    whole = RunDir(root)
    with whole.own():
        check_comparison_settings(whole, recipe)
        if not is_done(whole, whole.data):
            prepare(whole, recipe)
        summary = DataSummary.read(whole.data / "summary.json")
        if not summary.num_held_out:
            raise UserError("data.held_out leaves no row to compare by")
        arms: list[Arm] = []
        for number, (method, seed, share, settings) in enumerate(plans, start=1):
            place = RunDir(
                whole.root / f"seed-{seed}" / (method.folder if share == 1 else f"{method.folder}-{share:g}")
            )
            info(f"\n{number} of {len(plans)}: {method.label}, seed {seed}, {share:.0%} of the rows")
            make_folder(place.root)
            check_settings(place, settings)
            copy_rows(whole, place, share, settings.seed)
            donors = [arm.run for arm in arms if (arm.seed, arm.share) == (seed, share)]
            reuse_stages(Iteration(place, settings.at(0), 0), donors)
            arms.append(Arm(method.label, seed, share, play(settings, place.root)))
        comparison = Comparison(whole.root, recipe, arms)
        write_comparison(comparison)
    return comparison


def check_comparison_settings(whole: RunDir, recipe: Recipe) -> None:
    """Keeps the recipe that all arms share as comparison.yaml, or refuses another one."""
    path = whole.root / "comparison.yaml"
    if path.is_file():
        if changed := differences(load_sealed_recipe(path), recipe):
            raise RunMismatch(f"{whole.root} holds a comparison with other settings:\n  " + "\n  ".join(changed))
    elif any(whole.root.glob("*.yaml")):
        raise RunMismatch(f"{whole.root} holds a run of its own; use another directory")
    replace_file(path, seal_recipe(recipe))


def copy_rows(whole: RunDir, place: RunDir, share: float, seed: int) -> None:
    """Gives a run the prepared rows, or a share of them: by hash, so that a smaller share lies inside a larger one."""
    if is_done(place, place.data):
        return
    rows = read_rendered(whole.data / "train.parquet")
    order = sorted(rows, key=lambda row: seed_of(seed, "share", row.id))
    kept = {row.id for row in order[: max(1, round(share * len(rows)))]}
    summary = DataSummary.read(whole.data / "summary.json")
    with commit(place.data, input_digests=read_manifest(whole.data).input_digests) as folder:
        write_rows(folder / "train.parquet", [row for row in rows if row.id in kept])
        replace(summary, num_train=len(kept)).write(folder / "summary.json")
        for name in ("held_out.parquet", "rejected.jsonl"):
            shutil.copyfile(whole.data / name, folder / name)


def reuse_stages(first: Iteration, donors: Sequence[RunDir]) -> None:
    """Copies what another arm of the same seed and rows has already made of the starting model."""
    method = first.recipe.method
    for donor in donors:
        other = load_sealed_recipe(donor.recipe).at(0).method
        stages = [(first.run.start / "evaluate", donor.start / "evaluate")]
        if method.needs.rounds and other.needs.rounds:
            stages.append((first.stage("generate"), donor.stage(0, "generate")))
            if method.needs.opponent and other.needs.opponent and method.needs.roles == other.needs.roles:
                stages.append((first.stage("score"), donor.stage(0, "score")))
        for mine, theirs in stages:
            if is_committed(theirs) and not mine.exists():
                copy_committed(theirs, mine)
