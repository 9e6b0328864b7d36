"""Samples with vLLM's offline engine in its own process: when that exits, its memory is free."""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sparring.errors import RunError, UserError
from sparring.logging import info
from sparring.stages.generate.answers import NUM_CHECKED, failed, finish_generation, in_order
from sparring.types import Generation, Prompt

ENGINE = Path(__file__).with_name("vllm_engine.py")
IN_FLIGHT = 4096
"""Requests in flight: enough to keep the engine busy, and a bound on what a crash loses."""
MAX_RESTARTS = 3
"""Restarts in a row without a single response."""
START_SECONDS = 1200.0
"""How long an engine may take to load its model and compile it."""
SILENCE_SECONDS = 600.0
"""An engine without a heartbeat for this long hangs; it sends one every few seconds."""
CLOSE_SECONDS = 10.0
LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # that vLLM supports


class EngineDied(Exception):
    """The engine's process died or hangs. The message has its last line of output."""


class VllmBackend:
    """Samples with one engine, which starts when it is first needed and restarts when it dies.

    A response is a function of its prompt and seed up to rounding, which in vLLM depends on the rest of the batch.
    """

    def __init__(
        self,
        model: Path,
        *,
        end_ids: Sequence[int],
        max_length: int,
        dtype: str = "bfloat16",
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        python: str | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        base: Path | None = None,
    ) -> None:
        """`base`: served in place of an adapter's base, or of a model without an adapter."""
        self.end_ids = list(end_ids)
        self.temperature = temperature
        self.command = [python or sys.executable, "-P", str(ENGINE)]  # -P: this folder's vllm.py must not shadow vllm
        self.model = model
        engine: dict[str, Any] = {
            "model": str(base or model),
            "dtype": dtype,
            "max_model_len": max_length,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_prefix_caching": True,  # the samples of a prompt share its prefill
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # not the model's own, which may set a temperature
        }
        if batch_size is not None:
            engine["max_num_seqs"] = batch_size
        adapter = model / "adapter_config.json"
        is_adapter = adapter.is_file()
        if is_adapter:
            config = json.loads(adapter.read_text(encoding="utf-8"))
            rank = next((r for r in LORA_RANKS if r >= config["r"]), config["r"])
            engine["model"] = str(base or config["base_model_name_or_path"])
            engine |= {"enable_lora": True, "max_lora_rank": rank}
        self.hello = {
            "engine": engine,
            "adapter": str(model) if is_adapter else None,
            "sampling": {
                "top_p": top_p,
                "stop_token_ids": self.end_ids,
                "ignore_eos": True,  # end_ids has every end token
                "detokenize": False,
            },
        }
        self.process: EngineProcess | None = None
        self.num_requests = 0

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        return in_order(self._surviving(prompts, greedy))

    def _surviving(self, prompts: Sequence[Prompt], greedy: bool) -> Iterator[tuple[int, Generation]]:
        """Numbered responses as they finish, across restarts of the engine.

        A prompt in flight may be what killed the engine. The next engine gets those prompts in halves, so that the one
        that kills engines is found and no other prompt loses its response.
        """
        fresh = deque(range(len(prompts)))
        suspects: deque[deque[int]] = deque()
        deaths = 0
        while fresh or suspects:
            is_suspected = bool(suspects)
            todo = suspects.popleft() if suspects else fresh
            in_flight: dict[int, int] = {}  # request number -> index of its prompt
            try:
                for answer in self._draw(prompts, todo, in_flight, greedy):
                    deaths = 0
                    yield answer
                continue
            except EngineDied as death:
                problem = death
            finally:
                if in_flight:
                    self.close()  # dead, or working on abandoned requests
            self.close()
            deaths += 1
            if deaths > MAX_RESTARTS:
                raise RunError(f"vLLM died {deaths} times in a row without a response. {problem}") from problem
            lost = sorted(in_flight.values())
            if is_suspected and todo:
                suspects.append(todo)
            if is_suspected and len(lost) == 1:
                yield lost[0], failed(prompts[lost[0]], f"it kills the engine. {problem}")
                continue
            info(f"note: vLLM died with {len(lost)} prompts in flight and restarts. {problem}")
            half = (len(lost) + 1) // 2
            suspects += [deque(part) for part in (lost[:half], lost[half:]) if part]

    def _draw(
        self, prompts: Sequence[Prompt], todo: deque[int], in_flight: dict[int, int], greedy: bool
    ) -> Iterator[tuple[int, Generation]]:
        """Numbered responses of one engine as they finish. Removes from `todo` what it sends."""
        if self.process is None:
            self.process = EngineProcess(self.command, self.hello, self.model)
        while todo or in_flight:
            while todo and len(in_flight) < IN_FLIGHT:
                index = todo.popleft()
                prompt = prompts[index]
                self.num_requests += 1
                in_flight[self.num_requests] = index
                self.process.send(
                    {
                        "number": self.num_requests,
                        "prompt": prompt.token_ids.tolist(),
                        "max_tokens": prompt.max_new_tokens,
                        "seed": prompt.seed % 2**63,  # vLLM's seeds are signed
                        "temperature": 0.0 if greedy else self.temperature,
                        "logprobs": 0 if index < NUM_CHECKED else None,  # 0: of the sampled token only
                    }
                )
            message = self.process.receive(SILENCE_SECONDS)
            if message:
                index = in_flight.pop(message["number"])
                yield index, self._generation(prompts[index], message)

    def _generation(self, prompt: Prompt, message: Mapping[str, Any]) -> Generation:
        if "error" in message:
            return failed(prompt, message["error"])
        return finish_generation(prompt, np.array(message["tokens"]), self.end_ids, message["logprob"])

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


