"""One training step's forward and backward pass, ours against what people use today, side by side.

    python benchmarks/step.py --out benchmarks/results/step.json                everything, 7 rounds: an hour or two
    python benchmarks/step.py --only chat --out benchmarks/results/step.json    the cases whose name has it
    python benchmarks/step.py --minutes 4 --out benchmarks/results/step.json    what fits; the same call again goes on

Each arm is a process of its own (one thread, the same weights and tokens); in each round every arm takes one step, in
turn, and nothing is timed before loss and gradient agree with the plain loop (float32: 1e-4 of the gradient's norm;
TRL as it comes has another reference, and is held to the loss log 2). Seconds are CPU seconds of the process, which a
shared machine disturbs least. Rounds are added to what the file holds. Arms:

    plain          padded rows, full logits, cached reference log-probs: the loop that people write
    two-models     the same with the opponent's forward pass in every step: what the released SPIN trainer computes
    trl            TRL's DPOTrainer as it comes, reference on the fly         (pairs; TRL must be installed)
    trl-cached     with its precomputed reference log-probs
    trl-tuned      also with its tile of the vocabulary repaired for CPUs (4096)
    trl-cpo        two terms of TRL's CPOTrainer, which together are T-SPIN's loss        (triplets)
    padded         sparring's twin: padded rows, response tokens alone through the head
    shared         sparring
    shared-pair    sparring, on the same prompts without their proto answers              (triplets)
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # large pages for every arm, as sparring asks for

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_seeds import cpu_name
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparring.hardware import has_bfloat16_products
from sparring.layout import arrange, padded_rows, shared_row
from sparring.logprobs import Scorer, model_inputs, sequence_logprobs
from sparring.objectives import Spin, Tspin
from sparring.types import Group, Scores

PROFILES = {  # mean tokens of (prompt, response); each length varies by 25 % to both sides
    "chat": (150, 250),
    "long-prompt": (1000, 150),
    "long-answer": (100, 800),
    "256/64": (256, 64),
    "128/128": (128, 128),
    "64/192": (64, 192),
    "row-2k": (1000, 500),
    "row-4k": (2000, 1000),
    "row-8k": (4000, 2000),
}
MODELS = {  # width, inner width, layers, heads, key-value heads
    "30m": (384, 1024, 8, 6, 6),
    "160m": (768, 2048, 16, 12, 12),
}
PAIR = ("plain", "two-models", "trl", "trl-cached", "trl-tuned", "padded", "shared")
TRIPLET = ("plain", "trl-cpo", "padded", "shared", "shared-pair")
FEW = ("plain", "trl-tuned", "shared")


@dataclass(frozen=True)
class Case:
    """One table: what is computed, and by whom."""

    profile: str
    dtype: str = "float32"
    arms: tuple[str, ...] = PAIR
    groups: int = 2  # prompts in the step
    model: str = "30m"
    vocab: int = 32000
    samples: int = 1  # generated answers per prompt
    rounds: int = 7

    @property
    def is_triplet(self) -> bool:
        return "shared-pair" in self.arms


def all_cases() -> dict[str, Case]:
    """The most telling first."""
    dtypes, profiles = {"bf16": "bfloat16", "fp32": "float32"}, ("chat", "long-prompt", "long-answer")
    cases = {}
    for arms, game in ((PAIR, "pair"), (TRIPLET, "triplet")):
        for profile in profiles:
            for short, dtype in dtypes.items():
                cases[f"{profile} {game} {short}"] = Case(profile, dtype, arms, 2 if profile == "chat" else 1)
    for short, dtype in dtypes.items():
        cases[f"chat pair {short} 150k"] = Case("chat", dtype, FEW, 1, vocab=150_000)
        for samples in (1, 3, 7):
            cases[f"chat k={samples} {short}"] = Case("chat", dtype, ("plain", "shared"), 1, samples=samples)
        for row in ("row-2k", "row-4k", "row-8k"):
            cases[f"{row} {short}"] = Case(row, dtype, ("padded", "shared"), 1)
        cases[f"chat pair {short} 160m"] = Case("chat", dtype, FEW, 1, "160m", rounds=3)
        for profile in ("256/64", "128/128", "64/192"):  # the shapes of an earlier prototype
            cases[f"{profile} pair {short}"] = Case(profile, dtype, FEW, 4)
    return cases


def make_model(size: str, vocab: int, seed: int = 0) -> PreTrainedModel:
    width, inner, layers, heads, kv_heads = MODELS[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def make_groups(case: Case) -> list[Group]:
    random = np.random.default_rng(0)

    def tokens(mean: int) -> np.ndarray:
        return random.integers(3, case.vocab, random.integers(round(0.75 * mean), round(1.25 * mean) + 1)).astype(
            np.int32
        )

    prompt, response = PROFILES[case.profile]
    roles = {"real": 1, "generated": case.samples} | ({"proto": 1} if case.is_triplet else {})
    return [
        Group(str(i), tokens(prompt), {role: tuple(tokens(response) for _ in range(n)) for role, n in roles.items()})  # type: ignore[misc]
        for i in range(case.groups)
    ]


def plain_scores(model: PreTrainedModel, groups: list[Group]) -> Scores:
    layout = padded_rows(groups)
    column = torch.arange(layout.input_ids.shape[1])
    prompts = torch.tensor([len(g.prompt_ids) for g in groups for rs in g.responses.values() for _ in rs])
    is_response = (column >= prompts[:, None]) & layout.attention_mask.bool()
    logits = model(**model_inputs(layout), use_cache=False).logits
    return layout.scores(sequence_logprobs(logits, layout.input_ids, is_response))


def make_step(arm: str, case: Case) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """The policy, and a function that gives the loss of one step."""
    groups = make_groups(case)
    if arm == "shared-pair":
        arm, case = "shared", replace(case, arms=PAIR)
        groups = [Group(g.id, g.prompt_ids, {r: g.responses[r] for r in ("real", "generated")}) for g in groups]
    objective = Tspin(alpha=0.1, beta=0.1) if case.is_triplet else Spin(lambda_=0.1)
    model = make_model(case.model, case.vocab)
    opponent: dict[Any, torch.Tensor] = {}
    if not case.is_triplet:  # near a random model's, so that no gradient is nothing
        nats = math.log(case.vocab)
        lengths = padded_rows(groups).lengths()
        opponent = {role: -nats * lengths[role].float() for role in ("real", "generated")}
    dtype = getattr(torch, case.dtype)

    def mean_loss(policy: Scores, lengths: Any) -> torch.Tensor:
        return objective(policy, opponent, lengths).per_example.mean()  # type: ignore[arg-type]

    if arm in ("plain", "two-models"):
        lengths = padded_rows(groups).lengths()
        frozen = make_model(case.model, case.vocab, seed=1) if arm == "two-models" else None

        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if frozen is not None:
                    with torch.no_grad():
                        plain_scores(frozen, groups)  # its cost; the numbers stay those of the other arms
                return mean_loss(plain_scores(model, groups), lengths)

    elif arm in ("padded", "shared"):
        scorer = Scorer(model, dtype, arm)  # type: ignore[arg-type]

        def step() -> torch.Tensor:
            layout = arrange(scorer.kind, groups)
            return mean_loss(layout.scores(scorer(layout)), layout.lengths())

    else:
        losses = (
            cpo_losses(model, groups) if arm == "trl-cpo" else [(1.0, *make_trl(arm, model, case, groups, opponent))]
        )

        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return sum(weight * trainer.compute_loss(trainer.model, batch) for weight, trainer, batch in losses)

    return model, step


QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
    "disable_tqdm": True,
    "per_device_train_batch_size": 1,
    "dataloader_pin_memory": False,
}
ROW = {"prompt": "1", "chosen": " 2", "rejected": " 3"}


def cpo_losses(model: PreTrainedModel, groups: list[Group]) -> list[tuple[float, Any, dict[str, torch.Tensor]]]:
    """T-SPIN's two terms, each as a batch of pairs: (weight, trainer, batch)."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from sparring.demo import make_tokenizer

    settings = CPOConfig(output_dir=tempfile.mkdtemp(), beta=0.1, cpo_alpha=0.0, **QUIET)
    trainer = CPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([ROW]),
        processing_class=make_tokenizer([{"question": "1 2 3", "answer": "1 2 3"}]),
    )

    def batch(first: str, second: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, role in (("chosen", first), ("rejected", second)):
            rows = padded_rows([Group(g.id, g.prompt_ids, {"real": g.responses[role]}) for g in groups])  # type: ignore[index]
            prompts = torch.tensor([len(g.prompt_ids) for g in groups])
            hidden = (torch.arange(rows.input_ids.shape[1]) < prompts[:, None]) | (rows.attention_mask == 0)
            found |= {
                f"{name}_input_ids": rows.input_ids,
                f"{name}_attention_mask": rows.attention_mask,
                f"{name}_labels": rows.input_ids.masked_fill(hidden, -100),
            }
        return found

    return [(1.0, trainer, batch("real", "generated")), (0.1, trainer, batch("generated", "proto"))]


def make_trl(
    arm: str, model: PreTrainedModel, case: Case, groups: list[Group], opponent: Scores
) -> tuple[Any, dict[str, torch.Tensor]]:
    """TRL's own trainer and its own batch of our tokens. Its text pipeline is not timed, and is given one row."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparring.demo import make_tokenizer

    if arm == "trl-tuned":
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = 4096
    settings = DPOConfig(output_dir=tempfile.mkdtemp(), precompute_ref_log_probs=arm != "trl", **QUIET)
    reference = make_model(case.model, case.vocab) if arm == "trl" else None
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list([ROW]),
        processing_class=make_tokenizer([{"question": "1 2 3", "answer": "1 2 3"}]),
    )
    examples = [
        {
            "prompt_ids": group.prompt_ids.tolist(),
            "chosen_ids": group.responses["real"][0].tolist(),
            "rejected_ids": group.responses["generated"][0].tolist(),
            **({} if arm == "trl" else {"ref_chosen_logps": float(a), "ref_rejected_logps": float(b)}),
        }
        for group, a, b in zip(groups, opponent["real"], opponent["generated"][:, 0], strict=True)
    ]
    return trainer, trainer.data_collator(examples)


def child(arm: str, case: Case, expected: Path, pipe: Connection) -> None:
    """One arm: a step to warm up, whose loss and gradient are compared; then a timed step whenever it is asked."""
    model, step = make_step(arm, case)
    before = resident_mib()
    loss = step()
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # before the comparison, which needs more
    error = compare(arm, case, loss.detach(), model, expected)
    pipe.send({"mib": peak - before, "gradient_error": error})
    while pipe.recv():
        model.zero_grad()
        start = time.process_time()
        step().backward()
        pipe.send(time.process_time() - start)


def compare(arm: str, case: Case, loss: torch.Tensor, model: PreTrainedModel, expected: Path) -> float | None:
    """The distance of the gradient from the plain loop's, in units of its norm."""
    if arm == "shared-pair":  # another loss; the pair game has its own comparison
        return None
    if arm == "trl":  # its reference is the policy, so that its loss is another, and known
        if abs(float(loss) - math.log(2)) > 1e-4:
            raise SystemExit(f"trl: its loss is {float(loss)}, not log 2")
        return None
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if arm == "plain":
        save_file({"loss": loss, "gradient": gradient}, expected)
        return None
    plain = load_file(expected)
    error = float((gradient - plain["gradient"]).norm() / plain["gradient"].norm())
    if case.dtype == "float32" and not (error < 1e-4 and abs(float(loss - plain["loss"])) < 1e-3):
        raise SystemExit(f"{arm} computes something else: gradient off by {error:.2g}, loss {float(loss)}")
    return error


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def limits(case: Case) -> dict[str, float]:
    """What no way of computing the step can avoid.

    FLOPs: 6 per body weight and shared token, 6 per head weight and response token, and attention over visible keys.
    Bytes beside the weights: the gradient, and what one layer hands to its backward pass.
    """
    width, inner, layers, heads, kv_heads = MODELS[case.model]
    kv = kv_heads * width // heads
    body = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    groups = make_groups(case)
    shared = shared_row(groups)
    visible = 0
    for prompt, *rest in shared.shared_prompts.sizes:  # type: ignore[union-attr]
        visible += prompt**2 // 2 + sum(r * prompt + r**2 // 2 for r in rest)
    tokens, size = shared.computed_tokens, 4 if case.dtype == "float32" else 2
    flops = 6 * body * tokens + 6 * width * case.vocab * int(shared.num_tokens.sum()) + 12 * layers * width * visible
    return {
        "tokens_of_rows": padded_rows(groups).computed_tokens,
        "tokens_shared": tokens,
        "least_gflops": round(flops / 1e9, 1),
        "least_mib": round(
            (4 * (body + width * case.vocab) + tokens * (4 * width + 2 * kv + 3 * inner) * size) / 2**20
        ),
    }


def matrix_peak(dtype: str) -> float:
    """FLOP/s of one core on square matrix products."""
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    best = 1e9
    for _ in range(8):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def measure(case: Case, known: dict[str, Any], rounds: int, until: float) -> Iterator[dict[str, Any]]:
    """Adds rounds to `known`, until there are enough or the time is over; after each of them, all there is."""
    arms = [a for a in case.arms if has_trl() or "trl" not in a]
    seconds: dict[str, list[float]] = {arm: known.get("seconds", {}).get(arm, []) for arm in arms}
    fork = get_context("fork")  # a process per arm, without importing everything again
    pipes: dict[str, Connection] = {}
    processes = []
    first = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for arm in arms:
                pipes[arm], theirs = fork.Pipe()
                processes.append(fork.Process(target=child, args=(arm, case, Path(folder) / "expected", theirs)))
                processes[-1].start()
                theirs.close()
                first[arm] = pipes[arm].recv()
                print(arm, first[arm], flush=True)
            peaks = known.get("matrix_peaks", [])
            while len(seconds[arms[-1]]) < rounds:
                peaks = [*peaks, matrix_peak(case.dtype)]
                for arm in arms:
                    pipes[arm].send(True)
                    seconds[arm].append(round(pipes[arm].recv(), 4))
                print({arm: values[-1] for arm, values in seconds.items()}, flush=True)
                yield {**asdict(case), **limits(case), "matrix_peaks": peaks, "seconds": seconds, "first": first}
                if time.monotonic() > until:
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()


def summary(found: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The matrix peak is the best that was seen in this dtype in any case: what disturbs a round disturbs it too."""
    ours = statistics.median(found["seconds"]["shared"])
    peak = max(max(other["matrix_peaks"]) for other in results.values() if other["dtype"] == found["dtype"])
    arms = {}
    for arm, seconds in found["seconds"].items():
        median, first = statistics.median(seconds), found["first"][arm]
        arms[arm] = {
            "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
            "times_ours": round(median / ours, 3),
            "row_tokens_per_second": round(found["tokens_of_rows"] / median),
            "share_of_matrix_peak": round(found["least_gflops"] * 1e9 / peak / median, 3),
            "mib_over_weights": round(first["mib"]),
            "times_least_memory": round(first["mib"] / found["least_mib"], 2),
            "gradient_error": first["gradient_error"],
        }
    return {"rounds": len(found["seconds"]["shared"]), "matrix_peak_gflops": round(peak / 1e9, 1), "arms": arms}


def has_trl() -> bool:
    try:
        version("trl")
    except PackageNotFoundError:
        return False
    return True


def machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, bfloat16 products: " + (
        "yes" if has_bfloat16_products() else "no"
    )


def main() -> None:
    cases = all_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a case, or a part of the names of several")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round after so many")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * arguments.minutes
    chosen = {arguments.only} & set(cases) or {name for name in cases if (arguments.only or "") in name}
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"results": {}}
    for name, case in cases.items():
        known = result["results"].get(name, {})
        rounds = min(case.rounds, arguments.rounds)
        if name not in chosen or len(known.get("seconds", {}).get("shared", [])) >= rounds:
            continue
        if time.monotonic() > until:
            break
        print(name, flush=True)
        packages = ("sparring", "torch", "transformers", *(["trl"] if has_trl() else []))
        result["machine"], result["versions"] = machine(), {package: version(package) for package in packages}
        for found in measure(case, known, rounds, until):
            results = result["results"] | {name: found}
            result["results"] = {key: {**one, "summary": summary(one, results)} for key, one in results.items()}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
