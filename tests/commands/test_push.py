"""sparring push, against a hub on this machine: what is sent, who may see it, and what is never sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from sparring.cli import main
from sparring.run.manifest import commit

SENT = {
    "README.md": b"# A model\n",
    "config.json": b"{}\n",
    "generation_config.json": b"{}\n",
    "tokenizer.json": b"{}\n",
    "chat_template.jinja": b"{{ messages }}\n",
}
KEPT = (".env", "training_args.bin", "optimizer.pt", "notes.txt", "runs/README.md", "tokenizer/config.json")
Call = Callable[..., tuple[int, str]]
TOKEN = "hf_" + "t" * 34


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload needs. Keeps what it is told, and has no other repositories."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(f"GET {self.path}")
                repo = self.path.removeprefix("/api/models/").partition("/revision")[0]
                if repo in outer.private:
                    self.answer(200, {"id": repo, "private": outer.private[repo], "siblings": [], "sha": "0" * 40})
                else:
                    self.answer(404, {"error": "no such repository"}, "RepoNotFound")

            def do_POST(self) -> None:
                outer.asked.append(f"POST {self.path}")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.refuses or self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "who are you?"})
                if self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    repo = f"{wanted['organization']}/{wanted['name']}"
                    known = repo in outer.private
                    outer.private.setdefault(repo, wanted["visibility"] == "private")
                    return self.answer(409 if known else 200, {"url": f"{outer.url}/{repo}", "id": repo})
                if "/preupload/" in self.path:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    plain = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                    return self.answer(200, {"files": plain, "commitOid": "0" * 40})
                if "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            outer.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    return self.answer(200, {"commitUrl": f"{outer.url}/me/it/commit/1", "commitOid": "1" * 40})
                return self.answer(200, {})

            def answer(self, status: int, content: object, code: str = "") -> None:
                words = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(words)))
                if code:
                    self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(words)

            def log_message(self, *words: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(HfApi, endpoint=server.url, token=TOKEN))
    yield server
    server.shutdown()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An export, and beside its files what has no business on a hub."""
    out = tmp_path / "out"
    with commit(out) as folder:
        for name, content in SENT.items():
            (folder / name).write_bytes(content)
        save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    for name in KEPT:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("of this machine")
    return out


@pytest.fixture
def sparring(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["sparring", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capfd.readouterr())

    return call


def test_without_yes_nothing_is_asked_of_the_hub(hub: Hub, exported: Path, sparring: Call) -> None:
    code, said = sparring("push", exported, "me/it")
    assert code == 0 and "with --yes, to the private repository me/it" in said
    assert all(name in said for name in (*SENT, "model.safetensors"))
    assert not any(Path(name).name in said for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env"))
    assert hub.asked == []


@pytest.mark.parametrize("public", [False, True])
def test_known_files_are_sent_and_only_those(public: bool, hub: Hub, exported: Path, sparring: Call) -> None:
    code, said = sparring("push", exported, "me/it", "--yes", *(["--public"] if public else []))
    assert code == 0, said
    assert hub.private == {"me/it": not public}
    weights = {"model.safetensors": (exported / "model.safetensors").read_bytes()}
    assert hub.files == SENT | weights
    assert TOKEN not in said


def test_a_repository_that_is_public_already_is_not_filled_in_passing(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.private["me/it"] = False
    code, said = sparring("push", exported, "me/it", "--yes")
    assert code == 2 and "'me/it' is there already and public; add --public" in said
    assert not hub.files
    assert sparring("push", exported, "me/it", "--yes", "--public")[0] == 0 and hub.files


@pytest.mark.parametrize("place", ["README.md", "tokenizer_config.json", "chat_template.jinja"])
def test_a_secret_stops_everything(place: str, hub: Hub, tmp_path: Path, sparring: Call) -> None:
    with commit(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        (folder / place).write_text(f"one line\nand hf_{'s' * 34}\n")
    for options in ((), ("--yes",)):
        code, said = sparring("push", tmp_path / "out", "me/it", *options)
        assert code == 2 and f"nothing is uploaded:\n  {place}, line 2: a Hugging Face token" in said
        assert "s" * 34 not in said
    assert hub.asked == []


def test_what_was_changed_after_the_export_is_not_sent(hub: Hub, exported: Path, sparring: Call) -> None:
    (exported / "config.json").write_text('{"auto_map": {}}')
    code, said = sparring("push", exported, "me/it", "--yes")
    assert code == 1 and "config.json is damaged" in said
    assert hub.asked == []


def test_a_hub_that_refuses(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.refuses = True
    code, said = sparring("push", exported, "me/it", "--yes")
    assert code == 2 and "the hub did not take 'me/it'" in said and "hf auth login" in said
    assert not hub.files


def test_a_hub_that_is_away(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.shutdown()
    hub.server_close()
    code, said = sparring("push", exported, "me/it", "--yes")
    assert code == 1 and "the hub cannot be reached" in said and "Traceback" not in said
