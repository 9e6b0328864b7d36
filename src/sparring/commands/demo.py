"""`sparring demo`: trains a tiny model on small reasoning problems, then runs self-play from it.

Downloads nothing. The starting model is trained by the same loop (method sft).
"""

from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparring.errors import UserError
from sparring.logging import info
from sparring.loop import play
from sparring.model.load import save_model
from sparring.recipe.schema import Recipe
from sparring.report.summary import format_value
from sparring.run.manifest import commit, is_committed
from sparring.run.results import MEASURED, Results

NUM_TRAIN, NUM_HELD_OUT, LARGEST = 1000, 1000, 9
WIDTH, LAYERS = 64, 2
TRAIN = {"optimizer": "adamw", "batch_size": 32, "max_length": 64, "dtype": "float32", "warmup_ratio": 0.05}
START = {**TRAIN, "learning_rate": 4e-3, "schedule": "constant", "epochs": 40}
GAME = {**TRAIN, "learning_rate": 3e-4, "schedule": "linear", "epochs": 2}
ITERATIONS = 3

METHODS = ("tspin", "space", "spin", "sft")
"""The methods of the demo, each with the same start and settings. SFT is the control."""

NAMES = ("Ann", "Ben", "Eva", "Lea", "Max", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PAD, END = "<|pad|>", "<|end|>"
SPECIAL = (PAD, "<|user|>", "<|assistant|>", END)
WORD = r" ?[A-Za-z]+| ?[0-9]| ?####|[^A-Za-z0-9 ]| "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def problem(random: random.Random, largest: int, *, in_words: bool = False) -> tuple[str, str]:
    """A two-step problem and its worked solution, which ends like GSM8K's: "#### 23".

    `in_words`: in the sentences of a school book, with both steps in the solution, for a pretrained model.
    """
    thing = random.choice(THINGS)
    match random.randrange(4):
        case 0:
            a, b = random.randint(2, largest), random.randint(2, largest)
            c = random.randint(1, a + b - 1)
            signs, short = "+-", f"{a} {thing} and {b} more, {c} lost"
            words = f"has {a} {thing}, buys {b} more and loses {c}"
        case 1:
            a, b, c = random.randint(2, 9), random.randint(2, 9), random.randint(1, largest)
            signs, short = "*+", f"{a} boxes of {b} {thing} and {c} more"
            words = f"has {a} boxes of {b} {thing} and buys {c} more"
        case 2:
            a, b = random.randint(2, 9), random.randint(2, 9)
            c = random.randint(1, a * b - 1)
            signs, short = "*-", f"{a} boxes of {b} {thing}, {c} lost"
            words = f"packs {a} boxes of {b} {thing} and loses {c}"
        case _:
            b, c = random.randint(2, largest), random.randint(2, 4)
            a = b + random.randint(1, max(1, largest // 2))
            signs, short = "-*", f"{a} {thing}, {b} lost, then times {c}"
            words = f"has {a} {thing}, loses {b} and swaps each of the others for {c} new ones"
    middle = OPERATIONS[signs[0]](a, b)
    result = OPERATIONS[signs[1]](middle, c)
    last_step = f"{middle}{signs[1]}{c}={result} #### {result}"
    if not in_words:
        return short, last_step
    question = f"{random.choice(NAMES)} {words}. How many {thing} are there in the end?"
    return question, f"{a}{signs[0]}{b}={middle}, {last_step}"


def problems(count: int, seed: int, largest: int, *, in_words: bool = False) -> list[dict[str, str]]:
    """Distinct problems as question/answer rows."""
    source, answers = random.Random(seed), dict[str, str]()  # noqa: S311  (exercises, not secrets)
    while len(answers) < count:
        question, answer = problem(source, largest, in_words=in_words)
        answers[question] = answer
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def make_tokenizer(rows: Sequence[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A vocabulary of words and single digits, with a chat template whose turns end with <|end|>."""
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


def play_demo(root: Path, method: str = "all", *, seed: int = 0) -> list[Path]:
    """Writes ROOT/task, ROOT/start (a tiny model trained by SFT) and ROOT/METHOD; returns the run directories.

    The same call continues an interrupted demo. `seed` changes the problems and the model.
    """
    if method not in (*METHODS, "all"):
        raise UserError(f"--method {method}: unknown method. Use all, {', '.join(METHODS)}.")
    write_task(root / "task", seed)
    info("Starting model: supervised fine-tuning from random weights")
    start = play(demo_recipe(root, root / "task" / "model", "sft", seed, iterations=1, train=START), root / "start").run
    runs = []
    for name in METHODS if method == "all" else (method,):
        info("")
        recipe = demo_recipe(root, start.model(0), name, seed, iterations=ITERATIONS, train=GAME)
        runs.append(play(recipe, root / name).run.root)
    print_comparison(runs)
    return runs


def write_task(folder: Path, seed: int) -> None:
    """Writes the problems as rows, and a model with random weights."""
    if is_committed(folder):
        return
    rows = problems(NUM_TRAIN + NUM_HELD_OUT, seed, LARGEST)
    tokenizer = make_tokenizer(rows)
    with commit(folder) as work:
        for name, part in (("train", rows[:NUM_TRAIN]), ("held_out", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        save_model(make_model(tokenizer, width=WIDTH, layers=LAYERS, seed=seed), tokenizer, work / "model")


def demo_recipe(
    root: Path, model: Path, method: str, seed: int, *, iterations: int, train: Mapping[str, object]
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(model),
            "method": method,
            "iterations": iterations,
            "data": {"train": str(root / "task" / "train.jsonl"), "held_out": str(root / "task" / "held_out.jsonl")},
            "generate": {"max_new_tokens": 24, "batch_size": 256},
            "train": train,
            "evaluate": {"checker": "number"},
            "seed": seed,
            "threads": 1,  # a second thread slows down tensors this small
        }
    )


def print_comparison(runs: Sequence[Path]) -> None:
    """Prints the metrics of the starting model and of each method's last iteration."""
    table = Table(title="Held-out problems, after the last iteration", box=None)
    for column in ("", "NLL", "greedy accuracy", "sampled accuracy", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for number, run in enumerate(runs):
        results = Results(run)
        evaluations = results.evaluations()
        if number == 0:
            table.add_row("start", *_cells(evaluations[-1]), "")
        seconds = sum(stage.seconds or 0 for stage in results.stages() if stage.iteration >= 0)
        table.add_row(results.recipe.method.name, *_cells(evaluations[max(evaluations)]), f"{seconds:.0f}")
    console = Console()
    console.print()
    console.print(table)
    console.print(
        "sft is the control: the same rows and optimizer steps, without self-play. Brackets: 95% intervals.",
        soft_wrap=True,
    )
    console.print("Reports:")
    for run in runs:
        console.print(f"  {run / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _cells(metrics: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(format_value(metric, metrics) for metric in MEASURED)
