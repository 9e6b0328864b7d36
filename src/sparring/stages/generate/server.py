"""Answers from a completions server that takes and returns token ids, as vLLM's and llama.cpp's do."""

from __future__ import annotations

import http.client
import json
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np

from sparring.errors import Refused, Stopped
from sparring.parallel.processes import guarded
from sparring.stages.generate.answers import NUM_CHECKED, failed, finished, in_order
from sparring.stages.generate.dialects import DIALECTS, LlamaCpp, Vllm
from sparring.types import Generation, Prompt

CONCURRENCY = 64
WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further try of a request that a busy or broken server did not answer."""
START_SECONDS = 1800.0
REQUEST_SECONDS = 3600.0
CONTRACT = (
    "Sampling and training must use the same weights and token ids. So the server must name the folder that it serves "
    "in /v1/models, take a list of ids as `prompt`, and return ids: as vLLM's server does from 0.10.2 on, when "
    "/v1/completions is asked with `return_token_ids`, or llama.cpp's /completion with `return_tokens`"
)


class ServerBackend:
    """Requests with bounded concurrency. Each carries its row's seed, so that a second try is the same request."""

    def __init__(
        self,
        url: str,
        model: Path,
        *,
        end_ids: Sequence[int],
        token: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.end_ids = list(end_ids)
        self.temperature = temperature
        self.concurrency = batch_size or CONCURRENCY
        self.headers = {"Content-Type": "application/json"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.local = threading.local()
        self.dialect = self._dialect(self._served_name(model), top_p)

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        return in_order(self._answers(prompts, greedy))

    def _answers(self, prompts: Sequence[Prompt], greedy: bool) -> Iterator[tuple[int, Generation]]:
        """With their places, as they finish."""
        pool = ThreadPoolExecutor(self.concurrency)
        pending: dict[Future[Generation], int] = {}
        try:
            for index, prompt in enumerate(prompts):
                pending[pool.submit(self._answer, prompt, greedy, index < NUM_CHECKED)] = index
                while len(pending) >= 2 * self.concurrency:
                    yield from _taken(pending)
            while pending:
                yield from _taken(pending)
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: Prompt, greedy: bool, is_checked: bool) -> Generation:
        body = self.dialect.request(prompt, 0.0 if greedy else self.temperature, is_checked)
        status, answer = self._request(self.dialect.path, body)
        if status != 200:
            return failed(prompt, f"the server says {status}: {answer[:300]}")
        try:
            tokens, logprob = self.dialect.drawn(answer)
        except ValueError as error:
            raise Refused(f"generate.backend: {self.url}: {error}. Name it in data.end_token, or not there") from error
        return finished(prompt, tokens, self.end_ids, logprob)

    def _served_name(self, model: Path) -> str:
        """The server's name of `model`: the weights that it holds must be those that are asked for."""
        try:
            status, text = self._once("GET", "/v1/models", None)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"generate.url: there is no server at {self.url}: {error}") from error
        if status in (401, 403):
            raise Refused(f"generate.url: {self.url} wants a token: set OPENAI_API_KEY")
        if status != 200:
            raise Refused(f"generate.backend: {self.url}/v1/models answers {status}. {CONTRACT}")
        models = json.loads(text)["data"]
        served = {name: entry["id"] for entry in models for name in (entry.get("root"), entry["id"]) if name}
        for name, id in served.items():
            if Path(name).resolve() == model.resolve():
                return id
        raise Refused(
            f"generate.url: {self.url} serves {', '.join(served)}, but the answers must come from {model}. Serve that "
            "folder there and run the same command again, or give generate.command, which starts a server by itself"
        )

    def _dialect(self, name: str, top_p: float) -> Vllm | LlamaCpp:
        """The first that the server understands."""
        probe = Prompt("probe", 0, np.array([self.end_ids[0]], dtype=np.int32), 1, 0)
        said = []
        for kind in DIALECTS:
            dialect = kind(name, self.end_ids, top_p)
            status, answer = self._request(dialect.path, dialect.request(probe, 0.0, False))
            if status == 200 and dialect.understood(probe, answer):
                return dialect
            said.append(f"{dialect.path} answers {status}: {str(answer)[:300]}")
        raise Refused(f"generate.backend: {self.url}: {'; '.join(said)}. {CONTRACT}")

    def _request(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer, a text if that is not 200. Tried again while the server is busy, broken or unreachable."""
        problem = ""
        for pause in (*WAITS_SECONDS, None):
            try:
                status, text = self._once("POST", path, json.dumps(body))
                if status != 429 and status < 500:
                    return status, json.loads(text) if status == 200 else text.decode(errors="replace")
                problem = f"{status}: {text[:300]!r}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if pause is not None:
                time.sleep(pause)
        raise Stopped(
            f"the server at {self.url} did not answer in {len(WAITS_SECONDS) + 1} tries: {problem}. What was committed "
            "is intact; the same command continues"
        )

    def _once(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        if not hasattr(self.local, "connection"):
            where = urlsplit(self.url)
            kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
            self.local.connection = kind(where.netloc, timeout=REQUEST_SECONDS)
        try:
            self.local.connection.request(method, urlsplit(self.url).path + path, body, self.headers)
            response = self.local.connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self.local.connection.close()  # opens anew with the next request
            raise


def _taken(pending: dict[Future[Generation], int]) -> Iterator[tuple[int, Generation]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


@contextmanager
def started_server(command: str, model: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """Starts a server for `model` on loopback, and ends it. Yields its URL and token once it answers."""
    token = secrets.token_urlsafe(24)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"model": str(model), "port": str(port), "token": token, "dtype": dtype}
    try:
        words = [word.format_map(places) for word in shlex.split(command)]
    except (KeyError, ValueError, IndexError) as error:
        raise Refused(f"generate.command: {error}; it may name {{{'}, {'.join(places)}}}") from error
    with tempfile.TemporaryFile() as log:
        if shutil.which(words[0]) is None:
            raise Refused(f"generate.command: there is no program {words[0]}")
        with guarded(words, log) as process:
            _await_server(process, port, log)
            yield f"http://127.0.0.1:{port}", token


def _await_server(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()[-5:]
            raise Refused(f"generate.command: the server ended with status {process.returncode}:\n" + "\n".join(words))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.2)
    raise Refused(f"generate.command: the server does not answer after {START_SECONDS:.0f} s")
