"""Untrusted input runs no code and reads no other files, and nothing leaves the machine: no request, no secret."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparring.loop import play

from .conftest import Refusal
from .test_bad_models import edit_json

# description -> file, and the key that must be refused
UNSAFE: dict[str, tuple[str, dict[str, object]]] = {
    "a kernel from the hub, as in CVE-2026-4372": (
        "config.json",
        {"_attn_implementation_internal": "evil-org/kernel"},
    ),
    "the same by its public name": ("config.json", {"attn_implementation": "evil-org/kernel"}),
    "the same for experts": ("config.json", {"_experts_implementation": "evil-org/kernel"}),
    "the same, nested": ("config.json", {"text_config": {"_attn_implementation": "evil-org/kernel@main:x"}}),
    "trust in the config, as in CVE-2026-5241": ("config.json", {"trust_remote_code": True}),
    "trust deep in the config": (
        "config.json",
        {"vision": [{"keypoint_detector_config": {"trust_remote_code": True}}]},
    ),
    "trust in the tokenizer": ("tokenizer_config.json", {"trust_remote_code": True}),
    "trust in the defaults for generation": ("generation_config.json", {"trust_remote_code": True}),
    "a tokenizer file above the folder": ("tokenizer_config.json", {"vocab_file": "../.env"}),
    "a tokenizer file of the system": ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}),
    "a file above, for a slow tokenizer": ("tokenizer_config.json", {"merges_file": "a/../../secret"}),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_keys_in_a_model_folder_are_refused(name: str, task: Path, refusal: Refusal) -> None:
    file, change = UNSAFE[name]
    if not (task / "model" / file).is_file():
        (task / "model" / file).write_text("{}")
    edit_json(task / "model", file, **change)
    output = refusal()
    assert re.search(r"would run or read something outside the model. Remove the key", output), output
    assert str(task / "model" / file) in output


def evil(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


CODE: dict[str, dict[str, dict[str, object]]] = {
    "auto_map of a model that is known": {
        "config.json": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    },
    "auto_map of a tokenizer": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}},
    "auto_map from another repository": {
        "config.json": {"auto_map": {"AutoConfig": "evil-org/evil--evil.Config"}},
    },
    "custom code for generation": {"config.json": {"custom_generate": "evil"}},
}


@pytest.mark.parametrize("name", CODE)
def test_code_next_to_the_weights_is_not_run(name: str, task: Path) -> None:
    """A known model with code next to its weights runs without that code."""
    marker = task / "marker"
    (task / "model" / "evil.py").write_text(evil(marker))
    (task / "model" / "custom_generate").mkdir()
    (task / "model" / "custom_generate" / "generate.py").write_text(evil(marker))
    for file, change in CODE[name].items():
        edit_json(task / "model", file, **change)
    play(task / "recipe.yaml", task / "run", ["data.held_out=0"])
    assert not marker.exists()
    assert not list((task / "run").rglob("*.py")), "nor copied"


def test_control_code_runs_where_it_is_trusted(task: Path) -> None:
    """The code above does run with transformers alone and its flag."""
    from transformers import AutoConfig

    marker = task / "marker"
    (task / "model" / "evil.py").write_text(evil(marker))
    edit_json(task / "model", "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with contextlib.suppress(Exception):
        AutoConfig.from_pretrained(task / "model", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("name", UNSAFE)
def test_control_without_the_filter_nothing_is_refused(name: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparring.model.load import check_model_folder

    file, change = UNSAFE[name]
    if not (task / "model" / file).is_file():
        (task / "model" / file).write_text("{}")
    edit_json(task / "model", file, **change)
    monkeypatch.setattr("sparring.model.load.refuse_unsafe_settings", lambda *_: None)
    check_model_folder(task / "model")


def test_code_of_an_unknown_model_is_refused(task: Path, refusal: Refusal) -> None:
    marker = task / "marker"
    (task / "model" / "evil.py").write_text(evil(marker))
    change = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    edit_json(task / "model", "config.json", **change)
    assert "cannot be loaded" in refusal()
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


def test_planted_pickles_are_not_opened(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the usual names, next to the weights and in a partial stage. In CVE-2026-1839 resuming was the attack."""
    marker = task / "marker"
    names = ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "state.pkl")
    bomb = pickle.dumps(Bomb(marker))
    for name in names:
        (task / "model" / name).write_bytes(bomb)
    child = os.fork()
    if child == 0:
        os.environ["SPARRING_FAIL_AT"] = "train-step:3"  # the second checkpoint waited until the first was committed
        try:
            play(task / "recipe.yaml", task / "run", ["train.batch_size=4", "train.checkpoint_minutes=0"])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
    (work,) = (task / "run").rglob(".train.partial")
    checkpoints = sorted(work.glob("step-*"))
    assert checkpoints
    for folder in (work, *checkpoints):
        for name in names:
            (folder / name).write_bytes(bomb)
    run = play(task / "recipe.yaml", task / "run", ["train.batch_size=4", "train.checkpoint_minutes=0"]).run
    assert not marker.exists()
    assert not [p for p in run.root.rglob("*") if p.name in names], "and none is copied"
    pickle.loads(bomb)
    assert marker.exists(), "control: the pickle does execute"


