"""The contract of a backend, run on every engine that is at hand; and what is particular to vLLM.

`make test-vllm` makes vLLM's environment and names its interpreter in SPARRING_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from shortcuts import generations

from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_model, load_tokenizer
from sparring.model.logprobs import Scorer, score_groups
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration, seed_of
from sparring.run.manifest import commit, read_manifest
from sparring.run.rundir import RunDir
from sparring.stages.generate.hf import HfBackend
from sparring.stages.generate.server import ServerBackend, started_server
from sparring.stages.generate.vllm import EngineProcess, VllmBackend
from sparring.types import Backend, Generation, Group, Prompt

CPU = torch.device("cpu")
END = 3
VLLM_PYTHON = os.environ.get("SPARRING_VLLM_PYTHON")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

needs_vllm = pytest.mark.skipif(VLLM_PYTHON is None, reason="SPARRING_VLLM_PYTHON is not set; 'make test-vllm' sets it")


@pytest.fixture(scope="session")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made less nearly uniform, with defaults for sampling that no engine may use."""
    target = tmp_path_factory.mktemp("engines") / "model"
    shutil.copytree(tiny / "model", target)
    model = load_model(target, dtype=torch.float32, device=CPU)
    cast(Any, model).model.norm.weight.data *= 4
    model.save_pretrained(target)
    defaults = {"do_sample": True, "temperature": 0.2, "top_k": 2, "repetition_penalty": 3.0, "eos_token_id": [5, 6]}
    (target / "generation_config.json").write_text(json.dumps(defaults))
    return target


def vllm(folder: Path, **settings: Any) -> VllmBackend:
    return VllmBackend(folder, end_ids=[END], max_length=128, dtype="float32", python=VLLM_PYTHON, **settings)


@pytest.fixture(scope="session")
def vllm_backend(folder: Path) -> Iterator[VllmBackend]:
    engine = vllm(folder)
    yield engine
    engine.close()


SERVE = (
    f"{VLLM_PYTHON} -m vllm.entrypoints.openai.api_server --model {{model}} --host 127.0.0.1 --port {{port}} "
    "--api-key {token} --dtype {dtype} --max-model-len 128 --generation-config vllm --enforce-eager "
    "--no-enable-chunked-prefill --max-num-batched-tokens 4096"
)


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[tuple[str, str]]:
    with started_server(SERVE, folder, "float32") as served:
        yield served


@pytest.fixture(scope="session")
def server_backend(server: tuple[str, str], folder: Path) -> ServerBackend:
    url, token = server
    return ServerBackend(url, folder, end_ids=[END], token=token)


ENGINES = [
    "hf",
    pytest.param("vllm", marks=needs_vllm),
    pytest.param("server", marks=needs_vllm),
]


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest, folder: Path) -> Backend:
    if request.param == "hf":
        return HfBackend(load_model(folder, dtype=torch.float32, device=CPU), end_ids=[END])
    return request.getfixturevalue(f"{request.param}_backend")


def prompts(folder: Path, count: int = 10, max_new_tokens: int = 12) -> list[Prompt]:
    tokenizer = load_tokenizer(folder)
    texts = [f"<|user|>{i + 2} eggs and {7 * i} more, 1 lost<|end|><|assistant|>" for i in range(count)]
    return [
        Prompt(str(i), 0, np.array(tokenizer(text)["input_ids"], dtype=np.int32), max_new_tokens, seed_of(0, i))
        for i, text in enumerate(texts)
    ]


def ids_of(answers: Iterator[Generation]) -> list[list[int]]:
    return [a.token_ids.tolist() for a in answers]


def logprobs(folder: Path, wanted: list[Prompt], answers: list[Generation]) -> np.ndarray:
    model = load_model(folder, dtype=torch.float32, device=CPU)
    groups = [Group(p.id, p.token_ids, {"real": (a.token_ids,)}) for p, a in zip(wanted, answers, strict=True)]
    return score_groups(Scorer(model), groups, 4000, SingleProcess())["real"]


def test_order_in_is_order_out_and_nothing_is_lost(backend: Backend, folder: Path) -> None:
    wanted = [replace(p, sample=s) for p in prompts(folder, 20) for s in range(3)][::-1]
    assert [(a.id, a.sample) for a in backend.generate(wanted)] == [(p.id, p.sample) for p in wanted]
    assert list(backend.generate([])) == []


