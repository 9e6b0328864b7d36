"""The games against Hugging Face TRL's trainers, which nobody here wrote: loss and gradients of a tiny Llama, float32.

TRL makes the batch and computes its loss with its own forward pass; ours reads the tokens back from that batch and
goes through the scorer, the layout and the objective. The objectives are the shipped ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from shortcuts import step_metrics
from torch import Tensor
from transformers import PreTrainedModel

from sparring.commands.demo import make_model, problems
from sparring.model.load import load_tokenizer
from sparring.model.logprobs import Scorer, score_candidates
from sparring.model.packing import pack
from sparring.objectives import Dft, Dpo, Sdft, Sft, Sipo, Space, Spin, Ssimpo, Tspin
from sparring.parallel import SingleProcess
from sparring.types import Group, Objective, Role, TokenIds, TrainingExample

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed; it is in the dev group of pyproject.toml")

from datasets import Dataset

Batch = Mapping[str, Tensor]
Pairs = list[tuple[TokenIds, TokenIds, TokenIds]]
"""(prompt, chosen, rejected) token ids of each row."""


@pytest.fixture
def texts() -> dict[str, list[str]]:
    """Prompts with answers of different lengths; other rows' answers stand for those of the models."""
    rows = problems(60, seed=1, largest=12)  # those of the fixture `tiny`, whose words its tokenizer knows
    answers = [row["answer"] for row in rows]
    return {
        "prompt": [row["question"] for row in rows[:5]],
        "real": answers[:5],
        "generated": [f"{answer} {rows[i]['question']}" for i, answer in enumerate(answers[5:10])],
        "proto": [f"{rows[i]['question']} {answer}" for i, answer in enumerate(answers[10:15])],
    }


