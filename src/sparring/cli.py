"""The command line. Thin: every command is one call. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparring.errors import Interrupted, Refused, Stopped
from sparring.visible import visible

if TYPE_CHECKING:
    from sparring.recipe.schema import Recipe

app = typer.Typer(
    name="sparring",
    help="Self-play fine-tuning of language models: SPIN, T-SPIN and SPACE, end to end.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    run_dir: RunDirectory,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the recipe's, e.g. train.epochs=1"),
    ] = None,
) -> None:
    """Play a recipe. The same command again continues where it stopped, or says that all is done."""
    read = _read(recipe, overrides)
    from sparring.loop import play

    play(read, run_dir)


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")],
    model: Annotated[str | None, typer.Option(help="A folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="spin, tspin (the default), space or sft.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter.")] = False,
) -> None:
    """Look at the rows and write a commented recipe for them. On a terminal it asks for what is not given."""
    if recipe.exists():
        raise Refused(f"{recipe} is there already; give another name")
    if sys.stdin.isatty():
        model = model or typer.prompt("model, a folder or a hub id")
        data = data or typer.prompt("rows, a file or a hub id")
        method = method or typer.prompt("method", default="tspin")
    if model is None or data is None:
        raise Refused(f"{'--model' if model is None else '--data'} is not given, and there is no terminal to ask on")
    from sparring.commands.init import write_recipe

    write_recipe(recipe, model=model, data=data, method=method or "tspin", lora=lora)
    typer.echo(f"{recipe}; next: sparring doctor {recipe}")


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Say within seconds whether a recipe would run: rows, template, lengths, memory, disk. Writes nothing."""
    read = _read(recipe, overrides)
    from sparring.commands.doctor import print_findings

    if not print_findings(read):
        raise typer.Exit(2)


