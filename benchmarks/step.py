"""One training step's forward and backward pass, ours against what people use today, side by side.

    python benchmarks/step.py --out benchmarks/results/step.json              every profile, 7 rounds
    python benchmarks/step.py --profile chat --rounds 1 --out /tmp/step.json

Each arm of each round is a process of its own (one thread, the same weights and tokens), the arms take turns, and
nothing is timed before loss and gradient agree with the plain loop (float32: 1e-4 of the gradient's norm; TRL as it
comes has another reference, and is held to the loss log 2). Seconds are CPU seconds of the process, which a shared
machine disturbs least. Arms:

    plain          padded rows, full logits, cached reference log-probs: the loop that people write
    two-models     the same with the opponent's forward pass in every step: what the released SPIN trainer computes
    trl            TRL's DPOTrainer as it comes, reference on the fly         (pairs; TRL must be installed)
    trl-cached     with its precomputed reference log-probs
    trl-tuned      also with its tile of the vocabulary repaired for CPUs (4096)
    padded         sparring's twin: padded rows, response tokens alone through the head
    shared         sparring
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_seeds import cpu_name
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

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
}
MODELS = {  # width, inner width, layers, heads, key-value heads
    "30m": (384, 1024, 8, 6, 6),
    "135m": (576, 1536, 30, 9, 3),
}
PAIR_ARMS = ("plain", "two-models", "trl", "trl-cached", "trl-tuned", "padded", "shared")
TRIPLET_ARMS = ("plain", "padded", "shared")


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
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def make_groups(profile: str, vocab: int, count: int, roles: dict[str, int]) -> list[Group]:
    random = np.random.default_rng(0)

    def tokens(mean: int) -> np.ndarray:
        return random.integers(3, vocab, random.integers(round(0.75 * mean), round(1.25 * mean) + 1)).astype(np.int32)

    prompt, response = PROFILES[profile]
    return [
        Group(str(i), tokens(prompt), {role: tuple(tokens(response) for _ in range(n)) for role, n in roles.items()})  # type: ignore[misc]
        for i in range(count)
    ]


def plain_scores(model: PreTrainedModel, groups: list[Group]) -> Scores:
    layout = padded_rows(groups)
    column = torch.arange(layout.input_ids.shape[1])
    prompts = torch.tensor([len(g.prompt_ids) for g in groups for rs in g.responses.values() for _ in rs])
    is_response = (column >= prompts[:, None]) & layout.attention_mask.bool()
    logits = model(**model_inputs(layout), use_cache=False).logits
    return layout.scores(sequence_logprobs(logits, layout.input_ids, is_response))


def make_step(
    arm: str, arguments: argparse.Namespace, groups: list[Group]
) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """The policy, and a function that gives the loss of one step."""
    triplet = arguments.game == "triplet"
    objective = Tspin(alpha=0.1, beta=0.1) if triplet else Spin(lambda_=0.1)
    model = make_model(arguments.model, arguments.vocab)
    opponent = (
        {}
        if triplet
        else {"real": torch.full((len(groups),), -900.0), "generated": torch.full((len(groups), 1), -905.0)}
    )
    dtype = getattr(torch, arguments.dtype)

    def mean_loss(policy: Scores, opponent: Scores, lengths: Any) -> torch.Tensor:
        return objective(policy, opponent, lengths).per_example.mean()  # type: ignore[arg-type]

    if arm in ("plain", "two-models"):
        lengths = padded_rows(groups).lengths()
        frozen = make_model(arguments.model, arguments.vocab, seed=1) if arm == "two-models" else None

        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if frozen is not None:
                    with torch.no_grad():
                        plain_scores(frozen, groups)  # its cost; the numbers stay those of the other arms
                return mean_loss(plain_scores(model, groups), opponent, lengths)

    elif arm in ("padded", "shared"):
        scorer = Scorer(model, dtype, arm)  # type: ignore[arg-type]

        def step() -> torch.Tensor:
            layout = arrange(scorer.kind, groups)
            return mean_loss(layout.scores(scorer(layout)), opponent, layout.lengths())

    else:
        trainer, batch = make_trl(arm, model, arguments, groups, opponent)

        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return trainer.compute_loss(trainer.model, batch)

    return model, step


def make_trl(
    arm: str, model: PreTrainedModel, arguments: argparse.Namespace, groups: list[Group], opponent: Scores
) -> tuple[Any, dict[str, torch.Tensor]]:
    """TRL's own trainer and its own batch of our tokens. Its text pipeline is not timed, and is given one row."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparring.demo import make_tokenizer

    if arm == "trl-tuned":
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = 4096
    row = {"prompt": "1", "chosen": " 2", "rejected": " 3"}
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        per_device_train_batch_size=1,
        precompute_ref_log_probs=arm != "trl",
        dataloader_pin_memory=False,
    )
    reference = make_model(arguments.model, arguments.vocab) if arm == "trl" else None
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list([row]),
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