@pytest.fixture
def models(tiny: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and opponent: two random Llamas, sharp enough to disagree."""
    tokenizer = load_tokenizer(tiny / "model")
    found = []
    for seed in (11, 12):
        model = make_model(tokenizer, width=32, layers=2, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        found.append(model)
    return found[0], found[1]


@pytest.fixture
def make_trainer(tiny: Path, tmp_path: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> Callable[..., Any]:
    """A DPO or a CPO trainer on pairs of texts, with evaluation-style settings and no dropout."""
    policy, opponent = models

    def make(kind: str, pairs: Mapping[str, list[str]], **settings: Any) -> Any:
        if kind == "dpo":
            from trl import DPOConfig as Config
            from trl import DPOTrainer as Trainer
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        arguments = Config(
            output_dir=str(tmp_path / "trl"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            per_device_train_batch_size=8,
            dataloader_pin_memory=False,
            max_length=120,
            disable_tqdm=True,
            **settings,
        )
        against = {"ref_model": opponent} if kind == "dpo" else {}
        return Trainer(
            model=policy,
            args=arguments,
            train_dataset=Dataset.from_dict(dict(pairs)),
            processing_class=load_tokenizer(tiny / "model"),
            **against,
        )

    return make


def theirs(trainer: Any) -> tuple[float, dict[str, Tensor], Pairs]:
    """TRL's loss and gradients of one batch, and the tokens of that batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), gradients(model), tokens_of(batch)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def tokens_of(batch: Batch) -> Pairs:
    """TRL's tensors as token ids, by its own masks."""
    if "completion_mask" in batch:
        half = len(batch["input_ids"]) // 2
        ids, real = batch["input_ids"].split(half), batch["attention_mask"].split(half)
        is_answer = [mask.bool() for mask in batch["completion_mask"].split(half)]
    else:
        sides = ("chosen", "rejected")
        ids = [batch[f"{side}_input_ids"] for side in sides]
        real = [batch[f"{side}_attention_mask"] for side in sides]
        is_answer = [batch[f"{side}_labels"] != -100 for side in sides]
    found = []
    for row in range(len(ids[0])):
        prompt = ids[0][row][real[0][row].bool() & ~is_answer[0][row]]
        answers = [ids[side][row][is_answer[side][row]] for side in (0, 1)]
        found.append(tuple(part.numpy().astype(np.int32) for part in (prompt, *answers)))
    return found


def ours(
    objective: Objective, groups: Sequence[Group], policy: PreTrainedModel, opponent: PreTrainedModel
) -> tuple[float, dict[str, Tensor]]:
    """The same through our scorer and objective."""
    scorer = Scorer(policy)
    layout = pack(scorer.packing, groups)
    with torch.no_grad():
        against = layout.scores(Scorer(opponent)(layout))
    policy.zero_grad()
    token_logprobs = scorer(layout)
    read = {**layout.scores(token_logprobs), **layout.token_scores(token_logprobs, objective.needs.per_token)}
    loss = objective(read, against, layout.lengths()).per_example.mean()
    loss.backward()
    return loss.item(), gradients(policy)


def pair_groups(pairs: Pairs, worse: Role = "generated") -> list[Group]:
    return [Group(str(i), p, {"real": (real,), worse: (drawn,)}) for i, (p, real, drawn) in enumerate(pairs)]


def assert_same(mine: tuple[float, dict[str, Tensor]], loss: float, gradient: Mapping[str, Tensor]) -> None:
    assert mine[0] == pytest.approx(loss, abs=1e-5, rel=1e-5)
    largest = max(part.abs().max().item() for part in gradient.values())
    assert largest > 1e-3  # there is something to compare
    for name, part in gradient.items():
        torch.testing.assert_close(
            mine[1][name], part, atol=1e-5 * max(1, largest), rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (Spin(lambda_=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
        (Spin(lambda_=1.0), {"loss_type": ["sigmoid"], "beta": 1.0}),
        (Spin(lambda_=0.1, loss="hinge"), {"loss_type": ["hinge"], "beta": 0.1}),
        (Space(mu=1.0), {"loss_type": ["bco_pair"], "beta": 1.0}),
        (Dpo(beta=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
        (Sipo(tau=0.3, average_logprobs=True), {"loss_type": ["ipo"], "beta": 0.3}),  # TRL's is a mean over tokens
    ],
    ids=repr,
)
def test_against_dpo_trainer(
    objective: Objective,
    settings: dict[str, Any],
    texts: dict[str, list[str]],
    models: tuple[PreTrainedModel, PreTrainedModel],
    make_trainer: Callable[..., Any],
) -> None:
    pairs = {"prompt": texts["prompt"], "chosen": texts["real"], "rejected": texts["generated"]}
    trainer = make_trainer("dpo", pairs, **settings)
    # twice: until 2026-02 TRL's bco_pair subtracted a running mean of rewards, which the second batch would show
    theirs(trainer)
    loss, gradient, tokens = theirs(trainer)
    worse: Role = "rejected" if isinstance(objective, Dpo) else "generated"
    assert_same(ours(objective, pair_groups(tokens, worse), *models), loss, gradient)


@pytest.mark.parametrize(("objective", "loss_type"), [(Sft(), "nll"), (Dft(), "dft")])
def test_against_sft_trainer(
    objective: Objective,
    loss_type: str,
    texts: dict[str, list[str]],
    models: tuple[PreTrainedModel, PreTrainedModel],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """Row by row: TRL averages over the tokens of a batch, and we over the examples."""
    from trl import SFTConfig, SFTTrainer

    rows = {"prompt": texts["prompt"], "completion": texts["real"]}
    settings = {"output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
    trainer = SFTTrainer(
        model=models[0],
        args=SFTConfig(
            **settings,
            loss_type=loss_type,
            gradient_checkpointing=False,
            per_device_train_batch_size=1,
            dataloader_pin_memory=False,
            completion_only_loss=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=load_tokenizer(tiny / "model"),
    )
    for batch in trainer.get_train_dataloader():
        models[0].zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradient = gradients(models[0])
        ids = batch["input_ids"][0].numpy().astype(np.int32)
        is_answer = batch["labels"][0].numpy() != -100
        group = Group("0", ids[~is_answer], {"real": (ids[is_answer],)})
        assert_same(ours(objective, [group], *models), loss.item(), gradient)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_against_sdft_s_losses(
    kl: Literal["forward", "reverse"], models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """TRL's functions on full logits of one response, the teacher's prompt another one; value and gradient."""
    from trl.experimental.sdft import loss_utils

    policy, teacher = models
    prompt, shown, response = (np.arange(*ends, dtype=np.int32) % 20 + 4 for ends in ((0, 5), (3, 15), (7, 14)))

    def logits(model: PreTrainedModel, before: TokenIds) -> Tensor:
        ids = torch.from_numpy(np.concatenate([before, response])).long()
        return model(ids[None]).logits[0, len(before) - 1 : -1]

    candidates, against = score_candidates(
        Scorer(teacher), [Group("0", shown, {"generated": (response,)})], 5, 100, SingleProcess()
    )
    group = Group("0", prompt, {"generated": (response,)}, {"generated": (candidates[0, 0],)})
    example = TrainingExample(group, {"generated": against[0]})
    policy.zero_grad()
    found = step_metrics(Scorer(policy), Sdft(kl=kl, top_k=5), [example], 100)["loss"]
    mine = found, gradients(policy)

    policy.zero_grad()
    ours, theirs = logits(policy, prompt), logits(teacher, shown).detach()
    if kl == "forward":
        top = theirs.topk(5).indices
        assert top.tolist() == candidates[0, 0].tolist()
        with_tail = [loss_utils.add_tail_bucket(each.log_softmax(-1).gather(-1, top)) for each in (ours, theirs)]
        tokens = loss_utils.compute_divergence(*with_tail, alpha=0.0)
    else:
        ids = torch.from_numpy(response).long()
        tokens = loss_utils.compute_sampled_token_self_distillation_loss(ours, theirs, ids, distillation_alpha=1.0)
    tokens.mean().backward()
    assert_same(mine, tokens.mean().item(), gradients(policy))


def test_s_simpo_is_cpo_simpo(
    texts: dict[str, list[str]], models: tuple[PreTrainedModel, PreTrainedModel], make_trainer: Callable[..., Any]
) -> None:
    pairs = {"prompt": texts["prompt"], "chosen": texts["real"], "rejected": texts["generated"]}
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0, "alpha": 0.0}
    loss, gradient, tokens = theirs(make_trainer("cpo", pairs, **settings))
    assert_same(ours(Ssimpo(beta=2.0, gamma=0.7), pair_groups(tokens), *models), loss, gradient)


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_tspin_is_two_cpo_terms(
    alpha: float,
    texts: dict[str, list[str]],
    models: tuple[PreTrainedModel, PreTrainedModel],
    make_trainer: Callable[..., Any],
) -> None:
    beta = 0.1
    settings = {"loss_type": "sigmoid", "beta": alpha, "cpo_alpha": 0.0, "label_smoothing": 0.0, "alpha": 0.0}
    terms, rows = [], []
    for better, worse in (("real", "generated"), ("generated", "proto")):
        pairs = {"prompt": texts["prompt"], "chosen": texts[better], "rejected": texts[worse]}
        trainer = make_trainer("cpo", pairs, seed=3, **settings)
        loss, gradient, tokens = theirs(trainer)
        terms.append((loss, gradient))
        rows.append(sorted(tokens, key=lambda row: row[0].tolist()))
    groups = []
    for (prompt, real, generated), (same_prompt, same_generated, proto) in zip(*rows, strict=True):
        assert prompt.tolist() == same_prompt.tolist() and generated.tolist() == same_generated.tolist()
        groups.append(Group(str(len(groups)), prompt, {"real": (real,), "generated": (generated,), "proto": (proto,)}))
    (current, current_gradient), (history, history_gradient) = terms
    gradient = {name: part + beta * history_gradient[name] for name, part in current_gradient.items()}
    mine = ours(Tspin(alpha=alpha, beta=beta), groups, *models)
    assert_same(mine, current + beta * history, gradient)
