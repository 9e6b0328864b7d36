"""`sparring status`: shows the stages of a run as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparring.logging import escape_control
from sparring.report.summary import NAMES, describe_headline
from sparring.run.results import Results, name_methods

MARKS = {"done": "✓", "running": "▶", "to do": "·"}


def print_status(results: Results) -> None:
    console = Console()
    owner = results.run.owner()
    state = f"running as process {owner['pid']} on {owner['host']}" if owner else "not running"
    console.print(Text(escape_control(f"{results.run.root}: {name_methods(results.recipe)}, {state}")), soft_wrap=True)
    if results.data is None:
        console.print("The data stage is not done.")
        return
    table = Table(box=None)
    for column in ("iteration", "stage", "", "seconds", "results"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in results.stages():
        table.add_row(
            "start" if stage.iteration < 0 else str(stage.iteration),
            stage.stage,
            f"{MARKS[stage.state]} {stage.state}",
            f"{stage.seconds:.1f}" if stage.seconds is not None else "",
            stage.progress
            or "  ".join(f"{NAMES.get(name, name)} {value:.4g}" for name, value in stage.metrics.items()),
        )
    console.print(table)
    if results.stopped:
        console.print(f"Stopped early, after iteration {results.stopped[0]}: {results.stopped[1]}")
    if headline := results.headline():
        console.print(describe_headline(headline), soft_wrap=True, highlight=False, markup=False)
