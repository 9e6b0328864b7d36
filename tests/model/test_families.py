"""The loop's core on tiny random models of the families that people use: render, generate, score, start, one step.

Each of them does something of its own between token ids and log-probs; what the scorer does not know it must refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from shortcuts import step_metrics
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparring.commands.demo import END, PAD, SPECIAL, make_tokenizer, problems
from sparring.data.render import Renderer
from sparring.errors import UserError
from sparring.model.load import load_model, load_tokenizer, save_model
from sparring.model.logprobs import Scorer, score_groups, sequence_logprobs
from sparring.model.lora import train_adapter
from sparring.objectives import Spin
from sparring.parallel import SingleProcess
from sparring.stages.generate.hf import HfBackend
from sparring.stages.train.step import check_policy_equals_opponent
from sparring.types import Example, Group, Message, Prompt, Role, TrainingExample

CPU = torch.device("cpu")


def training_examples(groups: Sequence[Group], scores: Mapping[Role, np.ndarray]) -> list[TrainingExample]:
    return [
        TrainingExample(group, {role: scores[role][place] for role in ("real", "generated")})
        for place, group in enumerate(groups)
    ]


@dataclass(frozen=True)
class Family:
    model_type: str
    settings: dict[str, object] = field(default_factory=dict)
    is_tied: bool = False
    has_pad: bool = True


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = {
    "llama": Family("llama", GROUPED),
    "llama, tied, biases": Family("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, is_tied=True),
    "llama, no pad token": Family("llama", {**GROUPED, "pad_token_id": None}, has_pad=False),
    "qwen2": Family("qwen2", GROUPED, is_tied=True),
    "qwen3": Family("qwen3", {**GROUPED, "head_dim": 16}, is_tied=True),
    "mistral, sliding window": Family("mistral", {**GROUPED, "sliding_window": 4}),
    "gemma2, soft caps": Family(
        "gemma2",
        {**GROUPED, "head_dim": 16, "sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
        is_tied=True,
    ),
    "gemma3": Family("gemma3_text", {**GROUPED, "head_dim": 16, "sliding_window": 4}, is_tied=True),
    "phi, head with bias": Family("phi", SMALL),
    "phi3": Family("phi3", {**GROUPED, "pad_token_id": 0}),
    "gpt-neox": Family("gpt_neox", SMALL),
    "gpt2": Family("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}, is_tied=True),
    "olmo2": Family("olmo2", GROUPED),
    "cohere, scaled logits": Family("cohere", {**GROUPED, "logit_scale": 0.25}, is_tied=True),
    "granite, scaled logits": Family("granite", {**GROUPED, "logits_scaling": 4.0}),
    "mixtral": Family("mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": Family("qwen3_moe", {**GROUPED, **EXPERTS, "head_dim": 16}),
    "mamba": Family("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, is_tied=True),
    "qwen3-next, linear attention": Family(
        "qwen3_next",
        {
            **GROUPED,
            **EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES[request.param]
    tokenizer = make_tokenizer(problems(40, seed=1, largest=9))
    if not family.has_pad:
        tokenizer.pad_token = None
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=len(tokenizer),
        tie_word_embeddings=family.is_tied,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        **{"pad_token_id": SPECIAL.index(PAD), **family.settings},
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("family") / "model"
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, path)
    return path


def groups_of(folder: Path, model: PreTrainedModel) -> list[Group]:
    """Rows of different lengths, rendered and answered by the model."""
    tokenizer = load_tokenizer(folder)
    render = Renderer(tokenizer, template=None, end_token=None, max_length=64, max_response=16)
    rows = []
    for number, row in enumerate(problems(6, seed=2, largest=9), start=1):
        turns = (Message(role="user", content=row["question"]), Message(role="assistant", content=row["answer"]))
        rows.append(render(Example(str(number), number, turns)))
    prompts = [Prompt(r.id, 0, r.prompt_ids, 8 + r.row, seed=r.row) for r in rows]
    answers = list(HfBackend(model, end_ids=[render.end.id], batch_size=4).generate(prompts))
    assert [a.id for a in answers] == [r.id for r in rows]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert 1 <= len(answer.token_ids) <= prompt.max_new_tokens
        assert (answer.finish == "stop") == (answer.token_ids[-1] == render.end.id)
    return [
        Group(r.id, r.prompt_ids, {"real": (r.real_ids,), "generated": (a.token_ids,)})
        for r, a in zip(rows, answers, strict=True)
    ]


def test_the_core_of_the_loop(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32, device=CPU)
    scorer = Scorer(model)
    groups = groups_of(folder, model)
    scores = score_groups(scorer, groups, 256, SingleProcess())

    for index, group in enumerate(groups):  # against the model's own logits of one unpadded row
        for role in ("real", "generated"):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, *group.responses[role]]).astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            is_response = torch.arange(ids.shape[1])[None] >= len(group.prompt_ids)
            expected = sequence_logprobs(logits, ids, is_response).item()
            assert scores[role][index].item() == pytest.approx(expected, abs=2e-4), (role, index)

    examples = [
        TrainingExample(g, {"real": scores["real"][i], "generated": scores["generated"][i]})
        for i, g in enumerate(groups)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    metrics = step_metrics(scorer, Spin(), examples, 256)
    check_policy_equals_opponent(Spin(), metrics, "float32")
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-4)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("0" in name for name in moved), "the first layer learns"
    assert step_metrics(scorer, Spin(), examples, 256)["loss"] < metrics["loss"], "a step downhill"


def test_an_answer_does_not_depend_on_its_batch(folder: Path) -> None:
    """Prompts of other lengths beside it put padding before it, which no layer may see."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    lengths = (3, 9, 5, 12)
    prompts = [
        Prompt(str(n), 0, np.arange(4, 4 + length, dtype=np.int32) * (n + 3) % 30, 6, seed=n)
        for n, length in enumerate(lengths)
    ]
    together = [a.token_ids.tolist() for a in HfBackend(model, end_ids=[3], batch_size=4).generate(prompts)]
    alone = [a.token_ids.tolist() for a in HfBackend(model, end_ids=[3], batch_size=1).generate(prompts)]
    assert together == alone


def test_a_frozen_base_in_bfloat16_with_an_adapter(folder: Path) -> None:
    """The head is checked in bfloat16 too, a new adapter changes no log-prob, and its step goes downhill."""
    model = load_model(folder, dtype=torch.bfloat16, device=CPU)
    groups = groups_of(folder, model)
    scores = score_groups(Scorer(model, torch.bfloat16), groups, 256, SingleProcess())
    targets: object = "all-linear"
    if model.config.model_type == "mamba":  # peft refuses its out_proj, and so do we
        with pytest.raises(UserError, match="adapter: .*out_proj"):
            train_adapter(model, {"r": 4, "target_modules": targets}, seed=0)
        model, targets = load_model(folder, dtype=torch.bfloat16, device=CPU), ["in_proj", "x_proj"]
    train_adapter(model, {"r": 4, "target_modules": targets}, seed=0)
    scorer = Scorer(model.train(), torch.bfloat16)
    examples = [
        TrainingExample(g, {"real": scores["real"][i], "generated": scores["generated"][i]})
        for i, g in enumerate(groups)
    ]
    metrics = step_metrics(scorer, Spin(), examples, 256)
    check_policy_equals_opponent(Spin(), metrics, "bfloat16")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.optim.SGD(trained, lr=1.0).step()
    assert step_metrics(scorer, Spin(), examples, 256)["loss"] < metrics["loss"]
