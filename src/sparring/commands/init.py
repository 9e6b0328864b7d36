"""`sparring init`: a commented recipe for the user's own model and rows, written after a look at both."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from sparring.data.formats import detect_format, examples
from sparring.data.read import BadRow, Row, read_rows
from sparring.errors import UserError
from sparring.model.load import load_tokenizer, resolve_model
from sparring.objectives import OBJECTIVES
from sparring.recipe import yaml
from sparring.recipe.load import make_recipe
from sparring.run.manifest import replace_file
from sparring.stages.evaluate.checkers import number

LOOK_AT = 50

COEFFICIENTS = {
    "sft": "sft                # the control: no game",
    "spin": "{name: spin, lambda: 0.1}",
    "tspin": "{name: tspin, alpha: 1.0, beta: 0.1}",
    "space": "{name: space, mu: 1.0}",
}

TEXT = """\
# Written by sparring init after a look at {data}: rows of the form {shape}.
# Next: sparring doctor {file}, then sparring preview {file}, then sparring run {file} runs/NAME.
# Every key: docs/recipe.md. What is not here has the paper's default.

model: {model}
method: {method}
iterations: 3            # more can be asked for later; the gain is mostly in the first two

data:
  train: {data}
  held_out: 0.05           # share of the prompts kept apart for the evaluation
{data_lines}{adapter}
generate:
  max_new_tokens: 256      # the real answers are cut there too, so that length alone does not tell them apart

train:
  optimizer: {optimizer}
  learning_rate: {rate}   # {rate_note}
  epochs: 2                # per iteration
  batch_size: 64
  micro_batch_tokens: auto # at a time; a number is an upper bound
  max_length: 2048         # prompt and answer
  dtype: auto              # bfloat16 where the device multiplies it faster, else float32
{evaluate}
seed: 0
"""

ADAPTER = """
adapter:                   # a low-rank adapter in place of full fine-tuning
  r: 16
  lora_alpha: 32
"""

EVALUATE = """
evaluate:
  checker: number          # the answers have a number after ####
"""


def write_recipe(path: Path, *, model: str, data: str, method: str, lora: bool) -> None:
    """Writes a recipe that is valid for these rows; refuses what a run would refuse."""
    if path.exists():
        raise UserError(f"{path} is there already; give another name")
    if method not in OBJECTIVES:
        raise UserError(f"--method {method}: one of {', '.join(OBJECTIVES)}")
    rows = [row for _, row in islice(read_rows(data), LOOK_AT) if not isinstance(row, BadRow)]
    if not rows:
        raise UserError(f"data: {data} has no row that can be read")
    is_text = "text" in rows[0] and not set(rows[0]) & {"messages", "conversations", "prompt", "instruction"}
    shape = detect_format(rows[0], {}, "sentence" if is_text else None, data).name
    tokenizer = load_tokenizer(resolve_model(model))
    lines = {}
    if shape == "text":
        lines["split_on"] = "sentence       # the prompt ends where the first sentence does"
    elif not tokenizer.chat_template:
        lines["template"] = '"### Instruction: {prompt}\\n\\n### Response: "  # the tokenizer has no chat template'
    text = TEXT.format(
        file=path,
        data=data,
        shape=shape,
        model=model,
        method=COEFFICIENTS.get(method, method),
        data_lines="".join(f"  {key}: {value}\n" for key, value in lines.items()),
        adapter=ADAPTER if lora else "",
        optimizer="adamw" if lora else "rmsprop",
        rate="5.0e-6" if lora else "5.0e-7",
        rate_note="ten times that of full fine-tuning" if lora else "the papers' rate at 7B; small models want more",
        evaluate=EVALUATE if is_checkable(rows, shape) else "",
    )
    raw, known_lines = yaml.parse(text, str(path))
    make_recipe(raw, known_lines, str(path))
    replace_file(path, text)


def is_checkable(rows: list[Row], shape: str) -> bool:
    """Whether the real answers that were looked at end as GSM8K's do."""
    return bool(rows) and all(number(answer_of(row, shape)) is not None for row in rows)


def answer_of(row: Mapping[str, object], shape: str) -> str:
    try:
        return examples(row, 1, detect_format(row, {}, "sentence", ""), "last")[0].answer if shape else ""
    except BadRow:
        return ""
