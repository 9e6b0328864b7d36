"""Measures one epoch of training: loading, packing, optimizer, checkpoints and saving.

    python benchmarks/epoch.py ROWS.jsonl FOLDER --out benchmarks/results/epoch.json --rows 64 --rounds 3
    python benchmarks/epoch.py long-prompt FOLDER --out FILE --method tspin --dtype bfloat16
    python benchmarks/epoch.py TASK/train.jsonl FOLDER --model TASK/model --out FILE    (TASK: runs/real/task)

Rows are questions and answers from a file, with a byte-level BPE tokenizer trained on them, or random words with the
lengths of a profile of benchmarks/step.py. The generated answer of a row is another row's real one. A Llama of 27
million parameters, or --model with its own chat template, plays SPIN's first iteration, or T-SPIN's second, whose proto
answers are a third row's. All arms have the same answers, order and reference log-probs (computed once by sparring and
cached), AdamW, gradient norm 1, a checkpoint with optimizer state after every step but the last, and the model at the
end. One thread. Arms:

    sparring    the train stage, from files to files
    trl         TRL's DPOTrainer.train() and save_model(), cached reference, vocabulary tile repaired for CPUs (4096)
    trl-cpo     two terms of TRL's CPOTrainer, which together are T-SPIN's loss, in the plain loop   (for trl, T-SPIN)
    plain       padded rows of --pairs prompts, full logits, a loop of thirty lines

In each round every arm trains one epoch in its own process, in turn. Seconds are CPU seconds of that process without
imports, tokenizing and TRL's constructor. Tokens are those of padded rows, with the prompt counted for each answer.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # as benchmarks/step.py

import argparse
import json
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import machine, resident_mib
from step_arms import PROFILES, QUIET, ROW, cpo_terms, make_model, plain_scores
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparring.model.load import load_model, save_model
from sparring.model.packing import pack_padded
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.rundir import RunDir
from sparring.run.schedule import permutation
from sparring.stages.generate import generate
from sparring.stages.prepare import prepare
from sparring.stages.score import score
from sparring.stages.train.loop import train
from sparring.types import Backend, Generation, Prompt, TrainingExample

VOCAB, BATCH = 32_000, 16
END = "<|end|>"
CPU = torch.device("cpu")


class Others:
    """Answers with the real answer of another row, a different one in each iteration."""

    def __init__(self, iteration: Iteration) -> None:
        rows = iteration.train_rows()
        places = np.random.default_rng(iteration.index).permutation(len(rows))
        self.answers = {row.id: rows[place].real_ids for row, place in zip(rows, places, strict=True)}

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        for prompt in prompts:
            yield Generation(prompt.id, prompt.sample, self.answers[prompt.id][: prompt.max_new_tokens], "stop")


def write_profile(profile: str, path: Path, count: int) -> None:
    """Writes rows of random words; each word is a token."""
    random = np.random.default_rng(0)

    def words(mean: int) -> str:
        length = random.integers(round(0.75 * mean), round(1.25 * mean) + 1)
        return " ".join(map(str, random.integers(0, VOCAB - 1, length)))

    prompt, answer = PROFILES[profile]
    rows = [{"prompt": words(prompt), "completion": words(answer)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer_of(rows: Path, is_profile: bool) -> PreTrainedTokenizerFast:
    if is_profile:
        words = Tokenizer(WordLevel({END: 0} | {str(i): i + 1 for i in range(VOCAB - 1)}, unk_token=END))
        words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    pieces = ByteLevelBPETokenizer()
    pieces.train([str(rows)], vocab_size=VOCAB, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, eos_token=END, pad_token=END)


def prepare_run(wanted: argparse.Namespace) -> Iteration:
    """Returns an iteration that is ready to train."""
    folder, rows = wanted.folder, Path(wanted.rows)
    is_profile = wanted.rows in PROFILES
    folder.mkdir(parents=True)
    if is_profile:
        rows = folder / "rows.jsonl"
        write_profile(wanted.rows, rows, wanted.limit)
    model, template = wanted.model or folder / "model", None if wanted.model else "{prompt}\n"
    if wanted.model is None:
        save_model(make_model("30m", VOCAB), tokenizer_of(rows, is_profile), model)
    train_settings = {
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "epochs": 1,
    }
    raw = {
        "model": str(model),
        "method": SETTINGS[wanted.method],
        "iterations": 2,
        "data": {"train": str(rows), "held_out": 0, "template": template, "limit": wanted.limit},
        "generate": {"max_new_tokens": 1024},
        "train": {
            **train_settings,
            "batch_size": BATCH,
            "micro_batch_tokens": "auto",
            "dtype": wanted.dtype,
            "checkpoint_minutes": 0,
        },
        "threads": 1,
    }
    run, recipe = RunDir(folder / "run"), Recipe.model_validate(raw)
    with run.own():
        prepare(run, recipe)
        first = Iteration(run, recipe, 0)
        draw(first)
        if wanted.method == "spin":
            return first
        train(first, SingleProcess())  # T-SPIN's proto answers are those generated in its first iteration
        second = Iteration(run, recipe, 1)
        draw(second)
    return second


def draw(iteration: Iteration) -> None:
    @contextmanager
    def engine(model: Path) -> Iterator[Backend]:
        yield Others(iteration)

    generate(iteration, engine)
    score(iteration, SingleProcess())


def in_order(iteration: Iteration) -> list[TrainingExample]:
    """Examples in the train stage's order."""
    plays = load_training_examples(iteration)
    return [plays[i] for i in permutation(len(plays), iteration.seed("order", 0))]


