"""play(): for each iteration, for each stage, if it is not done. The run directory is the only state."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from sparring import distributed
from sparring.commits import is_committed, replace_file
from sparring.config import Recipe
from sparring.errors import Refused, RunMismatch
from sparring.evaluate import evaluate
from sparring.generate import engine_of, generate
from sparring.iteration import Iteration
from sparring.launch import draw_on_devices
from sparring.prepare import prepare
from sparring.progress import say
from sparring.recipe_file import differences, dump_recipe, load_recipe
from sparring.report import write_report
from sparring.results import Results
from sparring.rundir import RunDir
from sparring.score import score
from sparring.train import train

PACKAGES = ("sparring", "torch", "transformers", "accelerate", "safetensors", "numpy")


def play(recipe: Recipe | str | Path, run_dir: str | Path, overrides: Sequence[str] = ()) -> RunDir:
    """Plays a recipe in a run directory, or continues it there. Ends with the report written.

    Called again with the same recipe it goes on where it was stopped, or finds that all is done. Raises
    `Refused` for what the user has to mend, `Stopped` where going on would harm what is there.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe), overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Refused("sparring was started by a launcher; start it with 'sparring run' and set 'launch: torchrun'")
    run = RunDir(run_dir)
    with run.own():
        settle(run, recipe)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        record_session(run)
        if is_committed(run.data):
            run.check_lineage(run.data)
        else:
            prepare(run, recipe)
        say_what_is_played(run, recipe)
        worked = False
        for index in range(-1, recipe.iterations):
            iteration = Iteration(run, recipe.at(index), index)
            for stage in iteration.stages:
                worked = run_stage(iteration, stage) or worked
            if 0 <= index < recipe.iterations - 1 and (reason := Results(run.root).reason_to_stop(index)):
                say(f"the run ends with iteration {index}: {reason}")
                break
        if worked or not run.report.is_file():
            write_report(run)
        say(f"{'done' if worked else 'all was done already'}; report: {run.report}")
    return run


def run_stage(iteration: Iteration, stage: str) -> bool:
    """Runs a stage unless it is done. Returns whether there was something to do."""
    final = iteration.stage(stage)
    if is_committed(final):
        iteration.run.check_lineage(final)
        shutil.rmtree(iteration.run.work(final), ignore_errors=True)  # left by a death just after the commit
        return False
    engine = engine_of(iteration)
    start = time.monotonic()
    match stage:
        case "generate":
            if iteration.recipe.launch == "torchrun":
                draw_on_devices(iteration)
            generate(iteration, engine)
        case "score":
            score(iteration)
        case "train":
            train(iteration)
        case "evaluate":
            evaluate(iteration, engine)
        case _:
            raise ValueError(stage)
    where = "start" if iteration.index < 0 else f"iteration {iteration.index}"
    say(f"{where}: {stage} {time.monotonic() - start:.1f} s{headline(iteration) if stage == 'evaluate' else ''}")
    return True


def run_one_stage(run_dir: str | Path, stage: str, index: int) -> bool:
    """Runs one stage of a run by hand; the stages before it must be done."""
    run = RunDir(run_dir)
    if not run.recipe.is_file() or not is_committed(run.data):
        raise Refused(f"{run.root} is not a run yet; start it with 'sparring run RECIPE {run.root}'")
    recipe = load_recipe(run.recipe)
    if not -1 <= index < recipe.iterations:
        raise Refused(
            f"--iteration {index}: the run has the iterations 0 to {recipe.iterations - 1}, and -1, its start"
        )
    with run.own():
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        for earlier in range(-1, index + 1):
            iteration = Iteration(run, recipe.at(earlier), earlier)
            if earlier == index and stage not in iteration.stages:
                raise Refused(f"{recipe.method.name} has no stage '{stage}' here; it has {', '.join(iteration.stages)}")
            for name in iteration.stages:
                if earlier == index and name == stage:
                    return run_stage(iteration, stage)
                if not is_committed(iteration.stage(name)):
                    raise Refused(f"'{name}' of iteration {earlier} comes first: {iteration.stage(name)} is not there")
    raise AssertionError("unreachable")


def settle(run: RunDir, recipe: Recipe) -> None:
    """Writes the resolved recipe, or refuses settings that would change what is already there."""
    if run.recipe.is_file():
        if changed := differences(load_recipe(run.recipe), recipe):
            raise RunMismatch(
                f"{run.root} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another run directory"
            )
    elif is_committed(run.data):
        raise RunMismatch(f"{run.root} has data but no recipe.yaml; use another run directory")
    replace_file(run.recipe, dump_recipe(recipe))


def record_session(run: RunDir) -> None:
    """Adds to env.json what this process runs on. Says so when the software has changed since the run began."""
    sessions = json.loads(run.env.read_text(encoding="utf-8")) if run.env.is_file() else []
    session = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": source_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "device": str(distributed.device()),
        "threads": torch.get_num_threads(),
    }
    for key in ("versions", "device", "threads"):
        if sessions and sessions[0][key] != session[key]:
            say(
                f"note: {key} were {sessions[0][key]} when this run began and are {session[key]} now; "
                "what is made from here on may differ in rounding"
            )
    replace_file(run.env, json.dumps([*sessions, session], indent=1) + "\n")


def source_commit() -> str | None:
    """The commit of the source tree that this package runs from, if it runs from one."""
    tree = Path(__file__).parents[2]
    if not (tree / ".git").exists():
        return None
    # the path comes from this file, and git gets no words of anybody else
    found = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603, S607
    return found.stdout.strip() or None


def say_what_is_played(run: RunDir, recipe: Recipe) -> None:
    data = Iteration(run, recipe, 0).data
    say(
        f"{recipe.method.name}: {recipe.iterations} iterations, {data.num_train:,} training rows ({data.shape}), "
        f"{data.num_held_out:,} held out, answers end with {data.end_token!r}; run directory {run.root}"
    )
    if data.rejected:
        say(f"note: {sum(data.rejected.values())} rows cannot be used, listed in {run.data / 'rejected.jsonl'}")
    if data.num_cut:
        say(
            f"note: {data.num_cut:,} of {data.num_train + data.num_held_out:,} real answers were cut, as generated "
            f"ones are, at generate.max_new_tokens ({recipe.generate.max_new_tokens}) or train.max_length"
        )
    if data.max_length < recipe.train.max_length:
        say(f"note: the model's context is {data.max_length} tokens, so train.max_length is that")
    if recipe.method.needs.rounds and (recipe.generate.temperature != 1 or recipe.generate.top_p != 1):
        say(
            "note: the games are defined on true samples of the opponent (temperature 1, top_p 1); with "
            f"temperature {recipe.generate.temperature:g} and top_p {recipe.generate.top_p:g} their fixed points move"
        )
    if not data.num_held_out and recipe.evaluate.held_out:
        say("note: no row is held out, so nothing is evaluated")


def headline(iteration: Iteration) -> str:
    metrics = json.loads((iteration.stage("evaluate") / "metrics.json").read_text(encoding="utf-8"))
    parts = [f"held-out NLL {metrics['held_out_nll']:.4f}"]
    parts += [
        f"{name} accuracy {metrics[f'{name}_accuracy']:.3f}"
        for name in ("greedy", "sampled")
        if f"{name}_accuracy" in metrics
    ]
    if "rewards/accuracies" in metrics:
        parts.append(f"reward accuracy {metrics['rewards/accuracies']:.3f}")
    return f" | {', '.join(parts)}"
