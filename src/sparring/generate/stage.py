"""The generate stage: the opponent answers every training prompt. Committed part by part."""

from __future__ import annotations

import math
import time
from itertools import islice

from sparring import distributed
from sparring.commits import commit_folder, commit_part, has_part
from sparring.data.tables import read_generations, write_generations
from sparring.errors import Stopped
from sparring.generate.hf import BATCH_SIZE
from sparring.iteration import Iteration
from sparring.model import load_tokenizer, texts_of
from sparring.progress import track
from sparring.types import OpenBackend, Prompt

PART_PROMPTS = 512


def generate(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes generate/part-*.parquet: `samples` answers per training row, drawn by the opponent."""
    start = time.monotonic()
    settings, run = iteration.recipe.generate, iteration.run
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
    reads = run.reads(run.data, iteration.opponent)
    tokenizer = load_tokenizer(iteration.opponent)
    final = iteration.stage("generate")
    work = run.work(final)
    batch = settings.batch_size or BATCH_SIZE
    size = math.ceil(PART_PROMPTS / batch) * batch  # so a rerun that finds some parts still cuts the same batches
    parts = {
        work / f"part-{n:05d}.parquet": prompts[n * size : (n + 1) * size] for n in range(-(-len(prompts) // size))
    }
    missing = {path: wanted for path, wanted in parts.items() if not has_part(path)}
    with open_backend(iteration.opponent) as backend, track(f"generate {iteration.index}", len(prompts)) as advance:
        advance(len(prompts) - sum(map(len, missing.values())), 0)
        # one call for all parts: the engine goes on with the next one while the last answers of a part are drawn
        drawn = backend.generate([prompt for wanted in missing.values() for prompt in wanted])
        for path, wanted in missing.items():
            answers = []
            for answer in islice(drawn, len(wanted)):
                advance(1, len(answer.token_ids))
                if answer.finish != "failed":
                    answers.append(answer)
            texts = texts_of(tokenizer, answers)
            commit_part(path, lambda p, a=answers, t=texts: write_generations(p, a, t))
    answers = read_generations(parts)
    num_failed = len(prompts) - len(answers)
    if num_failed > iteration.recipe.data.max_rejected * len(prompts):
        raise Stopped(
            f"the engine cannot answer {num_failed} of {len(prompts)} prompts, named above; more than "
            f"data.max_rejected ({iteration.recipe.data.max_rejected:g}) allows. Delete {work} to have them tried again"
        )
    commit_folder(
        work,
        final,
        reads=reads,
        info={
            "seconds": time.monotonic() - start,
            "peak_memory_mib": distributed.peak_memory_mib(),
            "answers": len(answers),
            "failed": num_failed,
            "tokens": sum(len(answer.token_ids) for answer in answers),
            "end_rate": sum(answer.finish == "stop" for answer in answers) / len(answers),
        },
    )
