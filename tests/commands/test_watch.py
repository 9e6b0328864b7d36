"""The live report: read-only, on the loopback address, for this machine's own pages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from sparring.commands.watch import make_server
from sparring.errors import Refused
from sparring.loop import play
from sparring.recipe.schema import Recipe
from sparring.run.rundir import RunDir


@pytest.fixture
def served(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[tuple[RunDir, int]]:
    run = play(make_recipe("sft", iterations=1, train={"epochs": 1}), tmp_path / "run")
    with make_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield run, server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, method: str = "GET", path: str = "/", host: str | None = None) -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    return connection.getresponse()


def test_it_shows_the_run_and_nothing_else(served: tuple[RunDir, int]) -> None:
    run, port = served
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    answer = ask(port)
    assert answer.status == 200 and answer.getheader("Refresh") == "15"
    assert b"<title>sft: run</title>" in answer.read()
    (run.stage(0, "evaluate") / "MANIFEST.json").unlink()
    assert b"Not there yet" in ask(port).read(), "made anew for each request"
    assert ask(port, path="/recipe.yaml").status == 404
    assert ask(port, path="/../recipe.yaml").status == 404
    assert ask(port, method="POST").status == 501
    assert ask(port, host="evil.example").status == 403
    after = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    assert all(before[path] == when for path, when in after.items()), "nothing was written"


def test_what_cannot_be_served_is_refused(served: tuple[RunDir, int], tmp_path: Path) -> None:
    run, port = served
    with pytest.raises(Refused, match="is not a run directory"):
        make_server(RunDir(tmp_path), 0)
    with pytest.raises(Refused, match=f"--port {port}: Address already in use; give another one"):
        make_server(run, port)
