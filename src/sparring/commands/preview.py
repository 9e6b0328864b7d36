"""`sparring preview`: shows rows token by token, and scores a generated response next to the real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sparring.logging import escape_control
from sparring.model.load import declared_end_ids, load_model, load_tokenizer, resolve_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import inference_micro_batch_tokens
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Generate, Recipe
from sparring.run.iteration import seed_of
from sparring.stages.generate import open_backend
from sparring.stages.prepare import DataReader, make_renderer
from sparring.types import Group, Prompt, TokenIds

# two shades each, so that token boundaries are visible
PROMPT, RESPONSE = ("white on grey23", "white on grey30"), ("black on green3", "black on green1")
END = "bold white on red"


def preview(recipe: Recipe, num_rows: int) -> None:
    """Prints rows token by token, then generates and scores a response to the first one."""
    folder = resolve_model(recipe.model)
    tokenizer = load_tokenizer(folder)
    renderer = make_renderer(recipe, folder, tokenizer)
    rows = [one.row for one in DataReader(recipe, renderer).read(recipe.data.train, num_rows)]
    console = Console()
    legend = ("prompt, not scored", PROMPT[0]), " ", ("response, scored", RESPONSE[0]), " ", ("end token", END)
    console.print(Text.assemble(*legend))
    for row in rows:
        has_end = row.real_finish == "stop"
        end = "" if has_end else ", truncated: no end token"
        console.print()
        console.print(
            Text(f"Row {row.row}: {len(row.prompt_ids)} prompt tokens, {len(row.real_ids)} response tokens{end}")
        )
        console.print(color_tokens(tokenizer, row.prompt_ids, row.real_ids, has_end), soft_wrap=True)

    row = rows[0]
    ends = sorted({renderer.end.id} | declared_end_ids(folder, tokenizer))
    max_tokens = min(recipe.generate.max_new_tokens, renderer.max_length - len(row.prompt_ids))
    prompt = Prompt(row.id, 0, row.prompt_ids, max_tokens, seed_of(recipe.seed, "preview", row.id))
    dtype, in_4bit = recipe.train.dtype, recipe.in_4bit
    # one response needs no copy of a base in 4 bits for vLLM: hf samples from the same numbers
    engine_settings = Generate(max_new_tokens=max_tokens) if in_4bit else recipe.generate
    with open_backend(folder, engine_settings, dtype, ends, renderer.max_length, in_4bit) as engine:
        (generation,) = engine.generate([prompt])
    parallel, weights = SingleProcess(), getattr(torch, recipe.weights_dtype)
    model = load_model(folder, dtype=weights, device=parallel.device, in_4bit=in_4bit)
    group = Group(row.id, row.prompt_ids, {"real": (row.real_ids,), "generated": (generation.token_ids,)})
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, parallel.device)
    scores = score_groups(Scorer(model, getattr(torch, dtype)), [group], micro_batch_tokens, parallel)
    responses = (
        ("Real", row.real_ids, row.real_finish, scores["real"][0]),
        ("Generated", generation.token_ids, generation.finish, scores["generated"][0, 0]),
    )
    no_prompt = row.prompt_ids[:0]
    for name, ids, finish, logprob in responses:
        per_token = f"{logprob / len(ids):.2f} per token"
        console.print()
        console.print(Text(f"{name} response to row {row.row}: {len(ids)} tokens, log p {logprob:.2f} ({per_token})"))
        console.print(color_tokens(tokenizer, no_prompt, ids, finish == "stop"), soft_wrap=True)


def color_tokens(tokenizer: PreTrainedTokenizerBase, prompt: TokenIds, response: TokenIds, has_end: bool) -> Text:
    text = Text()
    pieces = list(decode_tokens(tokenizer, [*prompt.tolist(), *response.tolist()]))
    for index, piece in enumerate(pieces):
        style = PROMPT[index % 2] if index < len(prompt) else RESPONSE[(index - len(prompt)) % 2]
        text.append(piece, END if has_end and index == len(pieces) - 1 else style)
    return text


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token, with line feeds marked and control characters escaped.

    Decodes each token after its predecessor: many tokenizers drop the leading space of a token that stands alone.
    """

    def decode(*tokens: int) -> str:
        return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    previous: list[int] = []
    for token in ids:
        head, both = decode(*previous), decode(*previous, token)
        # the first bytes of a multi-byte character decode differently once the rest follows
        yield escape_control(both[len(head) :] if both.startswith(head) else decode(token)).replace("\n", "⏎\n")
        previous = [token]
