"""The process of a vLLM engine: JSON lines in, JSON lines out. Needs vLLM and Python, nothing of sparring.

`vllm.py` starts it with the interpreter of `generate.python`, so vLLM may have its own environment.
In: one line {"engine": arguments of vllm.LLM, "adapter": folder or null, "sampling": shared parameters, "folder": for
temporary files, created here and removed at the end}, then per request a line {"number", "prompt", "max_tokens",
"seed", "temperature", "logprobs"}.
Out: {"ready": version}, or {"missing"} or {"refused"} with a reason; then, as they finish, {"number", "tokens",
"logprob"} or {"number", "error"}, and {} as a heartbeat.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

Requests = queue.SimpleQueue[dict[str, Any] | None]

ALIVE_EVERY_SECONDS = 10.0
FLOOR = (0, 14)
BATCHED_TOKENS_ON_CPU = 4096
"""Tokens of prompts that a step computes at most, if none is longer."""
OF_AVAILABLE_MEMORY = 0.8
"""The share of free memory that an engine on a CPU takes at most."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # other output goes to the log
    requests: Requests = queue.SimpleQueue()
    threading.Thread(target=read, args=(requests,), daemon=True).start()
    hello = requests.get()
    if hello is None:
        return
    # vLLM leaves rendezvous files in TMPDIR; torch's compile cache is worth keeping
    Path(hello["folder"]).mkdir(mode=0o700)
    atexit.register(tidy, hello["folder"])
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    os.environ["TMPDIR"] = tempfile.tempdir = hello["folder"]
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this already is the engine's process
    try:
        vllm: Any = importlib.import_module("vllm")  # by name: a module beside this one is also called vllm
    except ImportError as error:
        send(out, {"missing": str(error)})
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    found: str = vllm.__version__  # pyright: ignore[reportAttributeAccessIssue]
    if is_below_floor(found):
        why = f"version {found} is too old: before {'.'.join(map(str, FLOOR))} vLLM runs code from a model's folder"
        send(out, {"refused": f"{why} whatever its settings (CVE-2026-22807)"})
        return
    try:
        settings = hello["engine"] | (settings_on_cpu(hello["engine"]) if current_platform.is_cpu() else {})
        engine = vllm.LLM(**settings).llm_engine
    except Exception as error:  # whatever it is, the user must see it
        send(out, {"refused": f"{type(error).__name__}: {error}"})
        raise
    adapter = LoRARequest("opponent", 1, hello["adapter"]) if hello["adapter"] else None
    send(out, {"ready": vllm.__version__})
    try:
        work(engine, adapter, hello["sampling"], requests, out)
    except BaseException:
        traceback.print_exc()
        tidy(hello["folder"])
        os._exit(1)  # at once: a failed engine may hang in its own cleanup
    if hello["engine"]["tensor_parallel_size"] == 1:
        tidy(hello["folder"])
        os._exit(0)  # there are no workers to stop, and a regular exit takes seconds


def settings_on_cpu(engine: dict[str, Any]) -> dict[str, Any]:
    """Compilation pays on a GPU; on a CPU it costs a minute at every start.

    Chunked prefill discards the token sampled after an unfinished prompt and rewinds the request's random generator,
    which torch's generators on CPUs cannot do: the engine would die of any batch above `max_num_batched_tokens`.
    Without it a step takes whole prompts, so the longest must fit.

    vLLM takes a share of all memory, and refuses to start when other programs leave less than that.
    """
    import psutil  # one of vLLM's requirements

    memory = psutil.virtual_memory()
    share = min(engine["gpu_memory_utilization"], OF_AVAILABLE_MEMORY * memory.available / memory.total)
    tokens = max(BATCHED_TOKENS_ON_CPU, engine["max_model_len"], engine.get("max_num_seqs", 0))
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": tokens,
        "gpu_memory_utilization": share,
    }


def tidy(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def is_below_floor(version: str) -> bool:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return "dev" not in version and numbers < FLOOR


def work(engine: Any, adapter: Any, sampling: dict[str, Any], requests: Requests, out: TextIO) -> None:
    """Serves requests until the input ends."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    last_sent = time.monotonic()
    while True:
        while not requests.empty() or not engine.has_unfinished_requests():
            request = requests.get()
            if request is None:
                return
            settings = SamplingParams(
                **sampling,
                max_tokens=request["max_tokens"],
                seed=request["seed"],
                temperature=request["temperature"],
                logprobs=request["logprobs"],
            )
            prompt = {"prompt_token_ids": request["prompt"]}
            try:
                engine.add_request(str(request["number"]), prompt, settings, lora_request=adapter)
            except ValueError as error:
                send(out, {"number": request["number"], "error": str(error)})
        for output in engine.step():
            if output.finished:
                drawn = output.outputs[0]
                # vLLM may append a suffix to request ids
                number = int(output.request_id.partition("-")[0])
                send(out, {"number": number, "tokens": list(drawn.token_ids), "logprob": drawn.cumulative_logprob})
                last_sent = time.monotonic()
        if time.monotonic() - last_sent > ALIVE_EVERY_SECONDS:
            send(out, {})
            last_sent = time.monotonic()


def read(requests: Requests) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)  # sparring closed the engine, or died


def send(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main()
