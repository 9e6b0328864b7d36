"""`sparring preview`: a few rows as the model sees them, and one answer drawn and scored beside the real one."""

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
from sparring.recipe.schema import Recipe
from sparring.run.iteration import seed_of
from sparring.stages.generate import open_backend
from sparring.stages.prepare import DataReader, make_renderer
from sparring.types import Group, Prompt, Rendered, TokenIds

# two shades each, so that one token can be told from the next
PROMPT, ANSWER = ("white on grey23", "white on grey30"), ("black on green3", "black on green1")
END = "bold white on red"


def preview(recipe: Recipe, num_rows: int) -> None:
    """Prints rows token by token, then generates and scores an answer to the first of them."""
    folder = resolve_model(recipe.model)
    tokenizer = load_tokenizer(folder)
    renderer = make_renderer(recipe, folder, tokenizer)
    rows = [row for _, row in DataReader(recipe, renderer).read(recipe.data.train, num_rows)]
    console = Console()
    legend = ("prompt, not scored", PROMPT[0]), " ", ("answer, scored", ANSWER[0]), " ", ("end", END)
    console.print(Text.assemble(*legend))
    for row in rows:
        console.print()
        console.print(Text(f"row {row.row}: {len(row.prompt_ids)} + {len(row.real_ids)} tokens, {ending(row)}"))
        is_whole = row.real_finish == "stop"
        console.print(coloured(tokenizer, row.prompt_ids, row.real_ids, is_whole), soft_wrap=True)

    row = rows[0]
    ends = sorted({renderer.end.id} | declared_end_ids(folder, tokenizer))
    room = min(recipe.generate.max_new_tokens, renderer.max_length - len(row.prompt_ids))
    prompt = Prompt(row.id, 0, row.prompt_ids, room, seed_of(recipe.seed, "preview", row.id))
    computed_in, in_4bit = recipe.train.dtype, recipe.in_4bit
    with open_backend(folder, recipe.generate, computed_in, ends, renderer.max_length, in_4bit) as engine:
        (drawn,) = engine.generate([prompt])
    parallel, weights = SingleProcess(), getattr(torch, recipe.weights_dtype)
    model = load_model(folder, dtype=weights, device=parallel.device, in_4bit=in_4bit)
    group = Group(row.id, row.prompt_ids, {"real": (row.real_ids,), "generated": (drawn.token_ids,)})
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, parallel.device)
    scores = score_groups(Scorer(model, getattr(torch, computed_in)), [group], micro_batch_tokens, parallel)
    answers = (
        ("real", row.real_ids, row.real_finish, scores["real"][0]),
        ("generated", drawn.token_ids, drawn.finish, scores["generated"][0, 0]),
    )
    nothing = row.prompt_ids[:0]
    for name, ids, finish, logprob in answers:
        per_token = f"{logprob / len(ids):.2f} per token"
        console.print()
        console.print(Text(f"{name} answer to row {row.row}: {len(ids)} tokens, log p {logprob:.2f} ({per_token})"))
        console.print(coloured(tokenizer, nothing, ids, finish == "stop"), soft_wrap=True)


def ending(row: Rendered) -> str:
    return "whole" if row.real_finish == "stop" else "the answer is cut and has no end token"


def coloured(tokenizer: PreTrainedTokenizerBase, prompt: TokenIds, answer: TokenIds, has_end: bool) -> Text:
    text = Text()
    shown = list(pieces(tokenizer, [*prompt.tolist(), *answer.tolist()]))
    for index, piece in enumerate(shown):
        style = PROMPT[index % 2] if index < len(prompt) else ANSWER[(index - len(prompt)) % 2]
        text.append(piece, END if has_end and index == len(shown) - 1 else style)
    return text


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """Token by token; a line feed is shown and kept, what a terminal would act on is spelled out.

    Each is decoded after the one before it: alone, many tokenizers leave out the space that a token begins with.
    """

    def decoded(*tokens: int) -> str:
        return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before: list[int] = []
    for token in ids:
        head, both = decoded(*before), decoded(*before, token)
        # half a character reads otherwise once the other half is there
        yield escape_control(both[len(head) :] if both.startswith(head) else decoded(token)).replace("\n", "⏎\n")
        before = [token]