def child(arguments: argparse.Namespace) -> None:
    """One arm once: a step to warm up, whose loss and gradient are compared, then timed steps."""
    torch.set_num_threads(1)
    groups = make_groups(arguments.profile, arguments.vocab, arguments.groups, roles_of(arguments))
    model, step = make_step(arguments.child, arguments, groups)
    before = resident_mib()
    loss = step()
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # before the comparison, which needs more
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    error = None
    if arguments.child == "plain":
        save_file({"loss": loss.detach(), "gradient": gradient}, arguments.expected)
    elif arguments.child == "trl":  # its reference is the policy, so that its loss is another, and known
        if abs(float(loss) - math.log(2)) > 1e-4:
            raise SystemExit(f"trl computes something else: loss {loss}, not log 2")
    else:
        expected = load_file(arguments.expected)
        error = float((gradient - expected["gradient"]).norm() / expected["gradient"].norm())
        if arguments.dtype == "float32" and (error > 1e-4 or abs(float(loss - expected["loss"])) > 1e-4):
            raise SystemExit(f"{arguments.child} computes something else: loss {loss}, gradient off by {error}")
    del gradient
    seconds = []
    for _ in range(arguments.steps):
        model.zero_grad()
        start = time.process_time()
        step().backward()
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": min(seconds), "mib": peak - before, "gradient_error": error}))


def roles_of(arguments: argparse.Namespace) -> dict[str, int]:
    return {"real": 1, "generated": arguments.samples} | ({"proto": 1} if arguments.game == "triplet" else {})


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def least_flops(arguments: argparse.Namespace) -> tuple[float, int, int]:
    """FLOPs of one step that no way of computing it can avoid, its shared tokens, and the tokens rows would have.

    6 per body weight and shared token, 6 per head weight and response token, and attention over visible keys.
    """
    width, inner, layers, heads, kv_heads = MODELS[arguments.model]
    head_width = width // heads
    body = layers * (2 * width * width + 2 * width * kv_heads * head_width + 3 * width * inner)
    groups = make_groups(arguments.profile, arguments.vocab, arguments.groups, roles_of(arguments))
    shared = shared_row(groups)
    responses = int(shared.num_tokens.sum())
    visible = 0
    for prompt, *rest in shared.shared_prompts.sizes:  # type: ignore[union-attr]
        visible += prompt**2 // 2 + sum(r * prompt + r**2 // 2 for r in rest)
    flops = 6 * body * shared.computed_tokens + 6 * width * arguments.vocab * responses
    return flops + 12 * layers * width * visible, shared.computed_tokens, padded_rows(groups).computed_tokens


def matrix_peak(dtype: str) -> float:
    """FLOP/s of one core on square matrix products."""
    torch.set_num_threads(1)
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    best = 1e9
    for _ in range(8):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    arms = [a for a in (TRIPLET_ARMS if arguments.game == "triplet" else PAIR_ARMS) if has_trl() or "trl" not in a]
    if arguments.samples > 1:
        arms = [a for a in arms if "trl" not in a and a != "two-models"]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        keys = ("profile", "model", "vocab", "groups", "dtype", "game", "samples", "steps")
        settings = [f"--{key}={getattr(arguments, key)}" for key in keys]
        for _ in range(arguments.rounds):
            for arm in arms:
                command = [sys.executable, __file__, f"--child={arm}", f"--expected={folder}/expected", *settings]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(arguments.profile, arguments.game, arm, found[arm][-1], flush=True)
    flops, shared, padded = least_flops(arguments)
    peak = matrix_peak(arguments.dtype)
    ours = statistics.median(x["seconds"] for x in found["shared"])
    return {
        **{key: getattr(arguments, key) for key in keys},
        "rounds": arguments.rounds,
        "tokens_of_rows": padded,
        "tokens_shared": shared,
        "least_gflops": round(flops / 1e9, 1),
        "matrix_peak_gflops_per_second": round(peak / 1e9, 1),
        "arms": {arm: summary(values, ours, flops / peak, padded) for arm, values in found.items()},
    }


def summary(values: list[dict[str, float]], ours: float, floor: float, tokens: int) -> dict[str, Any]:
    seconds = [x["seconds"] for x in values]
    median = statistics.median(seconds)
    return {
        "seconds": {"median": round(median, 3), "min": round(min(seconds), 3), "max": round(max(seconds), 3)},
        "times_ours": round(median / ours, 2),
        "row_tokens_per_second": round(tokens / median),
        "share_of_matrix_peak": round(floor / median, 3),
        "mib_over_weights": round(statistics.median(x["mib"] for x in values)),
        "gradient_error": max((x["gradient_error"] for x in values), default=None, key=lambda e: e or 0.0),
    }


def has_trl() -> bool:
    try:
        version("trl")
    except PackageNotFoundError:
        return False
    return True


def machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--model", choices=MODELS, default="30m")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--groups", type=int, default=4, help="prompts in the step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--game", choices=("pair", "triplet"), action="append")
    parser.add_argument("--samples", type=int, default=1, help="generated answers per prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process; the fastest counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--expected", type=Path)
    arguments = parser.parse_args()
    profiles, games = arguments.profile or list(PROFILES), arguments.game or ["pair", "triplet"]
    if arguments.child:
        arguments.profile, arguments.game = profiles[0], games[0]
        child(arguments)
        return
    results = []
    for arguments.profile in profiles:
        for arguments.game in games:
            results.append(measure(arguments))
    packages = ("sparring", "torch", "transformers", *(["trl"] if has_trl() else []))
    result = {"machine": machine(), "versions": {name: version(name) for name in packages}, "results": results}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
