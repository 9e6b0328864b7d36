"""The generate stage: the opponent responds to every training prompt. Commits part by part."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparring.data.tables import read_generations, write_generations
from sparring.errors import RunError
from sparring.logging import Advance, info, track
from sparring.model.load import decode_answers, load_tokenizer
from sparring.model.memory import peak_memory_mib
from sparring.parallel import interrupt, local_device
from sparring.run.iteration import Iteration
from sparring.run.manifest import begin_work, commit_folder, commit_part, has_part
from sparring.stages.generate.hf import BATCH_SIZE
from sparring.types import Backend, Generation, OpenBackend, Prompt

PART_PROMPTS = 512

MANY_COPIES = 0.5
"""The fraction of responses equal to the real ones above which a note says so."""


def generate(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes generate/part-*.parquet: `samples` responses of the opponent per training row."""
    start = time.monotonic()
    input_digests = prepare_parts(iteration)
    generate_parts(iteration, open_backend)
    final = iteration.stage("generate")
    work = iteration.run.work(final)
    parts = plan_parts(iteration)
    num_prompts = sum(map(len, parts.values()))
    answers = read_generations(parts)
    num_failed = num_prompts - len(answers)
    if num_failed > iteration.recipe.data.max_skipped * num_prompts:
        raise RunError(
            f"The engine could not respond to {num_failed} of {num_prompts} prompts, listed above: more than "
            f"data.max_skipped ({iteration.recipe.data.max_skipped:g}) allows. Delete {work} to try them again."
        )
    real = {row.id: row.real_ids for row in iteration.train_rows()}
    num_copies = sum(np.array_equal(answer.token_ids, real[answer.id]) for answer in answers)
    commit_folder(
        work,
        final,
        input_digests=input_digests,
        info={
            "seconds": time.monotonic() - start,
            "peak_memory_mib": peak_memory_mib(local_device()),
            "answers": len(answers),
            "failed": num_failed,
            "tokens": sum(len(answer.token_ids) for answer in answers),
            "end_rate": sum(answer.finish == "stop" for answer in answers) / len(answers),
            "copy_rate": num_copies / len(answers),
        },
    )
    if num_copies > MANY_COPIES * len(answers):
        info(
            f"note: {num_copies / len(answers):.0%} of the opponent's training responses equal the real ones "
            "token by token, so they teach nothing. Use rows that the model was not trained on"
        )


def prepare_parts(iteration: Iteration) -> Mapping[str, str]:
    """Creates the work folder, emptied if its parts came from other inputs; returns the input digests."""
    input_digests = iteration.run.input_digests(iteration.run.data, iteration.opponent)
    begin_work(iteration.run.work(iteration.stage("generate")), input_digests)
    return input_digests


def generate_parts(iteration: Iteration, open_backend: OpenBackend, rank: int = 0, num_ranks: int = 1) -> None:
    """Commits every `num_ranks`-th missing part. Opens an engine only if there are any."""
    everything = plan_parts(iteration)
    every = [(path, wanted) for path, wanted in everything.items() if not has_part(path)]
    missing = dict(every[rank::num_ranks])
    if not missing:
        return
    tokenizer = load_tokenizer(iteration.opponent)
    what = f"generate {iteration.index}" + (f", process {rank}" if num_ranks > 1 else "")
    with open_backend(iteration.opponent) as backend, track(what, sum(map(len, missing.values()))) as advance:
        drawn = draw_parts(backend, tokenizer, list(missing.values()), advance)
        for path, (answers, texts) in zip(missing, drawn, strict=True):
            commit_part(path, lambda p, a=answers, t=texts: write_generations(p, a, t))
            interrupt.stop_if_asked()


def draw_parts(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Sequence[Prompt]],
    advance: Advance | None = None,
) -> Iterator[tuple[list[Generation], list[str]]]:
    """The responses of each part, without failed ones, and their texts."""
    # one call for all parts: the engine starts the next part while the last responses of a part are sampled
    drawn = backend.generate([prompt for wanted in parts for prompt in wanted])
    for wanted in parts:
        answers = []
        for answer in islice(drawn, len(wanted)):
            if advance is not None:
                advance(1, len(answer.token_ids))
            if answer.finish != "failed":
                answers.append(answer)
        yield answers, decode_answers(tokenizer, answers)


def plan_parts(iteration: Iteration) -> dict[Path, list[Prompt]]:
    """Every file that the stage commits, with its prompts."""
    settings = iteration.recipe.generate
    prompts = [
        Prompt(
            id=row.id,
            sample=sample,
            token_ids=row.prompt_ids,
            max_new_tokens=min(settings.max_new_tokens, iteration.data.max_length - len(row.prompt_ids)),
            seed=iteration.seed("sample", row.id, sample),
        )
        # longest first: running out of memory happens at once, and batches have prompts of similar length
        for row in sorted(iteration.train_rows(), key=lambda row: (-len(row.prompt_ids), row.id))
        for sample in range(settings.samples)
    ]
    batch = settings.batch_size or BATCH_SIZE
    size = math.ceil(PART_PROMPTS / batch) * batch  # whole batches, so that a resumed stage repeats the same batches
    work = iteration.run.work(iteration.stage("generate"))
    starts = range(0, len(prompts), size)
    return {work / f"part-{n:05d}.parquet": prompts[s : s + size] for n, s in enumerate(starts)}
