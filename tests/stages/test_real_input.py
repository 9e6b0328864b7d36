"""What nobody here wrote: a pretrained model and TinyStories, and GSM8K rows through rendering and the checker."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sparring.commands.demo import make_model
from sparring.data.checkers import make_check, number
from sparring.data.tables import read_rendered, read_table
from sparring.loop import play
from sparring.model.load import load_tokenizer, save_model
from sparring.objectives import OBJECTIVES
from sparring.recipe.schema import Recipe
from sparring.report.warnings import find_warnings
from sparring.run.results import Results
from sparring.types import Rendered

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("method", ["sft", "spin", "tspin", "space"])
def test_stories(shared: Path, tmp_path: Path, method: str) -> None:
    """The pretrained model plays first sentence -> rest of the story; small, but the real thing."""
    run = play(
        RECIPES / f"tiny-{method}.yaml",
        tmp_path / "run",
        [
            f"model={shared / 'models' / 'stories260K'}",
            f"data.train={shared / 'data' / 'tinystories' / 'stories.jsonl'}",
            "data.limit=48",
            "data.held_out=16",
            "generate.max_new_tokens=48",
            "train.batch_size=16",
        ],
    ).run
    results = Results(run.root)
    evaluations = results.evaluations()
    assert sorted(evaluations) == [-1, 0, 1]
    assert 1.0 < evaluations[-1]["held_out_nll"] < 2.0, "a pretrained model: 1.46 nats per token on such stories"
    assert all(abs(m["held_out_nll"] - evaluations[-1]["held_out_nll"]) < 0.2 for m in evaluations.values())
    first = results.training(0)[0]
    expected = OBJECTIVES[method]().start_loss
    if method == "spin":
        expected = np.log(2)
    if expected is not None:
        assert first["loss"] == pytest.approx(expected, abs=1e-4)
    row = read_rendered(run.data / "held_out.parquet")[0]
    assert row.prompt.endswith((".", "!", "?", '"')) and row.real.startswith(" ")
    answers = read_table(run.stage(1, "evaluate") / "answers.parquet").to_pylist()
    assert all(len(a["text"].split()) > 5 for a in answers), "it tells stories"
    assert find_warnings(results) == [], "and nothing is wrong with it"


@pytest.fixture(scope="module")
def gsm8k_model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on GSM8K, with a ChatML template, and a random tiny model for it."""
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:1500]
    texts = [text for line in lines for text in json.loads(line).values()]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|end|>", "<|im_end|>"]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    folder = tmp_path_factory.mktemp("gsm8k") / "model"
    save_model(make_model(tokenizer, width=32, layers=1, seed=0), tokenizer, folder)
    return folder


def test_gsm8k_rows_through_rendering_playing_and_checking(shared: Path, gsm8k_model: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "model": str(gsm8k_model),
            "method": "space",
            "iterations": 1,
            "data": {
                "train": str(shared / "data" / "gsm8k" / "train.jsonl"),
                "limit": 60,
                "held_out": 20,
                "max_skipped": 0.9,
            },
            "generate": {"max_new_tokens": 48},
            "train": {"learning_rate": 1e-3, "batch_size": 16, "epochs": 1, "dtype": "float32"},
            "evaluate": {"checker": "number"},
            "threads": 1,
        }
    )
    run = play(recipe, tmp_path / "run").run
    rows = read_rendered(run.data / "train.parquet")
    tokenizer = load_tokenizer(gsm8k_model)
    for row in rows:
        assert row.prompt.startswith("<|im_start|>user\n") and row.prompt.endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(row.prompt_ids.tolist()) == row.prompt
        assert row.real_finish == ("stop" if row.real_ids[-1] == 3 else "length")
        assert row.real_finish == "stop" or len(row.real_ids) == min(48, 128 - len(row.prompt_ids))
    metrics = Results(run.root).evaluations()
    assert all(m["greedy_accuracy"] == 0 for m in metrics.values()), "a random model solves nothing"


def test_the_checker_reads_every_gsm8k_answer(shared: Path) -> None:
    answers = [
        json.loads(line)["answer"]
        for part in ("train", "test")
        for line in (shared / "data" / "gsm8k" / f"{part}.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 8792
    assert all(number(answer) is not None for answer in answers)
    check, nothing = make_check("number"), np.empty(0, dtype=np.int32)
    rows = [Rendered(str(n), n, nothing, nothing, "stop", "", answer) for n, answer in enumerate(answers, start=1)]
    assert all(check(row.real, row) == 1 for row in rows)
    wrong = sum(check(one.real, other) == 1 for one, other in pairwise(rows))
    assert wrong < 0.05 * len(answers), "different problems rarely have one answer: the checker can say no"
