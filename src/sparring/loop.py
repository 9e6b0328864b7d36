"""play(): for each iteration, for each stage, if it is not done. The run directory is the only state."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from sparring.commands.forecast import Trained, disk_bytes, empty_model, trained_tensors
from sparring.errors import Damaged, Refused, RunMismatch
from sparring.logging import say, tell
from sparring.model.load import num_parameters
from sparring.parallel import distributed, interrupt
from sparring.recipe.load import differences, load_own_recipe, load_recipe, own_recipe
from sparring.recipe.optimizer_specs import KINDS
from sparring.recipe.schema import Recipe
from sparring.report import write_report
from sparring.run.disk import free_bytes, size
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, read_sealed, replace_file, seal_json
from sparring.run.mirror import Mirror, committed_folders
from sparring.run.results import Results
from sparring.run.rundir import BENCHMARKS, RunDir
from sparring.run.tracking import steps_before, track_evaluation, tracking
from sparring.stages.evaluate import answer_questions, benchmark, evaluate
from sparring.stages.generate import engine_of, generate
from sparring.stages.generate.ray_pool import draw_on_cluster
from sparring.stages.launch import on_ranks
from sparring.stages.optional_dependencies import checks, optional_packages
from sparring.stages.prepare import prepare
from sparring.stages.score import score
from sparring.stages.train.loop import train

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
    mirror = None if recipe.mirror is None else Mirror(recipe.mirror)
    with run.own(), interrupt.listening():
        if mirror is not None:
            join(run, recipe, mirror)
        begin(run, recipe)
        if mirror is not None:
            for folder in committed_folders(run):
                mirror.send(run, folder)
            for note in (run.recipe, run.env):
                mirror.send_note(run, note)
        say_what_it_needs(run, recipe)
        say_what_is_played(run, recipe)
        worked = False
        with tracking(run, recipe.track, recipe.model_dump(by_alias=True, mode="json")):
            for index in range(-1, recipe.iterations):
                iteration = Iteration(run, recipe.at(index), index)
                for stage in iteration.stages:
                    interrupt.stop_if_asked()
                    if run_stage(iteration, stage):
                        worked = True
                        if mirror is not None:
                            mirror.send(run, iteration.stage(stage))
                if 0 <= index < recipe.iterations - 1 and (reason := Results(run.root).reason_to_stop(index)):
                    say(f"the run ends with iteration {index}: {reason}")
                    break
        if worked or not run.report.is_file():
            write_report(run)
            if mirror is not None:
                mirror.send_note(run, run.report)
        say(f"{'done' if worked else 'all was done already'}; report: {run.report}", "done", report=str(run.report))
    return run


def join(run: RunDir, recipe: Recipe, mirror: Mirror) -> None:
    """Brings here what the mirror has and this disk has not, unless the mirror is of a run with other settings."""
    text = mirror.recipe()
    if text is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder, "recipe.yaml")
        theirs.write_text(text, encoding="utf-8")
        if changed := differences(load_own_recipe(theirs), recipe):
            raise RunMismatch(
                f"mirror: {mirror.name} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another place"
            )
    if fetched := mirror.fetch(run):
        say(f"{len(fetched)} finished stages fetched from {mirror.name}")


def begin(run: RunDir, recipe: Recipe) -> None:
    """The data stage, if it is not done. A run that is refused here leaves nothing in the way of the next attempt."""
    try:
        settle(run, recipe)
        for check in checks(recipe):
            check()
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        record_session(run, (*PACKAGES, *optional_packages(recipe)))
        if not is_done(run, run.data):
            prepare(run, recipe)
    except Refused:
        if not run.has_begun:
            for note in (run.recipe, run.env):
                note.unlink(missing_ok=True)
        raise


def run_stage(iteration: Iteration, stage: str) -> bool:
    """Runs a stage unless it is done. Returns whether there was something to do."""
    final = iteration.stage(stage)
    if is_done(iteration.run, final):
        shutil.rmtree(iteration.run.work(final), ignore_errors=True)  # left by a death just after the commit
        return False
    engine = engine_of(iteration)
    start = time.monotonic()
    tell("stage begins", iteration=iteration.index, stage=stage)
    match stage:
        case "generate":
            match iteration.recipe.launch:
                case "inline":
                    pass
                case "torchrun":
                    on_ranks(iteration, stage)
                case "ray":
                    draw_on_cluster(iteration)
            generate(iteration, engine)
        case "score" | "train" | "evaluate" if iteration.recipe.launch != "inline":
            on_ranks(iteration, stage)
        case "score":
            score(iteration)
        case "train":
            train(iteration)
        case "evaluate":
            evaluate(iteration, engine)
        case _:
            label = stage.removeprefix(f"{BENCHMARKS}/")
            task = iteration.benchmarks[label]
            answer_questions(iteration, engine) if task is None else benchmark(iteration, task, label)
    shutil.rmtree(iteration.run.work(final), ignore_errors=True)  # what ranks put together is in what was committed
    if stage == "evaluate":
        metrics = json.loads((final / "metrics.json").read_text(encoding="utf-8"))
        track_evaluation(metrics, steps_before(iteration.run, iteration.index + 1), iteration.index)
    where = "start" if iteration.index < 0 else f"iteration {iteration.index}"
    seconds = time.monotonic() - start
    found = headline(iteration) if stage == "evaluate" else Results(iteration.run.root).headline(iteration, stage)
    say(
        f"{where}: {stage} {seconds:.1f} s{found}",
        "stage",
        iteration=iteration.index,
        stage=stage,
        seconds=round(seconds, 3),
        metrics=Results(iteration.run.root).evaluation(iteration.index) if stage == "evaluate" else {},
    )
    return True


def is_done(run: RunDir, folder: Path) -> bool:
    """Whether a stage's folder is there, whole, and made from what is there now. A damaged one is set aside.

    What a stage makes is a function of what it reads, so making it again brings the same bytes back; where it
    does not (other software, another machine), the lineage of the stages after it says so.
    """
    if not folder.exists():
        return False
    try:
        run.verify(folder)
    except Damaged as problem:
        say(f"{problem}; the damaged one is kept as {run.set_aside(folder)}")
        return False
    run.check_lineage(folder)
    return True


def run_one_stage(run_dir: str | Path, stage: str, index: int) -> bool:
    """Runs one stage of a run by hand; the stages before it must be done."""
    run = RunDir(run_dir)
    if not run.recipe.is_file() or not is_committed(run.data):
        raise Refused(f"{run.root} is not a run yet; start it with 'sparring run RECIPE {run.root}'")
    recipe = load_own_recipe(run.recipe)
    if not -1 <= index < recipe.iterations:
        raise Refused(
            f"--iteration {index}: the run has the iterations 0 to {recipe.iterations - 1}, and -1, its start"
        )
    with run.own(), interrupt.listening():
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
    if run.recipe.is_file() and run.has_begun:
        if changed := differences(load_own_recipe(run.recipe), recipe):
            raise RunMismatch(
                f"{run.root} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another run directory, or give the old values"
            )
    elif run.has_begun:
        raise RunMismatch(f"{run.root} has data but no recipe.yaml; use another run directory")
    replace_file(run.recipe, own_recipe(recipe))


def record_session(run: RunDir, packages: Sequence[str] = PACKAGES) -> None:
    """Adds to env.json what this process runs on. Says so when the software has changed since the run began."""
    try:
        sessions = json.loads(read_sealed(run.env))["sessions"] if run.env.is_file() else []
    except Damaged as problem:
        say(f"{problem}; it is kept as {run.set_aside(run.env)}, and a new one is begun")
        sessions = []
    session = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {package: version(package) for package in packages},
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
    replace_file(run.env, seal_json({"sessions": [*sessions, session]}))


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
        f"{data.num_held_out:,} held out, answers end with {data.end_token!r}; run directory {run.root}",
        "run",
        run_dir=str(run.root),
        method=recipe.method.name,
        iterations=recipe.iterations,
        training_rows=data.num_train,
        held_out_rows=data.num_held_out,
    )
    if data.num_game:
        say(f"{data.num_game:,} of the training rows are kept from sft and played on")
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


def say_what_it_needs(run: RunDir, recipe: Recipe) -> None:
    """A forecast of the disk that training needs. Refused where it cannot be enough."""
    left = sum(not is_committed(run.stage(index, "train")) for index in range(recipe.iterations))
    if not left:
        return
    model = Path(Iteration(run, recipe, 0).data.model)
    whole = num_parameters(model)
    # torch's optimizers take the same bytes for every number, whatever its tensor
    is_sum_enough = recipe.adapter is None and KINDS[recipe.train.optimizer].ours is None
    trained = Trained((whole,)) if is_sum_enough else trained_tensors(empty_model(model), recipe.adapter)
    needs, free = disk_bytes(recipe, whole, trained, left), free_bytes(run.root)
    if needs > free:
        raise Refused(
            f"{run.root}: {left} more iterations need about {size(needs)} and the disk has {size(free)}: "
            f"{size(needs - free)} are missing. Make room there, or choose a run directory on another disk"
        )
    say(f"disk: about {size(needs)} for {left} more iterations and their checkpoints, {size(free)} free")


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