def test_the_same_prompts_and_seeds_give_the_same_tokens(backend: Backend, folder: Path) -> None:
    wanted = prompts(folder)
    assert ids_of(backend.generate(wanted)) == ids_of(backend.generate(wanted))


def test_another_seed_gives_another_answer(backend: Backend, folder: Path) -> None:
    wanted = prompts(folder, 5)
    first, second = (
        ids_of(backend.generate([replace(p, seed=seed_of(s, p.id)) for p in wanted])) for s in ("one", "two")
    )
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_stop_exactly_when_the_last_token_is_an_end_token(backend: Backend, folder: Path) -> None:
    answers = [a for length in (1, 5, 40) for a in backend.generate(prompts(folder, 30, length))]
    assert {a.finish for a in answers} == {"stop", "length"}
    for answer in answers:
        assert (answer.finish == "stop") == (answer.token_ids[-1] == END)
        assert END not in answer.token_ids[:-1]
        assert 1 <= len(answer.token_ids) <= 40


def test_each_row_has_its_own_limit(backend: Backend, folder: Path) -> None:
    wanted = [replace(p, max_new_tokens=1 + i % 5) for i, p in enumerate(prompts(folder, 20))]
    answers = list(backend.generate(wanted))
    for answer, prompt in zip(answers, wanted, strict=True):
        assert len(answer.token_ids) == prompt.max_new_tokens or answer.finish == "stop"
        assert len(answer.token_ids) <= prompt.max_new_tokens
    longer = ids_of(backend.generate([replace(p, max_new_tokens=9) for p in wanted]))
    for answer, other in zip(answers, longer, strict=True):
        assert other[: len(answer.token_ids)] == answer.token_ids.tolist(), "a limit cuts, and changes nothing before"


def test_a_prompt_may_fill_the_context(backend: Backend, folder: Path) -> None:
    """128 positions: 120 of the prompt and 8 of the answer, none less."""
    long = replace(prompts(folder, 1)[0], token_ids=np.full(120, 7, dtype=np.int32), max_new_tokens=8)
    answers = list(backend.generate([replace(long, seed=i) for i in range(20)]))
    assert {len(a.token_ids) for a in answers if a.finish == "length"} == {8}


def test_samples_follow_the_model_s_distribution(backend: Backend, folder: Path) -> None:
    """The first tokens of 4,000 samples against the probabilities that the scorer gives them: chi-square."""
    prompt = prompts(folder, 1, 1)[0]
    vocab = load_model(folder, dtype=torch.float32, device=CPU).config.vocab_size
    candidates = [Generation(str(i), 0, np.array([i], dtype=np.int32), "length") for i in range(vocab)]
    probabilities = np.exp(logprobs(folder, [prompt] * vocab, candidates).astype(np.float64))
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    count = 4000
    drawn = [a.token_ids[0] for a in backend.generate([replace(prompt, seed=seed_of("x", i)) for i in range(count)])]
    observed = np.bincount(drawn, minlength=vocab)
    expected = probabilities / probabilities.sum() * count
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = vocab - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
    # a control that must fail: the same test against a flattened distribution
    flat = np.sqrt(probabilities) / np.sqrt(probabilities).sum() * count
    assert ((observed - flat) ** 2 / flat).sum() > degrees + 4 * np.sqrt(2 * degrees)


def test_greedy_answers_are_the_most_probable_tokens(backend: Backend, folder: Path) -> None:
    wanted = prompts(folder, 4)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    for prompt, answer in zip(wanted, backend.generate(wanted, greedy=True), strict=True):
        ids = torch.tensor([*prompt.token_ids, *answer.token_ids])
        predicted = model(input_ids=ids[None]).logits[0].argmax(-1)
        assert predicted[len(prompt.token_ids) - 1 : -1].tolist() == answer.token_ids.tolist()


def test_reported_logprobs_are_those_of_the_scorer(backend: Backend, folder: Path) -> None:
    wanted = prompts(folder, 20)
    answers = list(backend.generate(wanted))
    if answers[0].logprob is None:
        pytest.skip("this engine reports none")
    ours = logprobs(folder, wanted, answers)
    assert [a.logprob for a in answers] == pytest.approx(ours.tolist(), abs=1e-3)


