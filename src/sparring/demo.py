"""The demo: small reasoning problems, a tiny model trained on them from scratch, and a game from there.

Nothing is downloaded. The starting model is trained by the same loop that plays (method sft).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparring.commits import commit, is_committed
from sparring.config import Recipe
from sparring.errors import Refused
from sparring.loop import play
from sparring.model import save_model
from sparring.objectives import OBJECTIVES
from sparring.progress import say
from sparring.results import Results
from sparring.status import print_status

NUM_TRAIN, NUM_HELD_OUT = 8000, 1000
WIDTH, LAYERS = 64, 2
TRAIN = {"optimizer": "adamw", "batch_size": 32, "max_length": 64, "dtype": "float32", "warmup": 0.05}
START_RATE, START_EPOCHS = 5e-3, 7
GAME_RATE, GAME_ROWS, ITERATIONS = 1e-4, 4000, 3


THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
PAD, END = "<|pad|>", "<|end|>"
SPECIAL = (PAD, "<|user|>", "<|assistant|>", END)
WORD = r" ?[A-Za-z]+| ?[0-9]| ?####|[^A-Za-z0-9 ]| "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def problem(random: random.Random, largest: int) -> tuple[str, str]:
    """One two-step problem and its worked answer, which ends like GSM8K's: "#### 23"."""
    thing = random.choice(THINGS)
    match random.randrange(4):
        case 0:
            a, b = random.randint(2, largest), random.randint(2, largest)
            c = random.randint(1, a + b - 1)
            question, step, result = f"{a} {thing} and {b} more, {c} lost", f"{a + b}-{c}", a + b - c
        case 1:
            a, b, c = random.randint(2, 9), random.randint(2, 9), random.randint(1, largest)
            question, step, result = f"{a} boxes of {b} {thing} and {c} more", f"{a * b}+{c}", a * b + c
        case 2:
            a, b = random.randint(2, 9), random.randint(2, 9)
            c = random.randint(1, a * b - 1)
            question, step, result = f"{a} boxes of {b} {thing}, {c} lost", f"{a * b}-{c}", a * b - c
        case _:
            b, c = random.randint(2, largest), random.randint(2, 4)
            a = b + random.randint(1, max(1, largest // 2))
            question, step, result = f"{a} {thing}, {b} lost, then times {c}", f"{a - b}*{c}", (a - b) * c
    return question, f"{step}={result} #### {result}"


def problems(count: int, seed: int, largest: int = 12) -> list[dict[str, str]]:
    """Different problems as rows of the question/answer form."""
    source, found = random.Random(seed), dict[str, str]()  # noqa: S311  (exercises, not secrets)
    while len(found) < count:
        question, answer = problem(source, largest)
        found[question] = answer
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def make_tokenizer(rows: Sequence[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Words and single digits, with a chat template whose turns end with <|end|>."""
    words = {word for row in rows for text in row.values() for word in re.findall(WORD, text)}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = Split(Regex(WORD), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            num_key_value_heads=max(1, width // 32),
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL.index(END),
            pad_token_id=SPECIAL.index(PAD),
        )
    )


def play_demo(root: Path, method: str) -> None:
    """Writes ROOT/start (a tiny model trained by SFT), ROOT/METHOD and ROOT/control (SFT going on), and reports."""
    if method not in OBJECTIVES:
        raise Refused(f"--method {method}: one of {', '.join(OBJECTIVES)}")
    say(f"demo in {root}: {NUM_TRAIN:,} training problems, {NUM_HELD_OUT:,} held out")
    write_task(root / "task", seed=0)
    say("\n1. the starting model: supervised fine-tuning from random weights")
    start = play(start_recipe(root, seed=0), root / "start")
    say(f"\n2. {method}: the model plays against itself")
    played = play(game_recipe(root, start.model(0), method, seed=0), root / method)
    print_status(Results(played.root))
    say(f"\nopen {played.report} in a browser")


def write_task(folder: Path, seed: int) -> None:
    """The problems as rows, and a model with random weights."""
    if is_committed(folder):
        return
    rows = problems(NUM_TRAIN + NUM_HELD_OUT, seed)
    tokenizer = make_tokenizer(rows)
    with commit(folder) as work:
        for name, part in (("train", rows[:NUM_TRAIN]), ("held_out", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        save_model(make_model(tokenizer, width=WIDTH, layers=LAYERS, seed=seed), tokenizer, work / "model")


def recipe(root: Path, model: Path, seed: int, **sections: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(model),
            "seed": seed,
            "threads": 1,  # on tensors this small a second thread costs more than it brings
            "generate": {"max_new_tokens": 24, "batch_size": 256},
            "evaluate": {"checker": "number", "save_best_by": "greedy_accuracy"},
            **sections,
        }
    )


def start_recipe(root: Path, seed: int) -> Recipe:
    return recipe(
        root,
        root / "task" / "model",
        seed,
        method="sft",
        iterations=1,
        data={"train": str(root / "task" / "train.jsonl"), "held_out": str(root / "task" / "held_out.jsonl")},
        train={**TRAIN, "learning_rate": START_RATE, "epochs": START_EPOCHS, "schedule": "cosine"},
    )


def game_recipe(root: Path, model: Path, method: str, seed: int) -> Recipe:
    return recipe(
        root,
        model,
        seed,
        method=method,
        iterations=ITERATIONS,
        data={
            "train": str(root / "task" / "train.jsonl"),
            "held_out": str(root / "task" / "held_out.jsonl"),
            "limit": GAME_ROWS,
        },
        train={**TRAIN, "learning_rate": GAME_RATE, "epochs": 1},
    )
