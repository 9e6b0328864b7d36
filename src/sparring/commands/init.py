"""`sparring init`: writes a commented recipe for the user's model and rows, after reading a few of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sparring.data.checkers import number
from sparring.data.formats import detect_format, examples
from sparring.data.read import BadRow, Row, read_rows
from sparring.errors import UserError
from sparring.model.load import load_tokenizer, resolve_model
from sparring.objectives import OBJECTIVES
from sparring.recipe import yaml
from sparring.recipe.load import make_recipe
from sparring.run.manifest import replace_file

NUM_ROWS = 50
"""Rows to read."""

COEFFICIENTS = {
    "sft": "sft                # the control: no self-play",
    "dft": "dft                # SFT weighted by probability; needs a checker to judge it",
    "rft": "rft                # SFT on the model's own answers that evaluate.checker accepts",
    "sdft": "sdft               # distills the model that is shown the answer into itself; needs one that follows it",
    "spin": "{name: spin, lambda: 0.1}",
    "tspin": "{name: tspin, alpha: 1.0, beta: 0.1}",
    "space": "{name: space, mu: 1.0}",
}

TEXT = """\
# Written by sparring init for {data} (format: {row_format}).
# Next: sparring doctor {file}, then sparring preview {file}, then sparring run {file} runs/NAME.
# docs/recipe.md lists every key. Keys that are not here have the paper's defaults.

model: {model}
method: {method}
iterations: 3            # you can raise it later; most of the gain comes from the first two

data:
  train: {data}
  held_out: 0.05           # fraction of the prompts for evaluation
{data_lines}{adapter}
generate:
  max_new_tokens: 256      # real responses are truncated here too, so that length does not give them away

train:
  optimizer: {optimizer}
  learning_rate: {rate}   # {rate_note}
  epochs: 2                # per iteration
  batch_size: 64
  micro_batch_tokens: auto # a number sets an upper bound
  max_length: 2048         # prompt and response
  dtype: auto              # bfloat16 on hardware that accelerates it, otherwise float32
{evaluate}
seed: 0
"""

ADAPTER = """
adapter:                   # train a LoRA adapter instead of all weights
  r: 16
  lora_alpha: 32
"""

EVALUATE = """
evaluate:
  checker: number          # compares the number after ####
"""


def write_recipe(path: Path, *, model: str, data: str, method: str, lora: bool) -> None:
    """Writes a recipe that is valid for these rows. Raises `UserError` for what a run would refuse."""
    if path.exists():
        raise UserError(f"{path} exists already. Choose another name.")
    if method not in OBJECTIVES:
        raise UserError(f"--method {method}: unknown method. Use one of {', '.join(OBJECTIVES)}.")
    rows = [row for _, row in islice(read_rows(data), NUM_ROWS) if not isinstance(row, BadRow)]
    if not rows:
        raise UserError(f"data: {data} has no readable row.")
    is_text = "text" in rows[0] and not set(rows[0]) & {"messages", "conversations", "prompt", "instruction"}
    row_format = detect_format(rows[0], {}, "sentence" if is_text else None, data).name
    tokenizer, data_lines = load_tokenizer(resolve_model(model)), ""
    if row_format == "text":
        data_lines = "  split_on: sentence       # the prompt is the first sentence\n"
    elif not tokenizer.chat_template:
        template = '"### Instruction: {prompt}\\n\\n### Response: "'
        data_lines = f"  template: {template}  # the tokenizer has no chat template\n"
    text = TEXT.format(
        file=path,
        data=data,
        row_format=row_format,
        model=model,
        method=COEFFICIENTS.get(method, method),
        data_lines=data_lines,
        adapter=ADAPTER if lora else "",
        optimizer="adamw" if lora else "rmsprop",
        rate="5.0e-6" if lora else "5.0e-7",
        rate_note="ten times that of full fine-tuning" if lora else "the papers' value for 7B; small models need more",
        evaluate=EVALUATE if all(number(response_of(row)) is not None for row in rows) else "",
    )
    raw, lines = yaml.parse(text, str(path))
    make_recipe(raw, lines, str(path))
    replace_file(path, text)


def response_of(row: Row) -> str:
    """The real response of a row; empty if the row cannot be used."""
    try:
        return examples(row, 1, detect_format(row, {}, "sentence", ""), "last")[0].answer
    except BadRow:
        return ""
