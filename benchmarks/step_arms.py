"""The cases and arms of benchmarks/step.py. An arm is a policy and a function that returns the loss of one step."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparring.model.logprobs import Scorer, model_inputs, sequence_logprobs
from sparring.model.packing import pack, pack_padded
from sparring.objectives import Spin, Tspin
from sparring.types import Group, Scores

PROFILES = {  # mean tokens of (prompt, response); each length varies by 25 %
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
    """One row of a table: what is computed, and by which arms."""

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
    """All cases, the most informative first."""
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
        for profile in ("256/64", "128/128", "64/192"):  # lengths of an earlier prototype
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
    packed = pack_padded(groups)
    column = torch.arange(packed.input_ids.shape[1])
    prompts = torch.tensor([len(g.prompt_ids) for g in groups for rs in g.responses.values() for _ in rs])
    is_response = (column >= prompts[:, None]) & packed.attention_mask.bool()
    logits = model(**model_inputs(packed), use_cache=False).logits
    return packed.by_role(sequence_logprobs(logits, packed.input_ids, is_response))


def make_step(arm: str, case: Case) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """Returns the policy and a function that returns the loss of one step."""
    groups = make_groups(case)
    if arm == "shared-pair":
        arm, case = "shared", replace(case, arms=PAIR)
        groups = [Group(g.id, g.prompt_ids, {r: g.responses[r] for r in ("real", "generated")}) for g in groups]
    objective = Tspin(alpha=0.1, beta=0.1) if case.is_triplet else Spin(lambda_=0.1)
    model = make_model(case.model, case.vocab)
    opponent: dict[Any, torch.Tensor] = {}
    if not case.is_triplet:  # near a random model's, so that no gradient vanishes
        nats = math.log(case.vocab)
        lengths = pack_padded(groups).lengths()
        opponent = {role: -nats * lengths[role].float() for role in ("real", "generated")}
    dtype = getattr(torch, case.dtype)

    def mean_loss(policy: Scores, lengths: Any) -> torch.Tensor:
        return objective(policy, opponent, lengths).per_example.mean()  # type: ignore[arg-type]

    if arm in ("plain", "two-models"):
        lengths = pack_padded(groups).lengths()
        frozen = make_model(case.model, case.vocab, seed=1) if arm == "two-models" else None

        def step() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if frozen is not None:
                    with torch.no_grad():
                        plain_scores(frozen, groups)  # only its cost; the loss stays that of the other arms
                return mean_loss(plain_scores(model, groups), lengths)

    elif arm in ("padded", "shared"):
        scorer = Scorer(model, dtype, arm)  # type: ignore[arg-type]

        def step() -> torch.Tensor:
            packed = pack(scorer.packing, groups)
            return mean_loss(packed.scores(scorer(packed)), packed.lengths())

    else:
        losses = (
            cpo_terms(model)(groups) if arm == "trl-cpo" else [(1.0, *make_trl(arm, model, case, groups, opponent))]
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


Terms = list[tuple[float, Any, dict[str, torch.Tensor]]]


def cpo_terms(model: PreTrainedModel) -> Callable[[list[Group]], Terms]:
    """T-SPIN's two terms, each as a batch of pairs: (weight, trainer, batch)."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from sparring.commands.demo import make_tokenizer

    settings = CPOConfig(output_dir=tempfile.mkdtemp(), beta=0.1, cpo_alpha=0.0, **QUIET)
    trainer = CPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([ROW]),
        processing_class=make_tokenizer([{"question": "1 2 3", "answer": "1 2 3"}]),
    )

    def batch(groups: list[Group], first: str, second: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, role in (("chosen", first), ("rejected", second)):
            rows = pack_padded([Group(g.id, g.prompt_ids, {"real": g.responses[role]}) for g in groups])  # type: ignore[index]
            prompts = torch.tensor([len(g.prompt_ids) for g in groups])
            hidden = (torch.arange(rows.input_ids.shape[1]) < prompts[:, None]) | (rows.attention_mask == 0)
            found |= {
                f"{name}_input_ids": rows.input_ids,
                f"{name}_attention_mask": rows.attention_mask,
                f"{name}_labels": rows.input_ids.masked_fill(hidden, -100),
            }
        return found

    return lambda groups: [
        (1.0, trainer, batch(groups, "real", "generated")),
        (0.1, trainer, batch(groups, "generated", "proto")),
    ]


def make_trl(
    arm: str, model: PreTrainedModel, case: Case, groups: list[Group], opponent: Scores
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns TRL's trainer and its batch of our tokens. Its text pipeline is not timed, and gets one row."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparring.commands.demo import make_tokenizer

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
