"""play(): for each iteration, for each stage, if it is not done. The run directory is the only state."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparring.errors import UserError
from sparring.logging import info, log_event
from sparring.model.load import resolve_model
from sparring.objectives import Dft
from sparring.parallel import interrupt, num_usable_cpus
from sparring.recipe.load import Overrides, load_recipe, parse_overrides
from sparring.recipe.schema import Recipe
from sparring.report import write_report
from sparring.run.in_memory import Rows, file_of, keep_rows, model_folder, tokenizer_settings
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed
from sparring.run.mirror import Mirror
from sparring.run.results import Results, StageState, name_methods
from sparring.run.rundir import RunDir
from sparring.run.session import (
    PACKAGES,
    check_settings,
    fetch_from_mirror,
    is_done,
    record_session,
)
from sparring.run.tracking import NO_TRACKER, Tracker, steps_before, tracking
from sparring.stages.launch import launch_stage
from sparring.stages.prepare import ON_ANOTHER_SIDE, check_dependencies, optional_packages, prepare

OnStageEnd = Callable[[Results, StageState], object]
OnIterationEnd = Callable[[Results, int], object]


def play(
    recipe: Recipe | str | Path | None = None,
    run_dir: str | Path | None = None,
    overrides: Overrides = (),
    *,
    model: str | Path | None = None,
    method: str | Mapping[str, object] | None = None,
    train: str | Path | Rows | None = None,
    held_out: str | Path | float | Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_stage_end: OnStageEnd | None = None,
    on_iteration_end: OnIterationEnd | None = None,
) -> Results:
    """Plays a recipe in a run directory, or continues it there. Ends with the report written.

    `model`, `method`, `train` and `held_out` replace those settings of the recipe, or stand in for one; `overrides` has
    all others under dotted keys, such as {"train.epochs": 1}. Rows in memory are kept in the run directory. Of a loaded
    tokenizer the chat template and the end token are used; its tokens must be those of the model's own.

    The same call continues a run that was stopped, or finds that everything is done. Raises `UserError` for what the
    user has to fix, and `RunError` where continuing would harm what is there.

    `on_stage_end(results, stage)` and `on_iteration_end(results, index)` are called in this process, once, after what
    they name is committed; not for what an earlier call did. What they raise ends the run; the same call continues it.
    """
    if run_dir is None:
        raise UserError("run_dir is missing. Name the folder that keeps the run, for example run_dir='runs/mine'.")
    run, rows = RunDir(run_dir), dict[str, Rows]()
    named: dict[str, object] = {
        "model": model_folder(model),
        "method": method,
        "data.train": train,
        "data.held_out": held_out,
    }
    for name, given in (("train", train), ("held_out", held_out)):
        if not isinstance(given, str | Path | float | int | None):
            named[f"data.{name}"], rows[name] = file_of(run, name, given), given
    named = {k: str(value) if isinstance(value, Path) else value for k, value in named.items() if value is not None}
    settings = load_recipe(recipe, {**named, **parse_overrides(overrides)})
    if tokenizer is not None:
        settings = load_recipe(settings, tokenizer_settings(tokenizer, resolve_model(settings.model), settings.data))
    play_recipe(run, settings, rows, on_stage_end, on_iteration_end)
    return Results(run.root)


def play_recipe(
    run: RunDir,
    recipe: Recipe,
    rows: Mapping[str, Rows],
    on_stage_end: OnStageEnd | None,
    on_iteration_end: OnIterationEnd | None,
) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sparring was started by a launcher. Start it with 'sparring run' and set launch: torchrun.")
    mirror = None if recipe.mirror is None else Mirror(recipe.mirror)
    with run.own(), interrupt.listening():
        if mirror is not None:
            fetch_from_mirror(run, recipe, mirror)
        recipe = begin(run, recipe, rows)
        if mirror is not None:
            mirror.send_all(run)
        report_settings(run, recipe)
        with tracking(run, recipe.track, recipe.model_dump(by_alias=True, mode="json")) as tracker:
            has_worked = play_iterations(run, recipe, mirror, tracker, on_stage_end, on_iteration_end)
        if has_worked or not run.report.is_file():
            write_report(run)
            if mirror is not None:
                mirror.send_note(run, run.report)
        state = "Done" if has_worked else "Everything was done already"
        info(f"{state}. Report: {run.report}", "done", report=str(run.report))


def play_iterations(
    run: RunDir,
    recipe: Recipe,
    mirror: Mirror | None,
    tracker: Tracker,
    on_stage_end: OnStageEnd | None,
    on_iteration_end: OnIterationEnd | None,
) -> bool:
    """Runs every stage that is not done; returns whether there was one."""
    has_worked = False
    for index in range(-1, recipe.iterations):
        iteration, is_new = Iteration(run, recipe.at(index), index), False
        for stage in iteration.stages:
            interrupt.stop_if_asked()
            if run_stage(iteration, stage, tracker):
                has_worked = is_new = True
                if mirror is not None:
                    mirror.send(run, iteration.stage(stage))
                if on_stage_end is not None:
                    results = Results(run.root)
                    on_stage_end(results, next(s for s in results.stages() if (s.iteration, s.stage) == (index, stage)))
        if is_new and index >= 0 and on_iteration_end is not None:
            on_iteration_end(Results(run.root), index)
        if 0 <= index < recipe.iterations - 1 and (reason := Results(run.root).reason_to_stop(index)):
            info(f"The run stops after iteration {index}: {reason}.")
            break
    return has_worked


def begin(run: RunDir, recipe: Recipe, rows: Mapping[str, Rows]) -> Recipe:
    """The data stage, if it is not done; returns the settings that the run keeps.

    A run that is refused here leaves nothing in the way of the next attempt.
    """
    try:
        recipe = check_settings(run, recipe)
        check_dependencies(recipe)
        # torch counts the machine's cores, and more threads than a container may use wait for each other
        torch.set_num_threads(recipe.threads or min(torch.get_num_threads(), num_usable_cpus()))
        record_session(run, (*PACKAGES, *optional_packages(recipe)))
        keep_rows(run, rows)
        if not is_done(run, run.data):
            prepare(run, recipe)
        return recipe
    except UserError:
        if not run.has_begun:
            for note in (run.recipe, run.env):
                note.unlink(missing_ok=True)
        raise


def run_stage(iteration: Iteration, stage: str, tracker: Tracker = NO_TRACKER) -> bool:
    """Runs a stage unless it is done. Returns whether there was something to do."""
    run, final = iteration.run, iteration.stage(stage)
    if is_done(run, final):
        shutil.rmtree(run.work(final), ignore_errors=True)  # left by a crash just after the commit
        return False
    start = time.monotonic()
    log_event("stage begins", iteration=iteration.index, stage=stage)
    launch_stage(iteration, stage, tracker)
    shutil.rmtree(run.work(final), ignore_errors=True)  # what ranks gathered is in what was committed
    metrics = {}
    if stage == "evaluate":
        metrics = json.loads((final / "metrics.json").read_text(encoding="utf-8"))
        tracker.evaluation(iteration.index, metrics, steps_before(run, iteration.index + 1))
    seconds = time.monotonic() - start
    info(
        f"{iteration.name}: {stage} {seconds:.1f} s{Results(run.root).describe_stage(iteration, stage)}",
        "stage",
        iteration=iteration.index,
        stage=stage,
        seconds=round(seconds, 3),
        metrics=metrics,
    )
    return True


def run_one_stage(recipe: Recipe, run_dir: str | Path, stage: str, index: int) -> bool:
    """Runs one stage of a run by hand; the stages before it must be done. Returns whether there was something to do."""
    run = RunDir(run_dir)
    if not run.recipe.is_file() or not is_committed(run.data):
        raise UserError(f"{run.root} is not a run yet. Start it with 'sparring run RECIPE {run.root}'.")
    if not -1 <= index < recipe.iterations:
        raise UserError(f"--iteration {index}: the run has iterations 0 to {recipe.iterations - 1}, and -1, its start.")
    with run.own(), interrupt.listening():
        recipe = check_settings(run, recipe)
        # torch counts the machine's cores, and more threads than a container may use wait for each other
        torch.set_num_threads(recipe.threads or min(torch.get_num_threads(), num_usable_cpus()))
        for earlier in range(-1, index + 1):
            iteration = Iteration(run, recipe.at(earlier), earlier)
            if earlier == index and stage not in iteration.stages:
                raise UserError(
                    f"--stage {stage}: {recipe.method.name} has no such stage here. It has "
                    f"{', '.join(iteration.stages)}."
                )
            for name in iteration.stages:
                if earlier == index and name == stage:
                    return run_stage(iteration, stage)
                if not is_committed(iteration.stage(name)):
                    raise UserError(
                        f"'{name}' of iteration {earlier} must be done first: {iteration.stage(name)} does not exist."
                    )
    raise AssertionError("unreachable")


def report_settings(run: RunDir, recipe: Recipe) -> None:
    """What is played, on which rows, and what a user should know about them."""
    data = Iteration(run, recipe, 0).data
    info(
        f"{name_methods(recipe)}: {recipe.iterations} iterations, {data.num_train:,} training rows ({data.format}), "
        f"{data.num_held_out:,} held out, responses end with {data.end_token!r}; run directory {run.root}",
        "run",
        run_dir=str(run.root),
        method=name_methods(recipe),
        iterations=recipe.iterations,
        training_rows=data.num_train,
        held_out_rows=data.num_held_out,
    )
    if data.num_self_play:
        info(f"{data.num_self_play:,} of the training rows are kept for self-play; sft iterations never see them.")
    elsewhere = {reason: count for reason, count in data.skipped.items() if reason.startswith(ON_ANOTHER_SIDE)}
    for reason, count in elsewhere.items():
        info(f"note: {count:,} rows are left out, since {reason}")
    if num_unusable := sum(data.skipped.values()) - sum(elsewhere.values()):
        info(f"note: {num_unusable:,} rows cannot be used; see {run.data / 'skipped.jsonl'}")
    if data.num_near_duplicates:
        info(
            f"note: {data.num_near_duplicates:,} prompts differ from another one only in case, white space, Unicode "
            "form or system prompt; each stays on the same side of the split as that one"
        )
    for what, count in data.left_out.items():
        info(f"note: the chat template leaves out {what} in {count:,} rows")
    if data.num_checked and data.num_checked < data.num_held_out:
        info(f"note: evaluate.checker finds an answer in {data.num_checked:,} held-out rows; the others do not count")
    if data.num_truncated:
        info(
            f"note: {data.num_truncated:,} of {data.num_train + data.num_held_out:,} real responses were truncated, "
            f"like generated ones, at generate.max_new_tokens ({recipe.generate.max_new_tokens}) or train.max_length"
        )
    if data.max_length < recipe.train.max_length:
        info(f"note: train.max_length is {data.max_length}, the model's context (with LongRoPE, its original context)")
    if isinstance(recipe.method, Dft) and recipe.evaluate.save_best_by == "held_out_nll":
        info(
            "note: dft raises the held-out NLL by design, so the best iteration by it is the first. Set "
            "evaluate.checker, and evaluate.save_best_by: greedy_accuracy"
        )
    needs = recipe.method.needs
    if needs.rounds and not needs.accepted and (recipe.generate.temperature != 1 or recipe.generate.top_p != 1):
        info(
            "note: the methods are defined on true samples of the opponent (temperature 1, top_p 1). With temperature "
            f"{recipe.generate.temperature:g} and top_p {recipe.generate.top_p:g} their fixed points move"
        )
    if not data.num_held_out:
        info("note: no row is held out, so nothing is evaluated")
