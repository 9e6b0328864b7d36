"""The contract of a backend, run on the Hugging Face one, and the generate stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from sparring.commits import commit, read_manifest
from sparring.config import Recipe
from sparring.data.tables import read_rendered, write_rows
from sparring.generate import generate, open_backend
from sparring.generate.hf import HfBackend, choose, finished
from sparring.iteration import Iteration
from sparring.logprobs import Scorer, score_groups
from sparring.model import load_model, load_tokenizer
from sparring.prepare import prepare
from sparring.rundir import RunDir
from sparring.seeds import seed_of
from sparring.types import Group, Prompt

CPU = torch.device("cpu")
END = 3


@pytest.fixture
def backend(tiny: Path) -> HfBackend:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    return HfBackend(model, end_ids=[END], batch_size=4)


def prompts(tiny: Path, count: int = 10, max_new_tokens: int = 12) -> list[Prompt]:
    tokenizer = load_tokenizer(tiny / "model")
    texts = [f"<|user|>{i + 2} eggs and {7 * i} more, 1 lost<|end|><|assistant|>" for i in range(count)]
    return [
        Prompt(str(i), 0, np.array(tokenizer(text)["input_ids"], dtype=np.int32), max_new_tokens, seed_of(0, i))
        for i, text in enumerate(texts)
    ]


def test_order_in_is_order_out_and_nothing_is_lost(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny)
    assert [a.id for a in backend.generate(wanted)] == [p.id for p in wanted]


def test_the_same_prompt_and_seed_give_the_same_tokens_in_any_batch(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny)
    together = {a.id: a.token_ids.tolist() for a in backend.generate(wanted)}
    backend.batch_size = 3
    turned = {a.id: a.token_ids.tolist() for a in backend.generate(wanted[::-1])}
    alone = {p.id: next(iter(backend.generate([p]))).token_ids.tolist() for p in wanted}
    assert together == turned == alone


def test_another_seed_gives_another_answer(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny, 1)
    first = next(iter(backend.generate(wanted))).token_ids.tolist()
    second = next(iter(backend.generate([replace(wanted[0], seed=1)]))).token_ids.tolist()
    assert first != second


def test_global_random_state_changes_nothing(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny, 3)
    torch.manual_seed(1)
    first = [a.token_ids.tolist() for a in backend.generate(wanted)]
    torch.manual_seed(2)
    assert first == [a.token_ids.tolist() for a in backend.generate(wanted)]


def test_stop_exactly_when_the_last_token_is_an_end_token(backend: HfBackend, tiny: Path) -> None:
    answers = [a for length in (1, 5, 40) for a in backend.generate(prompts(tiny, 30, length))]
    assert {a.finish for a in answers} == {"stop", "length"}
    for answer in answers:
        assert (answer.finish == "stop") == (answer.token_ids[-1] == END)
        assert END not in answer.token_ids[:-1]
        assert 1 <= len(answer.token_ids) <= 40


def test_each_row_has_its_own_limit(backend: HfBackend, tiny: Path) -> None:
    wanted = [replace(p, max_new_tokens=1 + i % 5) for i, p in enumerate(prompts(tiny, 20))]
    answers = list(backend.generate(wanted))
    assert all(len(a.token_ids) <= p.max_new_tokens for a, p in zip(answers, wanted, strict=True))
    longer = [a.token_ids.tolist() for a in backend.generate([replace(p, max_new_tokens=9) for p in wanted])]
    for answer, other in zip(answers, longer, strict=True):
        assert other[: len(answer.token_ids)] == answer.token_ids.tolist(), "a limit cuts, and changes nothing before"


def test_an_end_token_on_the_last_place_is_a_stop_and_after_it_a_cut() -> None:
    prompt = Prompt("a", 0, np.array([1], dtype=np.int32), 3, 0)
    assert finished(prompt, np.array([7, 8, END]), [END]).finish == "stop"
    cut = finished(prompt, np.array([7, 8, 9, END]), [END])
    assert (cut.finish, cut.token_ids.tolist()) == ("length", [7, 8, 9])
    assert finished(prompt, np.array([END, END, END]), [END]).token_ids.tolist() == [END]


def test_settings_in_the_model_s_own_configuration_are_not_used(tiny: Path) -> None:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    expected = [a.token_ids.tolist() for a in HfBackend(model, end_ids=[END]).generate(prompts(tiny))]
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_k=2, repetition_penalty=3.0, max_new_tokens=2, suppress_tokens=[5, 6]
    )
    assert [a.token_ids.tolist() for a in HfBackend(model, end_ids=[END]).generate(prompts(tiny))] == expected


def test_samples_follow_the_model_s_distribution(backend: HfBackend, tiny: Path) -> None:
    """The first tokens of 4,000 samples against the probabilities that the scorer gives them: chi-square."""
    prompt = prompts(tiny, 1, 1)[0]
    backend.model.model.norm.weight.data *= 4  # random weights are nearly uniform; this is not
    vocab = backend.model.config.vocab_size
    candidates = [np.array([token], dtype=np.int32) for token in range(vocab)]
    groups = [Group(str(i), prompt.token_ids, {"real": (c,)}) for i, c in enumerate(candidates)]
    probabilities = np.exp(score_groups(Scorer(backend.model), groups, 4000)["real"].astype(np.float64))
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    count = 4000
    backend.batch_size = 1000
    drawn = [a.token_ids[0] for a in backend.generate([replace(prompt, seed=seed_of("x", i)) for i in range(count)])]
    observed = np.bincount(drawn, minlength=vocab)
    expected = probabilities / probabilities.sum() * count
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = vocab - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
    # a control that must fail: the same test against a flattened distribution
    flat = np.sqrt(probabilities) / np.sqrt(probabilities).sum() * count
    assert ((observed - flat) ** 2 / flat).sum() > degrees + 4 * np.sqrt(2 * degrees)


def test_choose_inverts_the_cumulative_distribution() -> None:
    scores = torch.log(torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3])).repeat(6, 1)
    draws = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-16], dtype=torch.float64)
    assert choose(scores, draws).tolist() == [1, 1, 3, 3, 4, 4]


def test_temperature_zero_is_greedy_and_top_p_cuts_the_tail(tiny: Path) -> None:
    def answers(**settings: float) -> list[list[int]]:
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        engine = HfBackend(model, end_ids=[END], **settings)
        return [a.token_ids.tolist() for a in engine.generate(prompts(tiny))]

    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    greedy = [a.token_ids.tolist() for a in HfBackend(model, end_ids=[END]).generate(prompts(tiny), greedy=True)]
    assert answers(temperature=0.0) == greedy
    assert answers(top_p=1e-6) == greedy
    assert answers(temperature=1e-4) == greedy
    assert answers() != greedy


def test_an_opponent_that_knows_the_answers_is_told(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows whose real answers are the model's own greedy ones, and the same rows with other answers."""
    recipe = make_recipe("space", generate={"temperature": 0.0, "max_new_tokens": 8})
    rates = []
    for name, is_known in (("known", True), ("other", False)):
        run = RunDir(tmp_path / name)
        prepare(run, recipe)
        rows = read_rendered(run.data / "train.parquet")
        model = load_model(Path(recipe.model), dtype=torch.float32, device=CPU)
        asked = [Prompt(row.id, 0, row.prompt_ids, 8, 0) for row in rows]
        greedy = list(HfBackend(model, end_ids=[END]).generate(asked, greedy=True))
        if is_known:
            answers = [replace(row, real_ids=a.token_ids) for row, a in zip(rows, greedy, strict=True)]
            shutil.move(run.data, tmp_path / "prepared")
            with commit(run.data) as folder:
                write_rows(folder / "train.parquet", answers)
                shutil.copyfile(tmp_path / "prepared" / "summary.json", folder / "summary.json")
        engine = partial(open_backend, settings=recipe.generate, dtype=torch.float32, end_ids=(END,))
        generate(Iteration(run, recipe, 0), engine)
        rates.append(read_manifest(run.stage(0, "generate")).info["copy_rate"])
        assert ("on those rows there is nothing to tell apart" in capsys.readouterr().err) == is_known
    assert rates == [1.0, 0.0]


def test_the_stage_draws_each_row_and_sample_once(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from sparring.iteration import Iteration
    from sparring.loop import play

    recipe = make_recipe("space", iterations=1, generate={"samples": 3, "max_new_tokens": 16})
    run = play(recipe, tmp_path / "run")
    iteration = Iteration(run, recipe, 0)
    answers = iteration.generations(0)
    assert sorted(answers) == sorted(row.id for row in iteration.train_rows())
    assert all([a.sample for a in drawn] == [0, 1, 2] for drawn in answers.values())
    assert len({tuple(a.token_ids.tolist()) for drawn in answers.values() for a in drawn}) > len(answers)
