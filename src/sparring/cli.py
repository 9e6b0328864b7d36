"""The command line. Every command is one call, and imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sparring.errors import Interrupted, RunError, UserError

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
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override settings of the recipe, such as train.epochs=1."),
]
LogFormat = Annotated[str | None, typer.Option(help="text (the default) or json: one object per line.")]


@app.command()
def run(
    recipe: RecipeFile,
    run_dir: RunDirectory,
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option(help="Run one stage only: generate, score, train, evaluate or benchmarks/NAME.")
    ] = None,
    iteration: Annotated[int, typer.Option(help="With --stage: from 0; -1 is the starting model.")] = 0,
    log_format: LogFormat = None,
) -> None:
    """Play a recipe. The same command continues a run that was stopped."""
    settings = _read(recipe, overrides, log_format)
    from sparring.loop import play, run_one_stage

    if stage is None:
        from sparring.commands.forecast import check_disk, check_memory

        check_memory(settings, run_dir)
        check_disk(settings, run_dir)
        play(settings, run_dir)
    elif not run_one_stage(settings, run_dir, stage, iteration):
        typer.echo(f"{stage} of iteration {iteration} is done already")


@app.command()
def init(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The file to write.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="spin, tspin (the default), space or sft.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a low-rank adapter.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Write a commented recipe for your model and rows. On a terminal it asks for what is missing."""
    if schema:
        from sparring.recipe.load import json_schema

        typer.echo(json.dumps(json_schema(), indent=1))
        return
    if recipe is None:
        raise UserError("Give the recipe file to write, for example: sparring init recipe.yaml")
    if recipe.exists():
        raise UserError(f"{recipe} exists already. Choose another name.")
    if sys.stdin.isatty():
        model = model or typer.prompt("model, a folder or a hub id")
        data = data or typer.prompt("rows, a file or a hub id")
        method = method or typer.prompt("method", default="tspin")
    if model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise UserError(f"{missing} is missing, and there is no terminal to ask on.")
    from sparring.commands.init import write_recipe

    write_recipe(recipe, model=model, data=data, method=method or "tspin", lora=lora)
    typer.echo(f"Wrote {recipe}. Next: sparring doctor {recipe}")


@app.command()
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = None,
) -> None:
    """Check in seconds whether a recipe would run: rows, template, lengths, memory, disk. Writes nothing."""
    read = _read(recipe, overrides)
    from sparring.commands.doctor import print_findings

    if not print_findings(read):
        raise typer.Exit(2)


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 3,
) -> None:
    """Show rows token by token, what is scored, and a response of the model beside the real one."""
    read = _read(recipe, overrides)
    from sparring.commands.preview import preview

    preview(read, rows)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, over all machines.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="a100-40, a100, l40s, h100, h200 or b200.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="A run of the same model, whose measured rates are used.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Number of rows. Default: data.limit, otherwise counted.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Mean tokens as PROMPT,RESPONSE. Default: measured on the rows.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price per GPU-hour, in dollars.")] = None,
) -> None:
    """Forecast memory, time, disk and cost on given GPUs. Loads no weights and writes nothing."""
    read = _read(recipe, overrides)
    from sparring.commands.plan import print_plan

    print_plan(read, gpus, gpu, measured, rows, tokens, price)


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Its path on the cluster.")],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Its path on the cluster.")],
    scheduler: Annotated[str, typer.Option("--print", help="slurm, kubernetes or sky.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs per machine.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="SkyPilot: the accelerator's name, such as H100.")] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes, SkyPilot: a container image with sparring.")] = None,
    claim: Annotated[
        str | None,
        typer.Option(help="Kubernetes: the PersistentVolumeClaim of the shared files. SkyPilot: their volume."),
    ] = None,
) -> None:
    """Print a job file for Slurm, Kubernetes or SkyPilot, to adapt and submit."""
    from sparring.commands.jobs import job_file

    if scheduler not in ("slurm", "kubernetes", "sky"):
        raise UserError(f"--print {scheduler}: must be slurm, kubernetes or sky.")
    text = job_file(scheduler, recipe, run_dir, nodes=nodes, gpus=gpus, gpu=gpu, image=image, claim=claim)
    typer.echo(text, nl=False)


@app.command()
def status(
    run_dir: RunDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show the state of every stage, with times and headline metrics."""
    from sparring.commands.status import print_status
    from sparring.run.results import Results

    results = Results(run_dir)
    if as_json:
        typer.echo(json.dumps(results.as_json(), indent=1))
    else:
        print_status(results)


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write report.html, at any time during a run."""
    from sparring.report import write_report
    from sparring.run.rundir import RunDir

    typer.echo(write_report(RunDir(run_dir)))


@app.command()
def export(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    iteration: Annotated[str, typer.Option(help="best, or a number from 0.")] = "best",
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base model.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Default: the dtype that the run computed in.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Export preference pairs instead of a model.")] = False,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Also upload to the hub, private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a public repository.")] = False,
) -> None:
    """Export a model for transformers, vLLM and Ollama, with its card, or preference pairs."""
    from sparring.commands.export import export_model, export_pairs, push_folder
    from sparring.run.results import Results

    if push is not None and out.exists():
        typer.echo(f"{out} exists already. Uploading it.")
    elif pairs:
        typer.echo(f"{export_pairs(Results(run_dir), out):,} pairs: {out}")
    else:
        index = export_model(Results(run_dir), out, iteration=iteration, merge=merge, dtype=dtype)
        typer.echo(f"iteration {index}: {out}")
    if push is not None:
        for file in push_folder(out, push, is_public=public):
            typer.echo(f"{file.stat().st_size:>14,}  {file.name}")
        typer.echo(f"Uploaded to the {'public' if public else 'private'} repository {push}.")


