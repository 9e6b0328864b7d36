"""Untrusted templates and tokenizers end, stay within their memory, and leave no process running."""

from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparring.data.bounded as bounded
from sparring.data.bounded import BoundedProcess, LimitExceeded
from sparring.data.render import Renderer
from sparring.errors import UserError
from sparring.model.load import load_tokenizer
from sparring.types import Message

TURNS = [Message(role="user", content="?")]

BOMBS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power that no exception interrupts": "{{ 9**(9**9) }}",
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long list": "{{ [0] * 10**12 }}",
    "a doubling text": "{% set n = namespace(x='aaaaa') %}{% for i in range(40) %}{% set n.x = n.x*2 %}{% endfor %}",
    "a long output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "infinite recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "Python's insides": "{{ ''.__class__.__mro__ }}",
    "padding": "{{ '%99999999999d' % 1 }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "CPU_SECONDS", 0)  # the kernel counts whole seconds, and one is added
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(
        UserError, match=r"data\.template: the chat template (exceeded the limit|raised an error)"
    ) as refused:
        Renderer(load_tokenizer(tiny / "model"), template=BOMBS[name], end_token=None, max_length=64, max_response=None)
    assert len(str(refused.value)) < 1000
    del refused  # whose frames hold the renderer
    gc.collect()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 600 * 1024, "KiB of this process"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_template_is_stopped_at_the_row_where_it_loops(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "CPU_SECONDS", 0)
    loops_on_bad = "{% if 'bad' in messages[0].content %}" + BOMBS["a loop in a loop"] + "{% endif %}ok<|end|>"
    tokenizer = load_tokenizer(tiny / "model")
    renderer = Renderer(tokenizer, template=loops_on_bad, end_token=None, max_length=64, max_response=None)
    assert [renderer.apply_template(TURNS) for _ in range(100)] == ["ok<|end|>"] * 100
    with pytest.raises(UserError, match="exceeded the limit"):
        renderer.apply_template([Message(role="user", content="bad")])


def split_by(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters that cuts texts where an untrusted regular expression matches."""
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<|end|>": 2}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", name_or_path="a folder")


BACKTRACKING = "(a+)+$"
TOO_MANY_RETRIES = "a" * 30 + "b"
"""One match takes more retries than Oniguruma allows."""
TOO_SLOW = ("a" * 21 + "b") * 500
"""Each match stays below Oniguruma's limit, but there are thousands."""


@pytest.mark.parametrize(
    ("text", "message"), [(TOO_MANY_RETRIES, "failed .*retry-limit"), (TOO_SLOW, "exceeded the limit")]
)
def test_a_tokenizer_s_regular_expression_is_bounded(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bounded, "CPU_SECONDS", 0)
    renderer = Renderer(split_by(BACKTRACKING), template="{prompt}", end_token=None, max_length=64, max_response=None)
    assert renderer._tokenize("ab") == [0, 1]
    began = time.process_time()
    with pytest.raises(UserError, match=rf"the tokenizer in a folder {message}.*tokenizer\.json"):
        renderer._tokenize(text)
    assert time.process_time() - began < 1, "of this process"
    assert "panicked" not in capfd.readouterr().err


def test_control_the_same_expression_without_limits() -> None:
    """Control: a panic that `except Exception` does not catch, and time that grows with the text."""
    tokenizer = split_by(BACKTRACKING)
    with pytest.raises(BaseException, match="retry-limit") as panic:
        tokenizer(TOO_MANY_RETRIES)
    assert not isinstance(panic.value, Exception)
    began = time.process_time()
    tokenizer(TOO_SLOW[:44])
    assert time.process_time() - began > 10 * 1 / 500, "so the full text takes more than ten seconds"


def test_the_child_exits_with_its_parent_and_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", timeout=0)
    with lock:
        process = BoundedProcess({"twice": lambda text: text * 2})
        assert process("twice", "?") == "??"
    with FileLock(tmp_path / "lock", timeout=0):
        pass
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.child, 0)
    with pytest.raises(LimitExceeded):
        process("twice", "?")
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:  # this process is killed while its child works
        process = BoundedProcess({"same": lambda text: text})
        os.write(writer, str(process.child).encode())
        os.kill(os.getpid(), 9)
    os.waitpid(owner, 0)
    orphan = int(os.read(reader, 20))
    deadline = time.monotonic() + 30
    while Path(f"/proc/{orphan}").exists() and "Z" not in Path(f"/proc/{orphan}/stat").read_text().split():
        assert time.monotonic() < deadline, "the orphan exits at the end of the pipe"
        time.sleep(0.01)
