"""What people see while a run works: a progress bar on a terminal, one live line per stage in a notebook, plain lines
in a log. JSON lines, for programs, when SPARRING_LOG_FORMAT=json asks for them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)

LOG_FORMAT = "SPARRING_LOG_FORMAT"
"""Environment variable, which ranks inherit: "json" for one JSON object per line; otherwise text."""
LINE_SECONDS = 30.0
"""At most one progress line in this time where there is no terminal."""
BATCH_SECONDS = 0.01
"""Units counted less than this apart belong to one batch."""
NOTEBOOK_SECONDS = 0.5
"""At most one update of a notebook's live line in this time."""

# C0 and C1 controls except line feed and tab, and the characters that reorder or hide text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

Advance = Callable[[int, int], None]
"""Takes how many units are done, and how many tokens they had."""


def escape_control(text: str) -> str:
    """The text with control characters spelled out: a terminal shows an escape sequence instead of obeying it."""
    return CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def info(message: str, event: str = "message", **fields: object) -> None:
    """Prints one line. Text of a model or a data file in it is neither markup nor an escape sequence.

    `event` and `fields` are for JSON lines only.
    """
    if is_json():
        if message:
            _write_json(event, {**fields, "message": escape_control(message.strip())})
    elif console.is_jupyter:
        print(escape_control(message))
    else:
        console.print(escape(escape_control(message)), highlight=False, soft_wrap=True)


def log_event(event: str, **fields: object) -> None:
    """Writes a JSON line, if those are asked for: what a person sees from a progress bar."""
    if is_json():
        _write_json(event, fields)


@contextmanager
def track(what: str, total: int | None) -> Iterator[Advance]:
    """Shows the progress of `total` units, with tokens per second and the time left. None: the total is unknown."""
    if is_json() or not (console.is_terminal or console.is_jupyter):
        yield _log_progress(_Meter(what, total))
    elif console.is_jupyter:
        with _live_line(_Meter(what, total)) as advance:
            yield advance
    else:
        with _progress_bar(what, total) as advance:
            yield advance


def is_json() -> bool:
    return os.environ.get(LOG_FORMAT) == "json"


@dataclass
class _Meter:
    """Counts units and tokens. The first units may be those of an earlier start, reported with 0 tokens: they are not
    part of the rate."""

    what: str
    total: int | None
    start: float = field(default_factory=time.monotonic)
    latest: float = field(default_factory=time.monotonic)
    """When the last unit was counted. A batch's units are counted one by one, long after the batch began."""
    done: int = 0
    tokens: int = 0
    resumed: int = 0

    def add(self, units: int, tokens: int) -> None:
        self.resumed += units if not tokens and not self.tokens else 0
        self.done += units
        self.tokens += tokens
        self.latest = time.monotonic()

    def fields(self) -> dict[str, object]:
        elapsed = max(self.latest - self.start, 1e-9)
        fields: dict[str, object] = {"what": self.what, "done": self.done, "total": self.total}
        fields["tokens_per_second"] = round(self.tokens / elapsed, 1)
        if self.total is not None:
            remaining = elapsed / max(self.done - self.resumed, 1) * (self.total - self.done)
            fields["seconds_left"] = round(remaining, 1)
        return fields

    def line(self) -> str:
        fields = self.fields()
        total = "" if self.total is None else f" of {self.total:,}"
        left = f", {fields['seconds_left']:,.0f} s left" if fields.get("seconds_left") else ""
        return f"  {self.what}: {self.done:,}{total}, {fields['tokens_per_second']:,.0f} tokens/s{left}"


def _log_progress(meter: _Meter) -> Advance:
    """Lines of text or JSON, at most one per LINE_SECONDS."""
    last = meter.start

    def advance(units: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        # between batches: after the first unit of a batch, the rate would be that of one unit in the batch's time
        if meter.done and now - last >= LINE_SECONDS and now - meter.latest >= BATCH_SECONDS:
            last = now
            if is_json():
                _write_json("progress", meter.fields())
            else:
                info(meter.line())
        meter.add(units, tokens)

    return advance


@contextmanager
def _live_line(meter: _Meter) -> Iterator[Advance]:
    """One line of a notebook's output, which stays with its last state."""
    from IPython.display import display

    def content() -> dict[str, str]:
        return {"text/plain": escape_control(meter.line())}

    handle = display(content(), raw=True, display_id=True)
    last = meter.start

    def advance(units: int, tokens: int) -> None:
        nonlocal last
        meter.add(units, tokens)
        if handle is not None and time.monotonic() - last >= NOTEBOOK_SECONDS:
            last = time.monotonic()
            handle.update(content(), raw=True)

    try:
        yield advance
    finally:
        if handle is not None:
            handle.update(content(), raw=True)


@contextmanager
def _progress_bar(what: str, total: int | None) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _Rate(""),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, tokens=0)

        def advance(units: int, tokens: int) -> None:
            bar.update(task, advance=units, tokens=bar.tasks[task].fields["tokens"] + tokens)

        yield advance


class _Rate(TextColumn):
    """Tokens per second since the start."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['tokens'] / max(task.elapsed or 0.0, 1e-9):,.0f} tokens/s")


def _write_json(event: str, fields: dict[str, object]) -> None:
    """One JSON object on one line of stderr, written in one call, so that lines of several processes do not mix."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
    if not console.quiet:
        console.file.write(line + "\n")
        console.file.flush()