def by_sparring(iteration: Iteration, folder: Path, pairs: int) -> Iterator[list[float]]:
    yield []
    with iteration.run.own():
        train(iteration, SingleProcess())
    lines = (iteration.stage("train") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    yield [json.loads(line)["loss"] for line in lines]


def by_trl(iteration: Iteration, folder: Path, pairs: int) -> Iterator[list[float]]:
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparring.commands.demo import make_tokenizer

    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = 4096
    settings = iteration.recipe.train
    steps = len(iteration.train_rows()) // BATCH
    config = DPOConfig(
        **{
            **QUIET,
            "output_dir": str(folder / "trl"),
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": BATCH // pairs,
            "num_train_epochs": 1,
            "beta": 0.1,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant",
            "bf16": settings.dtype == "bfloat16",
            "train_sampling_strategy": "sequential",
            "precompute_ref_log_probs": True,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": 2,
            "max_steps": steps,
        }
    )
    trainer = DPOTrainer(
        model=load_model(iteration.opponent, dtype=torch.float32, device=CPU),
        args=config,
        train_dataset=Dataset.from_list([ROW]),
        processing_class=make_tokenizer([{"question": "1 2 3", "answer": "1 2 3"}]),
    )
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": play.group.prompt_ids.tolist(),
                "chosen_ids": play.group.responses["real"][0].tolist(),
                "rejected_ids": play.group.responses["generated"][0].tolist(),
                "ref_chosen_logps": float(play.opponent["real"]),
                "ref_rejected_logps": float(play.opponent["generated"][0]),
            }
            for play in in_order(iteration)
        ]
    )
    yield []
    trainer.train()
    trainer.save_model(str(folder / "trl" / "final"))
    yield [line["loss"] for line in trainer.state.log_history if "loss" in line]


