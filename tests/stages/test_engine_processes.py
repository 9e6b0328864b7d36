"""Processes of engines: those that do not start, always die, or must not outlive us. No real engine is needed."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from sparring.errors import RunError, UserError
from sparring.stages.generate import vllm
from sparring.stages.generate.server import ServerBackend, started_server
from sparring.stages.generate.vllm import EngineProcess, VllmBackend
from sparring.types import Prompt

pytestmark = pytest.mark.slow

END = 3


@pytest.fixture
def folder(tiny: Path) -> Path:
    return tiny / "model"


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(number), 0, np.array([1, 2], dtype=np.int32), 12, number) for number in range(count)]


def stand_in(folder: Path, code_of_vllm: str) -> None:
    """What vllm_engine.py imports of vLLM."""
    on_a_cpu = "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n"
    code = {
        "vllm": code_of_vllm,
        "vllm/lora": "",
        "vllm/lora/request": "class LoRARequest: ...\n",
        "vllm/platforms": on_a_cpu,
    }
    for name, text in code.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)


def test_an_interpreter_without_vllm_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = VllmBackend(folder, end_ids=[END], max_length=128, python=str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"generate\.python: .*cannot be started"):
        list(engine.generate(prompts(1)))
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    engine = VllmBackend(folder, end_ids=[END], max_length=128, python=str(bare))
    with pytest.raises(UserError, match=r"cannot import vllm.*set generate\.python"):
        list(engine.generate(prompts(1)))


def test_a_vllm_that_runs_what_model_folders_bring_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of the last version before CVE-2026-22807 was fixed: refused before it sees the model."""
    stand_in(tmp_path, "__version__ = '0.13.2'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = VllmBackend(folder, end_ids=[END], max_length=128)
    with pytest.raises(UserError, match=r"version 0\.13\.2 is too old: before 0\.14 .*CVE-2026-22807"):
        list(engine.generate(prompts(1)))


NAMES_ITS_ENVIRONMENT = """
import os
__version__ = "0.32.0"
class LLM:
    def __init__(self, **settings):
        names = [n for n in os.environ if "RANK" in n or "WORLD" in n or n.startswith(("MASTER", "TORCHELASTIC"))]
        raise ValueError(f"{names} on {os.environ['CUDA_VISIBLE_DEVICES']}")
"""


def test_an_engine_of_a_rank_knows_nothing_of_the_ranks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TORCHELASTIC_USE_AGENT_STORE a process group of vLLM's own waits for a store that is not there."""
    stand_in(tmp_path, NAMES_ITS_ENVIRONMENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")
    others = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID")
    for name in (*names, "GROUP_WORLD_SIZE", *others):
        monkeypatch.setenv(name, "1")
    engine = VllmBackend(folder, end_ids=[END], max_length=128)
    with pytest.raises(UserError, match=r"ValueError: \[\] on 1$"):
        list(engine.generate(prompts(1)))


def test_an_engine_that_is_never_ready_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\necho >> $0-starts\necho waiting for rank 1 >&2\nexec sleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(vllm, "START_SECONDS", 1.0)
    monkeypatch.setattr(vllm, "CLOSE_SECONDS", 0.1)
    engine = VllmBackend(folder, end_ids=[END], max_length=128, python=str(hangs))
    with pytest.raises(RunError, match=r"not ready after 1 s\. Its last line of output: waiting for rank 1"):
        list(engine.generate(prompts(3)))
    assert (tmp_path / "hangs-starts").read_text() == "\n", "it is not started again"


LEAVES_A_FILE = """
import tempfile
__version__ = "0.32.0"
class SamplingParams: ...
class Engine:
    def has_unfinished_requests(self): return False
class LLM:
    llm_engine = Engine()
    def __init__(self, **settings): tempfile.mkstemp(prefix="vllm_dist_")
"""


NOTES_SETTINGS = """
import json, pathlib
__version__ = "0.32.0"
class SamplingParams: ...
class Engine:
    def has_unfinished_requests(self): return False
class LLM:
    llm_engine = Engine()
    def __init__(self, **settings): pathlib.Path(__file__).with_name("settings").write_text(json.dumps(settings))
"""


@pytest.mark.parametrize(
    ("max_length", "batch_size", "tokens"), [(128, None, 4096), (9000, 64, 9000), (128, 5000, 5000)]
)
def test_on_a_cpu_prompts_are_not_computed_in_chunks(
    max_length: int,
    batch_size: int | None,
    tokens: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk's sample is discarded, and generators on CPUs cannot be rewound: vLLM would die of any real batch."""
    stand_in(tmp_path, NOTES_SETTINGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = VllmBackend(folder, end_ids=[END], max_length=max_length, batch_size=batch_size)
    EngineProcess(engine.command, engine.hello, folder).close()
    settings = json.loads((tmp_path / "vllm" / "settings").read_text())
    assert settings["enable_chunked_prefill"] is False and settings["enforce_eager"] is True
    assert settings["max_num_batched_tokens"] == tokens, "a step takes the longest prompt, and a token of each response"


@pytest.mark.parametrize(("free", "share"), [(10, 0.4), (20, 0.5)])
def test_on_a_cpu_an_engine_takes_no_more_memory_than_is_free(
    free: int, share: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks for a share of all memory, and does not start where other programs leave less."""
    stand_in(tmp_path, NOTES_SETTINGS)
    (tmp_path / "psutil.py").write_text(
        f"from types import SimpleNamespace\nvirtual_memory = lambda: SimpleNamespace(total=20, available={free})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = VllmBackend(folder, end_ids=[END], max_length=128, gpu_memory_utilization=0.5)
    EngineProcess(engine.command, engine.hello, folder).close()
    assert json.loads((tmp_path / "vllm" / "settings").read_text())["gpu_memory_utilization"] == pytest.approx(share)


@pytest.mark.parametrize("ends", ["it is closed", "it is killed", "sparring is killed"])
def test_an_engine_leaves_nothing_where_temporary_files_are(
    ends: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves a file there whenever it starts: a stand-in that does so, in our real process."""
    stand_in(tmp_path, LEAVES_A_FILE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    engine = VllmBackend(folder, end_ids=[END], max_length=128)

    def left() -> list[str]:
        return [path.name for path in (tmp_path / "temporary").rglob("vllm*")]

    if ends == "sparring is killed":
        child = os.fork()
        if child == 0:
            EngineProcess(engine.command, engine.hello, folder)
            (tmp_path / "seen").write_text(" ".join(left()))
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert "vllm_dist_" in (tmp_path / "seen").read_text()
    else:
        process = EngineProcess(engine.command, engine.hello, folder)
        assert len(left()) == 2, "its folder, and the file in it"
        if ends == "it is killed":
            process.process.kill()
        process.close()
        assert process.process.returncode == (-signal.SIGKILL if ends == "it is killed" else 0)
    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left()


def test_an_engine_that_always_dies_is_started_three_more_times(folder: Path, tmp_path: Path) -> None:
    dies = tmp_path / "dies"
    dies.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\necho out of memory >&2\nexit 1\n")
    dies.chmod(0o755)
    engine = VllmBackend(folder, end_ids=[END], max_length=128, python=str(dies))
    with pytest.raises(RunError, match=r"died 4 times in a row without a response.*out of memory"):
        list(engine.generate(prompts(3)))
    assert (tmp_path / "starts").read_text() == "\n" * 4


def test_a_server_ends_with_sparring(folder: Path, tmp_path: Path) -> None:
    """A real SIGKILL of the process that started it."""
    (tmp_path / "serve.py").write_text(
        "import http.server as h, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    command = f"{sys.executable} {tmp_path}/serve.py {{port}} {tmp_path}/pid"
    child = os.fork()
    if child == 0:
        with started_server(command, folder, "float32"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_does_not_start_is_refused_with_its_words(folder: Path) -> None:
    fails = "sh -c 'echo no such device; exit 3'"
    with pytest.raises(UserError, match=r"(?s)status 3.*no such device"), started_server(fails, folder, "float32"):
        pass
    with (
        pytest.raises(UserError, match="there is no program"),
        started_server("no-such-server {port}", folder, "float32"),
    ):
        pass
    with pytest.raises(UserError, match="'gpu'; it may name {model}"), started_server("serve {gpu}", folder, "float32"):
        pass
    with pytest.raises(UserError, match="no server answers at"):
        ServerBackend("http://127.0.0.1:9", folder, end_ids=[END])
