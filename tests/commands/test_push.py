"""`sparring export --push`, with a Hub on this machine: which files are uploaded, and who can see them."""

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
NOT_SENT = (".env", "training_args.bin", "optimizer.pt", "notes.txt", "runs/README.md", "tokenizer/config.json")
Call = Callable[..., tuple[int, str]]
TOKEN = "hf_" + "t" * 34


class Hub(ThreadingHTTPServer):
    """The part of the Hub's API that an upload uses. Records requests, and has no other repositories."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.rejects = False
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
                if outer.rejects or self.headers["Authorization"] != f"Bearer {TOKEN}":
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
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if code:
                    self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None: ...

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
    """An exported folder, with files that must not be uploaded."""
    out = tmp_path / "out"
    with commit(out) as folder:
        for name, content in SENT.items():
            (folder / name).write_bytes(content)
        save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    for name in NOT_SENT:
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


@pytest.mark.parametrize("public", [False, True])
def test_only_known_files_are_uploaded(public: bool, hub: Hub, exported: Path, sparring: Call) -> None:
    code, output = sparring("export", "run", exported, "--push", "me/it", *(["--public"] if public else []))
    assert code == 0 and f"Uploaded to the {'public' if public else 'private'} repository me/it" in output, output
    assert all(name in output for name in (*SENT, "model.safetensors"))
    assert not any(Path(name).name in output for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env"))
    assert hub.private == {"me/it": not public}
    weights = {"model.safetensors": (exported / "model.safetensors").read_bytes()}
    assert hub.files == SENT | weights
    assert TOKEN not in output


def test_an_existing_public_repository_needs_the_option(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.private["me/it"] = False
    code, output = sparring("export", "run", exported, "--push", "me/it")
    assert code == 2 and "'me/it' exists already and is public. Add --public" in output
    assert not hub.files
    assert sparring("export", "run", exported, "--push", "me/it", "--public")[0] == 0 and hub.files


@pytest.mark.parametrize("place", ["README.md", "tokenizer_config.json", "chat_template.jinja"])
def test_a_secret_stops_the_upload(place: str, hub: Hub, tmp_path: Path, sparring: Call) -> None:
    with commit(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        (folder / place).write_text(f"one line\nand hf_{'s' * 34}\n")
    code, output = sparring("export", "run", tmp_path / "out", "--push", "me/it")
    assert code == 2 and f"Nothing was uploaded:\n  {place}, line 2: a Hugging Face token" in output
    assert "s" * 34 not in output
    assert hub.asked == []


def test_files_that_changed_after_the_export_are_not_uploaded(hub: Hub, exported: Path, sparring: Call) -> None:
    (exported / "config.json").write_text('{"auto_map": {}}')
    code, output = sparring("export", "run", exported, "--push", "me/it")
    assert code == 1 and "config.json is " in output
    assert hub.asked == []


def test_a_hub_that_rejects_the_upload(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.rejects = True
    code, output = sparring("export", "run", exported, "--push", "me/it")
    assert code == 2 and "The Hub rejected 'me/it'" in output and "hf auth login" in output
    assert not hub.files


def test_a_hub_that_is_unreachable(hub: Hub, exported: Path, sparring: Call) -> None:
    hub.shutdown()
    hub.server_close()
    code, output = sparring("export", "run", exported, "--push", "me/it")
    assert code == 1 and "The Hub cannot be reached" in output and "Traceback" not in output
