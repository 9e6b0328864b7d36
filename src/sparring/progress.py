"""What a person sees while a stage works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def say(message: str) -> None:
    """One line. Words of a model or a data file in it are neither markup nor orders to the terminal."""
    console.print(escape(visible(message)), highlight=False, soft_wrap=True)


class Rate(TextColumn):
    """Tokens per second since the start."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['tokens'] / max(task.elapsed or 0.0, 1e-9):,.0f} tokens/s")


Advance = Callable[[int, int], None]
"""Told how many units are done, and how many tokens they had."""


@contextmanager
def track(what: str, total: int) -> Iterator[Advance]:
    """Progress of `total` units, with tokens per second and the time left."""
    if not console.is_terminal:
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


def _lines(what: str, total: int) -> Advance:
    start = spoken = time.monotonic()
    done = seen = 0

    def advance(units: int, tokens: int) -> None:
        nonlocal done, seen, spoken
        done, seen, now = done + units, seen + tokens, time.monotonic()
        if now - spoken >= LINE_EVERY_SECONDS:
            spoken, elapsed = now, now - start
            left = elapsed / max(done, 1) * (total - done)
            say(f"  {what}: {done:,} of {total:,}, {seen / elapsed:,.0f} tokens/s, {left:,.0f} s left")

    return advance
