"""The generate stage: the opponent answers every training prompt. Committed part by part."""

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
"""The share of answers equal to the real ones from which a person is told."""


def generate(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes generate/part-*.parquet: `samples` answers per training row, drawn by the opponent."""
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
            f"the engine cannot answer {num_failed} of {num_prompts} prompts, named above; more than "
            f"data.max_skipped ({iteration.recipe.data.max_skipped:g}) allows. Delete {work} to have them tried again"
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
            f"note: {num_copies / len(answers):.0%} of the opponent's answers to training prompts are the real ones, "
            "token by token: on those rows there is nothing to tell apart. Play on rows that it was not trained on"
        )


def prepare_parts(iteration: Iteration) -> Mapping[str, str]:
    """Makes the folder for parts, emptied of any that were made from other inputs; returns what the stage reads."""
    input_digests = iteration.run.input_digests(iteration.run.data, iteration.opponent)
    begin_work(iteration.run.work(iteration.stage("generate")), input_digests)
    return input_digests


def generate_parts(iteration: Iteration, open_backend: OpenBackend, rank: int = 0, num_ranks: int = 1) -> None:
    """Commits every `num_ranks`-th of the parts that are missing. An engine is opened if there are any."""
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
    """The answers of each part, without those that failed, and their texts."""
    # one call for all parts: the engine goes on with the next one while the last answers of a part are drawn
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
    """Every file that the stage commits, with the prompts whose answers are in it."""
    settings = iteration.recipe.generate
    prompts = [
        Prompt(
            id=row.id,
            sample=sample,
            token_ids=row.prompt_ids,
            max_new_tokens=min(settings.max_new_tokens, iteration.data.max_length - len(row.prompt_ids)),
            seed=iteration.seed("sample", row.id, sample),
        )
        # longest first: the most memory is needed at once, and batches hold prompts of similar length
        for row in sorted(iteration.train_rows(), key=lambda row: (-len(row.prompt_ids), row.id))
        for sample in range(settings.samples)
    ]
    batch = settings.batch_size or BATCH_SIZE
    size = math.ceil(PART_PROMPTS / batch) * batch  # so a rerun that finds some parts still cuts the same batches
    work = iteration.run.work(iteration.stage("generate"))
    starts = range(0, len(prompts), size)
    return {work / f"part-{n:05d}.parquet": prompts[s : s + size] for n, s in enumerate(starts)}