SECRETS = """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN OPENAI_API_KEY ANTHROPIC_API_KEY WANDB_API_KEY AWS_SECRET_ACCESS_KEY
    AWS_SESSION_TOKEN GITHUB_TOKEN DATABASE_URL SSH_AUTH_SOCK MY_PASSWORD PIP_INDEX_URL
"""
CANARIES = {name: f"canary-{index}-5f1c9e" for index, name in enumerate(SECRETS.split())}

GUARDED = """
import sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        family = getattr(arguments[0], "family", None)
        if family is None or int(family) != 1:  # a Unix socket stays on this machine
            sys.stderr.write(f"OUTBOUND {event} {arguments[1:]}\\n")
    if event == "socket.bind" and int(arguments[0].family) != 1 and arguments[1][0] not in ("127.0.0.1", "::1"):
        sys.stderr.write(f"LISTENS {arguments[1]}\\n")
sys.addaudithook(guard)
words = sys.argv[1:]
if words == ["control"]:
    import socket
    socket.socket().bind(("0.0.0.0", 0))
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=0.2)
    except OSError:
        sys.exit("unreachable")
    sys.exit(0)
from sparring.cli import main
commands = " ".join(words).split(" ; ")  # in one process, because imports take longest
for command in commands:
    sys.argv = ["sparring", *command.split(" ")]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
print(f"{len(commands)} commands done")
"""


def guarded_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that reports its connection attempts, in a network namespace of its own where that is allowed."""
    unshare = shutil.which("unshare")
    is_allowed = unshare is not None and subprocess.run([unshare, "-rn", "true"], check=False).returncode == 0
    prefix = [unshare, "-rn"] if is_allowed and unshare else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_OFFLINE")} | CANARIES
    return subprocess.run(
        [*prefix, sys.executable, "-c", GUARDED, *arguments],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip


def test_an_offline_run_sends_no_request_and_stores_no_secret(task: Path) -> None:
    """In a network namespace without interfaces, with secrets in the environment."""
    control = guarded_process("control")
    assert "OUTBOUND socket.connect" in control.stderr and "unreachable" in control.stderr
    assert "LISTENS ('0.0.0.0', 0)" in control.stderr
    run = task / "run"
    commands = (
        f"run {task / 'recipe.yaml'} {run}",
        f"report {run}",
        f"status {run}",
        f"export {run} {task / 'out'} --iteration 0",
        f"export {run} {task / 'pairs'} --pairs",
    )
    result = guarded_process(" ; ".join(commands))
    assert result.returncode == 0 and "5 commands done" in result.stdout, result.stderr
    output = result.stdout + result.stderr
    assert "OUTBOUND" not in output and "LISTENS" not in output
    folders = (task / "run", task / "out", task / "pairs")
    written = {p: p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}
    assert len(written) > 25
    assert not secrets_in(output, written)
    (task / "run" / "env.json").write_text(json.dumps(dict(os.environ) | CANARIES))  # control
    written[task / "run" / "env.json"] = (task / "run" / "env.json").read_bytes()
    assert secrets_in(output, written) == sorted(CANARIES)
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, f"{path} is readable by others"


def secrets_in(output: str, written: dict[Path, bytes]) -> list[str]:
    texts = [output.encode(), *written.values()]
    return sorted(name for name, canary in CANARIES.items() if any(canary.encode() in text for text in texts))
