"""What a person sees while a stage works: a bar on a terminal; elsewhere, one JSON object per line for a job's log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sparring.visible import visible

console = Console(stderr=True)

LINE_EVERY_SECONDS = 30.0


def is_for_people() -> bool:
    """Whether somebody looks on: at a terminal or in a notebook. Otherwise it is a log, and lines are JSON."""
    return console.is_terminal or console.is_jupyter


def say(message: str, event: str = "message", **fields: object) -> None:
    """One line. Words of a model or a data file in it are neither markup nor orders to the terminal.

    `event` and `fields` are for a log that programs read; a person sees the message alone.
    """
    if is_for_people():
        console.print(escape(visible(message)), highlight=False, soft_wrap=True)
    elif message:
        _log(event, {**fields, "message": visible(message.strip())})


def tell(event: str, **fields: object) -> None:
    """For a log only: what a person sees by a bar."""
    if not is_for_people():
        _log(event, fields)


def _log(event: str, fields: dict[str, object]) -> None:
    """One JSON object on one line of stderr, written at once, so that lines of several processes do not mix."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
    console.file.write(line + "\n")
    console.file.flush()


class Rate(TextColumn):
    """Tokens per second since the start."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['tokens'] / max(task.elapsed or 0.0, 1e-9):,.0f} tokens/s")


Advance = Callable[[int, int], None]
"""Told how many units are done, and how many tokens they had."""


@contextmanager
def track(what: str, total: int | None) -> Iterator[Advance]:
    """Progress of `total` units, with tokens per second and the time left. None: nobody knows how many."""
    if not is_for_people():
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        Rate(""),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, tokens=0)

        def advance(units: int, tokens: int) -> None:
            bar.update(task, advance=units, tokens=bar.tasks[task].fields["tokens"] + tokens)

        yield advance


def _lines(what: str, total: int | None) -> Advance:
    """The first units may be those of an earlier start, told with 0 tokens; they are not counted in the rate."""
    start = spoken = time.monotonic()
    done = seen = kept = 0

    def advance(units: int, tokens: int) -> None:
        nonlocal done, seen, kept, spoken
        kept += units if not tokens and not seen else 0
        done, seen, now = done + units, seen + tokens, time.monotonic()
        if now - spoken < LINE_EVERY_SECONDS:
            return
        spoken, elapsed = now, now - start
        fields: dict[str, object] = {"what": what, "done": done, "total": total}
        fields["tokens_per_second"] = round(seen / elapsed, 1)
        if total is not None:
            fields["seconds_left"] = round(elapsed / max(done - kept, 1) * (total - done), 1)
        _log("progress", fields)

    return advance
