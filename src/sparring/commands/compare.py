"""`sparring compare`: compares methods on one data set, split and starting model, over seeds and fractions of the rows.

Every arm is an ordinary run directory, so finished work is not repeated. What the arms share is computed once: the
prepared rows, the starting model's evaluation, and the first opponent's responses and scores.
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
from sparring.loop import play
from sparring.objectives import OBJECTIVES
from sparring.recipe import yaml
from sparring.recipe.load import differences, load_recipe, make_recipe
from sparring.recipe.schema import Recipe
from sparring.report.comparison import Arm, Comparison, write_comparison
from sparring.run.iteration import DataSummary, Iteration, seed_of
from sparring.run.manifest import commit, copy_committed, is_committed, make_folder, read_manifest, replace_file
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings, is_done, keep_dtype, load_sealed_recipe, seal_recipe
from sparring.stages.prepare import prepare

PER_METHOD = frozenset(
    ("optimizer", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "epochs", "batch_size", "sft_weight")
)
"""The settings of `train` that may differ between methods. All others affect what is evaluated, and on what."""


@dataclass(frozen=True)
class Method:
    """An entry of --methods: "space", or with settings "space:mu=3:train.learning_rate=1e-4"."""

    label: str
    name: str
    settings: tuple[tuple[tuple[str, ...], object], ...]

    @property
    def folder(self) -> str:
        return self.label.replace(":", "_")

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The base recipe with this method. Coefficients are the base's if it has the method, else the paper's."""
        raw = base.model_dump(by_alias=True, mode="json") | {"seed": seed, "stop": {}}  # no arm stops early
        if base.method.name != self.name:
            raw["method"] = {"name": self.name}
            kept = {
                index: {key: value for key, value in table.items() if key.partition(".")[0] != "method"}
                for index, table in base.per_iteration.items()
            }
            raw["per_iteration"] = {index: table for index, table in kept.items() if table}
        for path, value in self.settings:
            yaml.set_key(raw, path, value)
        return make_recipe(raw, source=f"--methods {self.label}: ")


