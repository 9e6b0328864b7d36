"""The generate stage: the opponent answers every training prompt. Committed part by part."""

from __future__ import annotations

import time

import numpy as np

from sparring import distributed, interrupt
from sparring.commits import begin_work, commit_folder, commit_part, has_part
from sparring.data.tables import read_generations, write_generations
from sparring.iteration import Iteration
from sparring.model import load_tokenizer, texts_of
from sparring.progress import say, track
from sparring.types import OpenBackend, Prompt

PART_PROMPTS = 512

MANY_COPIES = 0.5
"""The share of answers equal to the real ones from which a person is told."""


def generate(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes generate/part-*.parquet: `samples` answers per training row, drawn by the opponent."""
    start = time.monotonic()
    settings, run = iteration.recipe.generate, iteration.run
    reads = run.reads(run.data, iteration.opponent)
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
    tokenizer = load_tokenizer(iteration.opponent)
    final = iteration.stage("generate")
    work = begin_work(run.work(final), reads)
    real = {row.id: row.real_ids for row in iteration.train_rows()}
    num_tokens = num_stopped = num_copies = 0
    with open_backend(iteration.opponent) as backend, track(f"generate {iteration.index}", len(prompts)) as advance:
        for part in range(0, len(prompts), PART_PROMPTS):
            path = work / f"part-{part // PART_PROMPTS:05d}.parquet"
            wanted = prompts[part : part + PART_PROMPTS]
            if has_part(path):
                answers = read_generations([path])
            else:
                answers = []
                for answer in backend.generate(wanted):
                    answers.append(answer)
                    advance(1, len(answer.token_ids))
                texts = texts_of(tokenizer, answers)
                commit_part(path, lambda p, a=answers, t=texts: write_generations(p, a, t))
                interrupt.stop_if_asked()
            num_tokens += sum(len(a.token_ids) for a in answers)
            num_stopped += sum(a.finish == "stop" for a in answers)
            num_copies += sum(np.array_equal(a.token_ids, real[a.id]) for a in answers)
    commit_folder(
        work,
        final,
        reads=reads,
        info={
            "seconds": time.monotonic() - start,
            "peak_memory_mib": distributed.peak_memory_mib(),
            "answers": len(prompts),
            "tokens": num_tokens,
            "end_rate": num_stopped / len(prompts),
            "copy_rate": num_copies / len(prompts),
        },
    )
    if num_copies > MANY_COPIES * len(prompts):
        say(
            f"note: {num_copies / len(prompts):.0%} of the opponent's answers to training prompts are the real ones, "
            "token by token: on those rows there is nothing to tell apart. Play on rows that it was not trained on"
        )
