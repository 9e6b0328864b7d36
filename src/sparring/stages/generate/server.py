"""Answers from a server with OpenAI's completions API that takes and returns token ids, such as vLLM's or SGLang's."""

from __future__ import annotations

import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from sparring.errors import RunError, UserError
from sparring.parallel.processes import guarded_process
from sparring.stages.generate.answers import NUM_CHECKED, failed, finish_generation, in_order
from sparring.types import Generation, Prompt

CONCURRENCY = 64
NUM_TRIES = 7
WAIT = wait_exponential(multiplier=0.5, max=16.0)
"""Between tries of a request that a busy or broken server did not answer: 0.5, 1, 2, ... seconds."""
START_SECONDS = 1800.0
REQUEST_SECONDS = 3600.0
CONTRACT = (
    "Sampling and training must use the same weights and token ids. The server must list the folder that it serves "
    "in /v1/models, take a list of ids as `prompt`, and return ids when /v1/completions is called with "
    "`return_token_ids`, as vLLM's server does from 0.10.2 on."
)


class ServerBackend:
    """Requests with bounded concurrency. Each carries its row's seed, so that a retry is the same request."""

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
        self.top_p = top_p
        self.concurrency = batch_size or CONCURRENCY
        self.client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=30.0),
            limits=httpx.Limits(max_connections=self.concurrency),
            trust_env=False,  # no proxy between sparring and the server it was told
        )
        self.model = self._served_name(model)
        self._check_contract()

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
                    yield from _completed(pending)
            while pending:
                yield from _completed(pending)
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: Prompt, greedy: bool, is_checked: bool) -> Generation:
        response = self._complete(prompt, 0.0 if greedy else self.temperature, is_checked)
        if response.status_code != 200:
            return failed(prompt, f"the server answers {response.status_code}: {response.text[:300]}")
        choice = response.json()["choices"][0]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return finish_generation(
            prompt, np.array(choice["token_ids"]), self.end_ids, sum(logprobs) if logprobs else None
        )

    def _complete(self, prompt: Prompt, temperature: float, is_checked: bool) -> httpx.Response:
        """The completion, retried while the server is busy, broken or unreachable."""
        body = {
            "model": self.model,
            "prompt": prompt.token_ids.tolist(),
            "max_tokens": prompt.max_new_tokens,
            "temperature": temperature,
            "top_p": self.top_p,
            "seed": prompt.seed % 2**63,
            "stop_token_ids": self.end_ids,
            "ignore_eos": True,  # end_ids has every end token
            "return_token_ids": True,
            "logprobs": 0 if is_checked else None,  # 0: of the sampled token only
        }
        retrying = Retrying(
            stop=stop_after_attempt(NUM_TRIES), wait=WAIT, retry=retry_if_exception(_is_temporary), reraise=True
        )
        try:
            return retrying(self._post, body)
        except httpx.HTTPError as error:
            raise RunError(
                f"The server at {self.url} did not answer in {NUM_TRIES} tries: {_describe(error)}. Everything "
                "committed is intact; the same command continues."
            ) from error

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        """Raises for a busy or broken server; any other status is an answer about this request."""
        response = self.client.post("/v1/completions", json=body)
        if response.status_code == 429 or response.status_code >= 500:
            response.raise_for_status()
        if response.status_code == 200:
            try:
                response.json()
            except ValueError as error:
                raise httpx.DecodingError(f"not JSON: {error}", request=response.request) from error
        return response

    def _served_name(self, model: Path) -> str:
        """The server's name of `model`: it must hold the weights that are asked for."""
        try:
            response = self.client.get("/v1/models")
        except httpx.HTTPError as error:
            raise UserError(f"generate.url: no server answers at {self.url}: {error}") from error
        if response.status_code in (401, 403):
            raise UserError(f"generate.url: {self.url} requires a token; set OPENAI_API_KEY.")
        if response.status_code != 200:
            raise UserError(f"generate.backend: {self.url}/v1/models answers {response.status_code}. {CONTRACT}")
        models = response.json()["data"]
        served = {name: entry["id"] for entry in models for name in (entry.get("root"), entry["id"]) if name}
        for name, id in served.items():
            if Path(name).resolve() == model.resolve():
                return id
        raise UserError(
            f"generate.url: {self.url} serves {', '.join(served)}, but the answers must come from {model}. Serve that "
            "folder and run the same command again, or set generate.command, which starts a server for each model."
        )

    def _check_contract(self) -> None:
        """Refuses a server that does not return the token ids of prompt and answer."""
        probe = Prompt("probe", 0, np.array([self.end_ids[0]], dtype=np.int32), 1, 0)
        response = self._complete(probe, 0.0, False)
        choice = (response.json().get("choices") or [{}])[0] if response.status_code == 200 else {}
        if choice.get("prompt_token_ids") != probe.token_ids.tolist() or not choice.get("token_ids"):
            raise UserError(
                f"generate.backend: {self.url}/v1/completions answers {response.status_code}: {response.text[:300]}. "
                f"{CONTRACT}"
            )


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, httpx.HTTPError)


def _describe(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code}: {error.response.text[:300]}"
    return f"{type(error).__name__}: {error}"


def _completed(pending: dict[Future[Generation], int]) -> Iterator[tuple[int, Generation]]:
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
        raise UserError(f"generate.command: {error}; it may name {{{'}, {'.join(places)}}}") from error
    with tempfile.TemporaryFile() as log:
        if shutil.which(words[0]) is None:
            raise UserError(f"generate.command: there is no program {words[0]}")
        with guarded_process(words, log) as process:
            _await_server(process, port, log)
            yield f"http://127.0.0.1:{port}", token


def _await_server(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()[-5:]
            raise UserError(
                f"generate.command: the server ended with status {process.returncode}:\n" + "\n".join(lines)
            )
        with suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise UserError(f"generate.command: the server does not answer after {START_SECONDS:.0f} s")