RANK_VARIABLES = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)")
"""What torchrun tells its ranks. An engine that read it would wait for them in a process group of its own."""


def engine_environment(environment: Mapping[str, str], tensor_parallel_size: int) -> dict[str, str]:
    """The environment of an engine: one of no rank, with the GPUs of the rank that starts it."""
    devices = devices_for_rank(environment, tensor_parallel_size)
    own = {name: value for name, value in environment.items() if not RANK_VARIABLES.fullmatch(name)}
    return own | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})


def devices_for_rank(environment: Mapping[str, str], tensor_parallel_size: int) -> str | None:
    """The GPUs of this rank, if torchrun started it; otherwise None."""
    if "LOCAL_RANK" not in environment:
        return None
    first = int(environment["LOCAL_RANK"]) * tensor_parallel_size
    mine = range(first, first + tensor_parallel_size)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    return ",".join(names[i] if names else str(i) for i in mine)


class EngineProcess:
    """`vllm_engine.py` in its own process group, over JSON lines. The constructor returns when it is ready."""

    def __init__(self, command: Sequence[str], hello: Mapping[str, Any], model: Path) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        # created and removed by the engine, in case this process is killed; removed here in case the engine is
        self.folder = Path(tempfile.gettempdir()) / f"vllm-{secrets.token_hex(8)}"
        try:
            self.process = subprocess.Popen(  # noqa: S603  (the interpreter is the user's own setting)
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                start_new_session=True,
                env=engine_environment(os.environ, hello["engine"]["tensor_parallel_size"]),
            )
        except OSError as error:
            raise UserError(f"generate.python: {command[0]} cannot be started: {error}.") from error
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.send({**hello, "folder": str(self.folder)})
            answer = self._receive_ready()
        except BaseException:
            self.close()
            raise
        if "ready" not in answer:
            self.close()
            if "missing" in answer:
                raise UserError(
                    f"generate.backend: {command[0]} cannot import vllm: {answer['missing']}. Install it there, or set "
                    "generate.python to the interpreter of an environment that has it."
                )
            raise UserError(f"generate.backend: vLLM does not start with {model}: {answer['refused']}")

    def _receive_ready(self) -> dict[str, Any]:
        try:
            return self.receive(START_SECONDS)
        except EngineDied as death:
            if not isinstance(death.__cause__, queue.Empty):
                raise
            # no restart: it would hang again
            raise RunError(f"vLLM was not ready after {START_SECONDS:,.0f} s. {self._last_output()}") from death

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineDied(self._last_output()) from error

    def receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty as error:
            raise EngineDied(f"No heartbeat for {timeout:.0f} s. {self._last_output()}") from error
        if not line:
            raise EngineDied(self._last_output())
        return json.loads(line)

    def _last_output(self) -> str:
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - 2000))
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"Its last line of output: {lines[-1].strip()}" if lines else "It printed nothing"

    def close(self) -> None:
        """Closes the pipe, on which the engine exits; kills its process group if it does not."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