def test_a_real_load(backend: Backend, folder: Path) -> None:
    """400 prompts of 64 tokens, 25,600 together, with responses of 1 to 60 tokens: more than a step takes."""
    random, vocab = np.random.default_rng(0), len(load_tokenizer(folder))
    wanted = [
        replace(p, token_ids=random.integers(4, vocab, 64).astype(np.int32), max_new_tokens=1 + 59 * (i % 7 == 0))
        for i, p in enumerate(prompts(folder, 400))
    ]
    answers = list(backend.generate(wanted))
    assert [a.id for a in answers] == [p.id for p in wanted] and "failed" not in {a.finish for a in answers}
    assert all(len(a.token_ids) <= p.max_new_tokens for a, p in zip(answers, wanted, strict=True))
    assert max(len(a.token_ids) for a in answers) > 30
    reported = [a.logprob for a in answers[:64] if a.logprob is not None]
    expected = logprobs(folder, wanted[: len(reported)], answers[: len(reported)]) if reported else np.array([])
    assert reported == pytest.approx(expected.tolist(), abs=1e-3), "what was sampled is what the prompt asks for"


@needs_vllm
def test_a_run_on_vllm_passes_the_proof_of_its_first_step(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = {"backend": "vllm", "python": VLLM_PYTHON, "samples": 2, "max_new_tokens": 16}
    recipe = make_recipe("space", iterations=1, generate=settings, data={"held_out": 0, "limit": 48})
    run = play(recipe, tmp_path / "run").run
    iteration = Iteration(run, recipe, 0)
    answers = generations(iteration, 0)
    assert sorted(answers) == sorted(row.id for row in iteration.train_rows())
    assert all([a.sample for a in drawn] == [0, 1] for drawn in answers.values())
    first = json.loads((run.stage(0, "train") / "metrics.jsonl").read_text().splitlines()[0])
    assert first["log_ratio"] < 1e-5 and first["loss"] == pytest.approx(cast(float, recipe.method.start_loss), abs=1e-4)


@needs_vllm
def test_a_run_in_4_bits_samples_what_it_trains(
    make_recipe: Callable[..., Recipe], folder: Path, tmp_path: Path
) -> None:
    """vLLM's log-probs agree with the score stage's, also with an adapter; those of the original base do not."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    recipe = make_recipe(
        "spin",
        model=str(folder),
        generate={"backend": "vllm", "python": VLLM_PYTHON, "max_new_tokens": 16},
        data={"held_out": 0, "limit": 48},
        adapter={"r": 4, "lora_alpha": 8, "load_in_4bit": True},
    )

    def differences(run: RunDir, iterations: int) -> list[float]:
        return [cast(float, read_manifest(run.stage(t, "score")).info["engine_difference"]) for t in range(iterations)]

    run = play(recipe, tmp_path / "run").run
    with commit(tmp_path / "control" / "dequantized") as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
    control = play(recipe.model_copy(update={"iterations": 1}), tmp_path / "control").run
    assert max(differences(run, 2)) < min(1e-4, differences(control, 1)[0] / 10)


@needs_vllm
def test_an_adapter_is_served_without_merging(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = cast(Any, get_peft_model(load_model(folder, dtype=torch.float32, device=CPU), LoraConfig(r=4)))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    engine = vllm(tmp_path / "adapter")
    wanted = prompts(folder, 20)
    answers = list(engine.generate(wanted))
    process = cast(EngineProcess, engine.process)
    assert list(process.folder.glob("vllm_dist_*")), "what vLLM leaves lies there"
    engine.close()
    assert process.process.returncode == 0, "it exits without a signal"
    assert not process.folder.exists()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    reported = [a.logprob for a in answers]
    assert reported == pytest.approx(logprobs(tmp_path / "merged", wanted, answers).tolist(), abs=1e-2)
    assert np.abs(np.array(reported) - logprobs(folder, wanted, answers)).mean() > 1, "the base alone is another model"


@needs_vllm
def test_a_killed_engine_is_started_again_and_no_answer_is_lost(vllm_backend: VllmBackend, folder: Path) -> None:
    wanted = prompts(folder, 60, 40)
    expected = ids_of(vllm_backend.generate(wanted))
    answers, process = [], vllm_backend.process
    assert process is not None
    for answer in vllm_backend.generate(wanted):
        if not answers:
            os.killpg(process.process.pid, signal.SIGKILL)
        answers.append(answer)
    assert vllm_backend.process is not process
    assert [a.token_ids.tolist() for a in answers] == expected
    process = cast(EngineProcess, vllm_backend.process).process
    next(vllm_backend.generate(wanted))
    assert process.poll() is not None, "an engine that is left in the middle works for nobody"


@needs_vllm
def test_a_prompt_that_kills_the_engine_is_isolated(vllm_backend: VllmBackend, folder: Path) -> None:
    """A token that the vocabulary does not have is an error in the middle of the model: the engine dies of it."""
    first, second, third = prompts(folder, 3)
    poison = replace(second, token_ids=np.array([1, 99999], dtype=np.int32))
    too_long = replace(second, id="long", token_ids=np.full(200, 7, dtype=np.int32))
    answers = list(vllm_backend.generate([first, poison, too_long, third]))
    assert [a.id for a in answers] == ["0", "1", "long", "2"]
    assert [a.finish == "failed" for a in answers] == [False, True, True, False]
    others = [first, third]
    kept = [a for a in answers if a.finish != "failed"]
    assert [a.logprob for a in kept] == pytest.approx(logprobs(folder, others, kept).tolist(), abs=1e-3)


@needs_vllm
def test_a_model_that_vllm_cannot_serve_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(UserError, match=r"(?s)vLLM does not start with .*NoSuchModel"):
        list(vllm(tmp_path / "model").generate(prompts(tiny / "model", 1)))


@needs_vllm
def test_a_server_of_other_weights_or_without_the_token_is_refused(server: tuple[str, str], tiny: Path) -> None:
    url, token = server
    with pytest.raises(UserError, match=r"serves .*, but the answers must come from"):
        ServerBackend(url, tiny / "model", end_ids=[END], token=token)
    with pytest.raises(UserError, match="requires a token; set OPENAI_API_KEY"):
        ServerBackend(url, tiny / "model", end_ids=[END])


@needs_vllm
def test_a_request_that_fails_is_made_again_and_gives_the_same_answer(
    server_backend: ServerBackend, folder: Path
) -> None:
    """Through a gateway that answers each request first with 503, then not at all, and then passes it on."""
    seen: Counter[bytes] = Counter()

    def forward(path: str, body: bytes) -> tuple[int, bytes]:
        response = server_backend.client.post(path, content=body, headers={"Content-Type": "application/json"})
        return response.status_code, response.content

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen[body] += 1
            if seen[body] == 2:
                self.close_connection = True
                return
            status, text = (503, b"busy") if seen[body] == 1 else forward(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    gateway = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=gateway.serve_forever, daemon=True).start()
    through = copy(server_backend)
    through.client = httpx.Client(base_url=f"http://127.0.0.1:{gateway.server_port}", timeout=60, trust_env=False)
    wanted = prompts(folder, 5)
    assert ids_of(through.generate(wanted)) == ids_of(server_backend.generate(wanted))
    assert set(seen.values()) == {3}
    refused = [a.finish for a in server_backend.generate([replace(wanted[0], token_ids=np.full(200, 7, np.int32))])]
    assert refused == ["failed"], "what the server says is wrong with a request is not tried again"
    gateway.shutdown()


@needs_vllm
def test_a_server_that_speaks_text_is_refused(folder: Path) -> None:
    """transformers' own: prompts and answers are texts there."""
    program = Path(cast(str, VLLM_PYTHON)).parent / "transformers"
    serve = f"{program} serve {{model}} --host 127.0.0.1 --port {{port}} --device cpu"
    refused = pytest.raises(UserError, match="same weights and token ids")
    with started_server(serve, folder, "float32") as (url, token), refused:
        ServerBackend(url, folder, end_ids=[END], token=token)


@needs_vllm
def test_a_run_starts_and_ends_its_own_server(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = {"backend": "server", "command": SERVE, "max_new_tokens": 16}
    recipe = make_recipe("spin", generate=settings, data={"held_out": 0, "limit": 48})
    run = play(recipe, tmp_path / "run").run  # two iterations: each serves its own opponent
    first = json.loads((run.stage(1, "train") / "metrics.jsonl").read_text().splitlines()[0])
    assert first["log_ratio"] < 1e-5