def parse_method(label: str) -> Method:
    name, *parts = label.split(":")
    if name not in OBJECTIVES or not re.fullmatch(r"[\w.:=+-]+", label):
        raise UserError(f"--methods: unknown method '{name}'. Use one of {', '.join(OBJECTIVES)}.")
    settings = []
    for part in parts:
        key, equals, text = part.partition("=")
        section, dot, setting = key.partition(".")
        if not equals or (dot and (section != "train" or setting not in PER_METHOD)):
            raise UserError(
                f"--methods: '{part}' of '{label}' cannot be set per method. Use a coefficient (lambda=1) or one of "
                f"{', '.join(f'train.{name}' for name in sorted(PER_METHOD))}."
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
    """Runs every method with every seed on every fraction of the training rows, and writes the comparison.

    The same call continues it. A call with more methods, seeds or fractions adds to it. Raises `UserError` if the arms
    would not be comparable.
    """
    recipe = load_recipe(recipe, overrides)
    chosen = [parse_method(label) for label in methods]
    if seeds < 1 or len({m.folder for m in chosen}) < len(chosen) or not all(0 < share <= 1 for share in fractions):
        raise UserError("--methods must differ, --seeds must be 1 or more, and --fractions above 0 and at most 1.")
    if recipe.data.self_play_rows is not None:
        raise UserError(
            "data.self_play_rows: a comparison has no sft phase. To compare methods on rows that sft did not see, run "
            "sft separately, then set model to its result and data.train to the other rows."
        )
    shared = RunDir(root)
    recipe = comparison_settings(shared, recipe)
    plans = [
        (method, seed, share, method.recipe(recipe, recipe.seed + seed))
        for share in sorted(fractions, reverse=True)
        for seed in range(seeds)
        for method in chosen
    ]
    with shared.own():
        check_comparison_settings(shared, recipe)
        if not is_done(shared, shared.data):
            prepare(shared, recipe, [settings.method for *_, settings in plans])
        summary = DataSummary.read(shared.data / "summary.json")
        if not summary.num_held_out:
            raise UserError("data.held_out: a comparison needs held-out rows. Set it above 0.")
        arms: list[Arm] = []
        for number, (method, seed, share, settings) in enumerate(plans, start=1):
            name = method.folder if share == 1 else f"{method.folder}-{share:g}"
            run = RunDir(shared.root / f"seed-{seed}" / name)
            info(f"\nRun {number} of {len(plans)}: {method.label}, seed {seed}, {share:.0%} of the rows")
            donors = [arm.run for arm in arms if (arm.seed, arm.share) == (seed, share)]
            arms.append(Arm(method.label, seed, share, play_arm(shared, run, settings, share, donors)))
        comparison = Comparison(shared.root, recipe, arms)
        write_comparison(comparison)
    return comparison


def play_arm(shared: RunDir, run: RunDir, settings: Recipe, share: float, donors: Sequence[RunDir]) -> RunDir:
    """Plays a run on rows that `shared` has prepared, with what donors of the same seed and rows have computed."""
    make_folder(run.root)
    check_settings(run, settings)
    copy_rows(shared, run, share, settings.seed)
    reuse_stages(Iteration(run, settings.at(0), 0), donors)
    return play(settings, run.root).run


def comparison_settings(shared: RunDir, recipe: Recipe) -> Recipe:
    """The recipe that all arms share, with the dtype of a comparison that is there."""
    path = shared.root / "comparison.yaml"
    return keep_dtype(recipe, load_sealed_recipe(path)) if path.is_file() else recipe


def check_comparison_settings(shared: RunDir, recipe: Recipe) -> None:
    """Writes the recipe that all arms share to comparison.yaml. Raises `RunMismatch` if another one is there."""
    path = shared.root / "comparison.yaml"
    if path.is_file():
        if changed := differences(load_sealed_recipe(path), recipe):
            raise RunMismatch(
                f"{shared.root} contains a comparison with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another directory, or restore the old values."
            )
    elif any(shared.root.glob("*.yaml")):
        raise RunMismatch(f"{shared.root} contains a single run. Use another directory.")
    replace_file(path, seal_recipe(recipe))


def copy_rows(shared: RunDir, run: RunDir, share: float, seed: int) -> None:
    """Copies the prepared rows, or a fraction of them, to a run. Rows are ordered by hash, so fractions are nested."""
    if is_done(run, run.data):
        return
    rows = read_rendered(shared.data / "train.parquet")
    order = sorted(rows, key=lambda row: seed_of(seed, "share", row.id))
    kept = {row.id for row in order[: max(1, round(share * len(rows)))]}
    summary = DataSummary.read(shared.data / "summary.json")
    with commit(run.data, input_digests=read_manifest(shared.data).input_digests) as folder:
        write_rows(folder / "train.parquet", [row for row in rows if row.id in kept])
        replace(summary, num_train=len(kept)).write(folder / "summary.json")
        for name in ("held_out.parquet", "skipped.jsonl"):
            shutil.copyfile(shared.data / name, folder / name)


def reuse_stages(first: Iteration, donors: Sequence[RunDir]) -> None:
    """Copies stages of the starting model from arms with the same seed and rows."""
    needs, batch_size = first.recipe.method.needs, first.recipe.train.batch_size
    for donor in donors:
        recipe = load_sealed_recipe(donor.recipe).at(0)
        other = recipe.method.needs
        stages = [(first.run.start / "evaluate", donor.start / "evaluate")]
        if needs.rounds and other.rounds:
            stages.append((first.stage("generate"), donor.stage(0, "generate")))
            is_same_cut = batch_size == recipe.train.batch_size  # of the micro-batches
            are_same_scores = (needs.roles, needs.teacher) == (other.roles, other.teacher)
            if needs.opponent and other.opponent and are_same_scores and is_same_cut:
                stages.append((first.stage("score"), donor.stage(0, "score")))
        for target, source in stages:
            if is_committed(source) and not target.exists():
                copy_committed(source, target)