@app.command()
def preview(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
) -> None:
    """Show rows token by token, what is scored and what is not, and an answer of the model beside the real one."""
    read = _read(recipe, overrides)
    from sparring.commands.preview import preview

    preview(read, rows)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many devices, over all machines.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="a100-40, a100, l40s, h100, h200 or b200.")] = None,
    measured: Annotated[Path | None, typer.Option(help="A run of the same model: take the rates that it had.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Default: data.limit, else those that are found.")] = None,
    tokens: Annotated[str | None, typer.Option(help="PROMPT,ANSWER: means; else the rows are looked at.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU-hour.")] = None,
) -> None:
    """Forecast memory, time, disk and cost of a recipe on given GPUs. Loads no weights and writes nothing."""
    read = _read(recipe, overrides)
    from sparring.commands.plan import print_plan

    print_plan(read, gpus, gpu, measured, rows, tokens, price)


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Its path on the cluster.")],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Its path on the cluster.")],
    scheduler: Annotated[str, typer.Option("--print", help="slurm or kubernetes.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Devices of each machine.")] = 8,
    image: Annotated[str | None, typer.Option(help="Kubernetes: a container image that has sparring.")] = None,
    claim: Annotated[
        str | None, typer.Option(help="Kubernetes: the PersistentVolumeClaim of the shared files.")
    ] = None,
) -> None:
    """Print a job file for a scheduler: read it, change what your cluster wants otherwise, and submit it."""
    from sparring.commands.jobs import job_file

    if scheduler not in ("slurm", "kubernetes"):
        raise Refused(f"--print {scheduler}: slurm and kubernetes are known")
    typer.echo(job_file(scheduler, recipe, run_dir, nodes=nodes, gpus=gpus, image=image, claim=claim), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from sparring.recipe.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def status(
    run_dir: RunDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show every stage of every iteration: done, running or to do, with times and headline numbers."""
    from sparring.commands.status import print_status
    from sparring.run.results import Results

    results = Results(run_dir)
    if as_json:
        typer.echo(json.dumps(results.as_json(), indent=1))
    else:
        print_status(results)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="NAME", help="generate, score, train or evaluate.")],
    run_dir: RunDirectory,
    iteration: Annotated[int, typer.Option("--iteration", help="From 0; -1 is the starting model.")],
) -> None:
    """Run one stage of a run by hand. The stages before it must be done."""
    from sparring.loop import run_one_stage

    if not run_one_stage(run_dir, name, iteration):
        typer.echo(f"{name} of iteration {iteration} is done already")


@app.command()
def restore(
    mirror: Annotated[str, typer.Argument(metavar="URI", help="The recipe's 'mirror'.")], run_dir: RunDirectory
) -> None:
    """Bring a run back from its mirror: every finished stage that is missing here, verified."""
    from sparring.run.mirror import Mirror
    from sparring.run.rundir import RunDir

    run, source = RunDir(run_dir), Mirror(mirror)
    with run.own():
        for folder in source.fetch(run):
            typer.echo(folder)


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write report.html from whatever the run has by now."""
    from sparring.report import write_report
    from sparring.run.rundir import RunDir

    typer.echo(write_report(RunDir(run_dir)))


@app.command()
def watch(
    run_dir: RunDirectory, port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8707
) -> None:
    """Serve the report of a run that goes on, on this machine only, until interrupted. Writes nothing."""
    from sparring.commands.watch import make_server
    from sparring.run.rundir import RunDir

    with make_server(RunDir(run_dir), port) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/ (interrupt to stop)")
        server.serve_forever()


@app.command()
def export(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    iteration: Annotated[str, typer.Option(help="best, or a number from 0.")] = "best",
    merge: Annotated[bool, typer.Option("--merge", help="Of an adapter: add it to its base.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Default: the one that the run computed in.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Instead of a model: every round as preference data.")] = False,
) -> None:
    """Write a model that transformers and vLLM load, with its card, or the rounds as preference data."""
    from sparring.commands.export import export_model, export_pairs
    from sparring.run.results import Results

    if pairs:
        typer.echo(f"{export_pairs(Results(run_dir), out):,} pairs: {out}")
    else:
        index = export_model(Results(run_dir), out, iteration=iteration, merge=merge, dtype=dtype)
        typer.echo(f"iteration {index}: {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'sparring export' wrote.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it, only say what would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="For everybody; otherwise private.")] = False,
) -> None:
    """Upload an exported folder to the hub: a dry run unless --yes, private unless --public."""
    from sparring.commands.export import push

    files = push(folder, repo, is_public=public, is_dry=not yes)
    for file in files:
        typer.echo(f"{file.stat().st_size:>14,}  {file.name}")
    kind = "public" if public else "private"
    typer.echo(f"{'uploaded to' if yes else 'with --yes, to'} the {kind} repository {repo}")


@app.command()
def judge(
    run_dir: RunDirectory,
    url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint; its token is read from OPENAI_API_KEY.")],
    model: Annotated[str, typer.Option(help="The judge, by the name that the endpoint has for it.")],
    iteration: Annotated[int, typer.Option(help="Whose MT-Bench answers.")],
    against: Annotated[int, typer.Option(help="Whose answers stand beside them; -1 is the starting model.")] = -1,
    prompts: Annotated[Path | None, typer.Option(help="FastChat's judge_prompts.jsonl; else our own words.")] = None,
    references: Annotated[Path | None, typer.Option(help="Reference answers in FastChat's form.")] = None,
) -> None:
    """Have a model judge MT-Bench answers of two iterations, in both orders, with ties. Continues where it stopped."""
    from sparring.commands.judge import judge as judge_answers
    from sparring.run.results import Results

    found = judge_answers(
        Results(run_dir),
        index=iteration,
        against=against,
        url=url,
        model=model,
        prompts=prompts,
        references=references,
    )
    shares = ", ".join(f"{name} {found[name]:.1%}" for name in ("win", "tie", "loss", "unclear"))
    typer.echo(f"{shares}; score {found['score']:.3f} ± {found['score_stderr']:.3f} (one standard error)")
    typer.echo(f"the place decided {found['prefers_a_place']:.1%} of the pairs, which are ties")


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML: data, model, settings.")],
    run_dir: RunDirectory,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the recipe's.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="With commas between; settings of one after colons: space:mu=3:train.learning_rate=1e-4")
    ] = "sft,spin,tspin,space",
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    fractions: Annotated[str, typer.Option(help="Shares of the training rows, with commas between.")] = "1.0",
) -> None:
    """Compare methods: one data set, one split, one starting model, several seeds. The same command continues."""
    read = _read(recipe, overrides)
    from sparring.commands.compare import compare as play_all

    try:
        shares = [float(share) for share in fractions.split(",")]
    except ValueError as error:
        raise Refused(f"--fractions {fractions}: write numbers with commas between, such as 0.25,1.0") from error
    comparison = play_all(read, run_dir, methods.split(","), seeds=seeds, fractions=shares)
    typer.echo(comparison.root / "report.html")


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Argument(metavar="[RUN_DIR]", help="Where to keep it.")] = Path("runs/demo"),
    method: Annotated[str, typer.Option(help="tspin, space, spin, sft, or all of them.")] = "all",
) -> None:
    """Train a tiny model on small reasoning problems, then let it play. No GPU, no network, a few minutes."""
    from sparring.commands.demo import play_demo

    play_demo(run_dir, method)


def _read(recipe: Path, overrides: Sequence[str] | None) -> Recipe:
    """Before a command imports what it works with, which takes seconds: a slip in the recipe is told at once."""
    from sparring.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def main() -> None:
    """The entry point: our own refusals as one message, everything else as a bug."""
    os.umask(0o077)  # a run directory holds the user's data
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # accelerate imports DeepSpeed wherever it is installed, and that would say on stdout that it finds no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        app()
    except Refused as refusal:
        typer.secho(f"error: {visible(str(refusal))}", fg="red", err=True)
        sys.exit(2)
    except Interrupted as stop:
        typer.secho(str(stop), err=True)
        sys.exit(128 + stop.number)
    except Stopped as stop:
        typer.secho(f"stopped: {visible(str(stop))}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command continues", err=True)
        sys.exit(130)
    except OSError as error:
        typer.secho(
            f"stopped: {visible(str(error))}. What was committed is intact; the same command continues",
            fg="red",
            err=True,
        )
        sys.exit(1)