def by_plain(iteration: Iteration, folder: Path, pairs: int) -> Iterator[list[float]]:
    plays, settings, objective = in_order(iteration), iteration.recipe.train, iteration.recipe.method

    def loss_of(model: PreTrainedModel, some: list[TrainingExample]) -> torch.Tensor:
        groups = [play.group for play in some]
        opponent: Any = {
            role: torch.from_numpy(np.stack([play.opponent[role] for play in some])) for role in some[0].opponent
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            policy = plain_scores(model, groups)
        return objective(policy, opponent, pack_padded(groups).lengths()).per_example.sum()

    yield []
    model = load_model(iteration.opponent, dtype=torch.float32, device=CPU).train()
    yield loop(iteration, plays, pairs, model, loss_of, folder / "plain")


def by_cpo(iteration: Iteration, folder: Path, pairs: int) -> Iterator[list[float]]:
    plays, settings = in_order(iteration), iteration.recipe.train
    model = load_model(iteration.opponent, dtype=torch.float32, device=CPU).train()
    terms_of = cpo_terms(model)

    def loss_of(model: PreTrainedModel, some: list[TrainingExample]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            terms = terms_of([play.group for play in some])
            return len(some) * sum(weight * trainer.compute_loss(model, batch) for weight, trainer, batch in terms)

    yield []
    yield loop(iteration, plays, pairs, model, loss_of, folder / "cpo")


def loop(
    iteration: Iteration,
    plays: list[TrainingExample],
    pairs: int,
    model: PreTrainedModel,
    loss_of: Callable[[PreTrainedModel, list[TrainingExample]], torch.Tensor],
    folder: Path,
) -> list[float]:
    """A plain training loop."""
    settings, losses = iteration.recipe.train, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step in range(len(plays) // BATCH):
        batch, total = plays[step * BATCH : (step + 1) * BATCH], 0.0
        for first in range(0, BATCH, pairs):
            loss = loss_of(model, batch[first : first + pairs]) / BATCH
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if (step + 1) * BATCH < len(plays):
            folder.mkdir(exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    model.save_pretrained(folder)
    return losses


ARMS = {"sparring": by_sparring, "trl": by_trl, "trl-cpo": by_cpo, "plain": by_plain}
SETTINGS = {"spin": "spin", "tspin": {"name": "tspin", "alpha": 0.1, "beta": 0.1}}
PLAYED = {"spin": ("sparring", "trl", "plain"), "tspin": ("sparring", "trl-cpo", "plain")}


def child(arm: str, iteration: Iteration, folder: Path, pairs: int, pipe: Connection) -> None:
    work = ARMS[arm](iteration, folder, pairs)
    next(work)
    before, wall, cpu = resident_mib(), time.perf_counter(), time.process_time()
    losses = next(work)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    pipe.send({"cpu": cpu, "wall": wall, "peak_mib": peak, "mib_before": before, "losses": losses})


def one_epoch(arm: str, iteration: Iteration, folder: Path, pairs: int) -> dict[str, Any]:
    shutil.rmtree(iteration.stage("train"), ignore_errors=True)
    ours, theirs = get_context("fork").Pipe()  # avoids importing everything again
    process = get_context("fork").Process(target=child, args=(arm, iteration, folder, pairs, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help=f"a file of rows, or a profile: {', '.join(PROFILES)}")
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", dest="limit", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a chat model; without it, 27 million random parameters")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", choices=PLAYED, default="spin")
    parser.add_argument("--pairs", type=int, default=2, help="prompts per micro-batch, for arms that pad")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    iteration = prepare_run(arguments)
    plays = in_order(iteration)
    row_tokens = sum(pack_padded([play.group]).computed_tokens for play in plays)
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in PLAYED[arguments.method]}
    result: dict[str, Any] = {}
    for number in range(arguments.rounds):
        for arm, found in rounds.items():
            found.append(one_epoch(arm, iteration, arguments.folder, arguments.pairs))
            print(number, arm, {k: round(v, 1) for k, v in found[-1].items() if k != "losses"}, flush=True)
        medians = {arm: statistics.median(f["cpu"] for f in found) for arm, found in rounds.items()}
        first = next(iter(rounds.values()))[0]["losses"]
        result = {
            "what": f"{arguments.method}, {len(plays)} rows of {Path(arguments.rows).stem}, batches of {BATCH}; "
            f"padded: {arguments.pairs} prompts per micro-batch",
            "machine": machine(),
            "versions": {name: version(name) for name in ("sparring", "torch", "transformers", "trl")},
            "dtype": arguments.dtype,
            "row_tokens": row_tokens,
            "arms": {
                arm: {
                    "cpu_seconds": [round(f["cpu"], 2) for f in found],
                    "wall_seconds": [round(f["wall"], 2) for f in found],
                    "row_tokens_per_cpu_second": round(row_tokens / medians[arm]),
                    "times_the_first_arm": round(medians[arm] / medians[next(iter(rounds))], 3),
                    "peak_mib": round(statistics.median(f["peak_mib"] for f in found)),
                    "largest_difference_of_a_step_s_loss": max(
                        abs(a - b) for a, b in zip(first, found[0]["losses"], strict=True)
                    ),
                }
                for arm, found in rounds.items()
            },
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