@app.command()
def judge(
    run_dir: RunDirectory,
    url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint; OPENAI_API_KEY holds its token.")],
    model: Annotated[str, typer.Option(help="The judge's model name at that endpoint.")],
    iteration: Annotated[int, typer.Option(help="The iteration to judge.")],
    against: Annotated[int, typer.Option(help="The iteration to compare with; -1 is the starting model.")] = -1,
    prompts: Annotated[
        Path | None, typer.Option(help="FastChat's judge_prompts.jsonl. Default: built-in prompts.")
    ] = None,
    references: Annotated[Path | None, typer.Option(help="Reference answers in FastChat's format.")] = None,
) -> None:
    """Judge the MT-Bench responses of two iterations with a model, in both orders. The same command continues."""
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
    interval = (
        f"[{found['score_low']:.3f}, {found['score_high']:.3f}] (95% interval over questions)"
        if "score_low" in found
        else "without an interval, which takes two questions"
    )
    typer.echo(f"{shares}; score {found['score']:.3f} {interval}")
    typer.echo(f"The position decided {found['position_bias']:.1%} of the pairs; they count as ties.")


@app.command()
def compare(
    recipe: RecipeFile,
    run_dir: RunDirectory,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; settings of one method after colons, such as space:mu=3.")
    ] = "sft,spin,tspin,space",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    fractions: Annotated[str, typer.Option(help="Comma-separated fractions of the training rows.")] = "1.0",
    log_format: LogFormat = None,
) -> None:
    """Compare methods on the same data and starting model, over several seeds. The same command continues."""
    settings = _read(recipe, overrides, log_format)
    from sparring.commands.compare import compare as play_all

    try:
        shares = [float(share) for share in fractions.split(",")]
    except ValueError as error:
        raise UserError(f"--fractions {fractions}: write comma-separated numbers, such as 0.25,1.0") from error
    comparison = play_all(settings, run_dir, methods.split(","), seeds=seeds, fractions=shares)
    typer.echo(comparison.root / "report.html")


@app.command()
def tune(
    recipe: RecipeFile,
    run_dir: RunDirectory,
    budget: Annotated[str, typer.Option(help="Time to search for, such as 2h, 90m or 1h30m.")],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated. Default: sft, spin, tspin, space, and rft with a checker.")
    ] = None,
    log_format: LogFormat = None,
) -> None:
    """Find the method and settings that get the most out of the rows in a given time. The same command continues."""
    settings = _read(recipe, overrides, log_format)
    from sparring.commands.tune import tune as search

    search(settings, run_dir, budget, methods=methods.split(",") if methods else ())


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Argument(help="Where to keep it. Default: runs/demo or runs/real.")] = None,
    method: Annotated[str, typer.Option(help="Of the tiny demo: tspin, space, spin, sft or all.")] = "all",
    real: Annotated[bool, typer.Option("--real", help="Play with SmolLM2-135M-Instruct; half an hour.")] = False,
    log_format: LogFormat = None,
) -> None:
    """Train a tiny model on small reasoning problems, then play. No GPU and no network; a few minutes."""
    _set_log_format(log_format)
    if not real:
        from sparring.commands.demo import play_demo

        play_demo(folder or Path("runs/demo"), method)
        return
    if method != "all":
        raise UserError("--real plays SFT and then SPACE. Leave out --method.")
    from sparring.commands.real_demo import play_real

    play_real(folder or Path("runs/real"))


def _read(recipe: Path, overrides: Sequence[str] | None, log_format: str | None = None) -> Recipe:
    """Reads the recipe before heavy imports, which take seconds: a mistake in it is reported at once."""
    _set_log_format(log_format)
    from sparring.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def _set_log_format(log_format: str | None) -> None:
    """In the environment, which ranks and engines inherit."""
    if log_format not in (None, "text", "json"):
        raise UserError(f"--log-format {log_format}: text or json")
    if log_format is not None:
        os.environ["SPARRING_LOG_FORMAT"] = log_format


def main() -> None:
    """The entry point: refusals as one message, everything else as a bug."""
    os.umask(0o077)  # a run directory holds the user's data
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads take the cores that other processes need
    try:
        app()
    except UserError as refusal:
        _fail(f"error: {refusal}", 2)
    except Interrupted as stop:
        _fail(str(stop), 128 + stop.number)
    except RunError as stop:
        _fail(f"stopped: {stop}", 1)
    except KeyboardInterrupt:
        _fail("Interrupted. The same command continues.", 130)
    except OSError as error:
        _fail(f"error: {error}. Check that the path exists, that you may use it, and that the disk has space.", 2)


def _fail(message: str, code: int) -> NoReturn:
    from sparring.logging import escape_control

    typer.secho(escape_control(message), fg="red", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
