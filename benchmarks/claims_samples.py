"""What `claims.py sample` measures of a finished play beyond its own evaluations, on the model of its best iteration.

Sampled accuracy by temperature, pass@8, other problems and chats. The best iteration and the temperature are chosen on
one half of the held-out rows and judged on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sparring.data.checkers import check_responses, make_check
from sparring.model.load import decode_answers, load_model, load_tokenizer, resolve_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import inference_micro_batch_tokens
from sparring.parallel import SingleProcess
from sparring.run.iteration import Iteration, seed_of
from sparring.run.results import Results
from sparring.stages.generate import HfBackend
from sparring.stages.prepare import DataReader, make_renderer
from sparring.types import Group, Prompt, Rendered

TEMPERATURES = (0.3, 0.6)
SAMPLES = 8
CHATS, CHAT_TOKENS = 48, 384


def measure_samples(run: Path, transfer: Path, chats: Path) -> dict[str, object]:
    """Values of single rows are those of the judging half, in one order for all arms of a seed.

    `transfer`: other problems, question and answer. `chats`: rows of another kind, whose NLL tells of forgetting.
    """
    results = Results(run)
    best = results.best()
    assert best is not None
    iteration = Iteration(results.run, results.recipe, best)
    choosing, judging = results.halves
    held_out = iteration.held_out_rows()
    dev = [row for row, is_chosen in zip(held_out, choosing, strict=True) if is_chosen]
    test = [row for row, is_chosen in zip(held_out, judging, strict=True) if is_chosen]
    model = load_model(iteration.policy, dtype=torch.float32, device=torch.device("cpu"))
    chosen_on, judged = {"1": results.value("sampled_accuracy", best, choosing).mean}, {}
    for temperature in TEMPERATURES:
        chosen_on[f"{temperature:g}"] = float(correct(iteration, model, dev, temperature, 1).mean())
        judged[f"{temperature:g}"] = correct(iteration, model, test, temperature, 1)
    judged["1"] = correct(iteration, model, test, 1.0, SAMPLES)
    others = rows_of(iteration, transfer, None)
    greedy = correct(iteration, model, others, 0.0, 1).mean()
    every = {"transfer": others, "chats": rows_of(iteration, chats, CHATS)}
    nll = nll_of(Scorer(model), every)
    return {
        "iteration": best,
        "choosing": {name: round(value, 4) for name, value in chosen_on.items()},
        "judging": {name: values.mean(axis=1).tolist() for name, values in judged.items()},
        f"pass_at_{SAMPLES}": judged["1"].max(axis=1).tolist(),
        "transfer_greedy": round(float(greedy), 4),
        **{f"{name}_nll": round(value, 5) for name, value in nll.items()},
    }


def rows_of(iteration: Iteration, file: Path, limit: int | None) -> list[Rendered]:
    train = iteration.recipe.train.model_copy(update={"max_length": CHAT_TOKENS})
    recipe = iteration.recipe.model_copy(update={"train": train})
    folder = resolve_model(recipe.model)
    reader = DataReader(recipe, make_renderer(recipe, folder, load_tokenizer(folder)))
    return [one.row for one in reader.read(str(file), limit)]


def correct(
    iteration: Iteration, model: torch.nn.Module, rows: Sequence[Rendered], temperature: float, samples: int
) -> np.ndarray:
    """Whether each sample is right: [rows, samples]. Temperature 0 is greedy."""
    engine = HfBackend(model, end_ids=iteration.data.end_ids, temperature=temperature, batch_size=256)  # type: ignore[arg-type]
    rows = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.id))
    limit, seed = iteration.recipe.generate.max_new_tokens, iteration.recipe.seed
    prompts = [
        Prompt(row.id, sample, row.prompt_ids, limit, seed_of(seed, "claims", f"{temperature:g}", row.id, sample))
        for row in rows
        for sample in range(samples)
    ]
    texts = decode_answers(load_tokenizer(iteration.policy), list(engine.generate(prompts)))
    asked = [row for row in rows for _ in range(samples)]
    results = check_responses(make_check("number"), texts, asked)
    return np.array(results, dtype=float).reshape(len(rows), samples)


def nll_of(scorer: Scorer, rows: Mapping[str, Sequence[Rendered]]) -> dict[str, float]:
    """Nats per token of the real responses."""
    parallel = SingleProcess()
    tokens = inference_micro_batch_tokens("auto", parallel.device)
    found = {}
    for name, some in rows.items():
        groups = [Group(row.id, row.prompt_ids, {"real": (row.real_ids,)}) for row in some]
        logprobs = score_groups(scorer, groups, tokens, parallel)["real"]
        found[name] = -float(logprobs.sum()) / sum(len(row.real_ids) for row in some)
    return found
