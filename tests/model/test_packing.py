"""Micro-batches, padded rows, and shared rows: the same log-probs and gradients from fewer tokens."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sparring.model import attention
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import (
    group_tokens,
    micro_batches,
    pack,
    pack_padded,
    pack_shared,
    responses_of,
    row_tokens,
)
from sparring.types import Group

VOCAB = 61


def group(name: str, prompt: int, real: int, generated: list[int]) -> Group:
    """Of so many tokens; all different, so that no response equals another."""
    count = iter(range(1000))

    def ids(size: int) -> np.ndarray:
        return np.array([next(count) % VOCAB for _ in range(size)], dtype=np.int32)

    return Group(name, ids(prompt), {"real": (ids(real),), "generated": tuple(ids(n) for n in generated)})


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40)


@given(sizes=sizes, budget=st.integers(1, 500))
def test_padded_micro_batches_are_a_partition_within_budget(sizes: list[tuple[int, int, int]], budget: int) -> None:
    groups = [group(str(i), p, r, [g]) for i, (p, r, g) in enumerate(sizes)]
    batches = micro_batches("padded", groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:
        rows = sum(len(responses_of(groups[i])) for i in batch)
        width = max(row_tokens(groups[i]) for i in batch)
        assert rows * width <= budget or len(batch) == 1
    widths = [row_tokens(groups[i]) for batch in batches for i in batch]
    assert widths == sorted(widths, reverse=True), "the longest come first"


@given(sizes=sizes, budget=st.integers(1, 500))
def test_shared_micro_batches_are_a_partition_within_budget(sizes: list[tuple[int, int, int]], budget: int) -> None:
    groups = [group(str(i), p, r, [g]) for i, (p, r, g) in enumerate(sizes)]
    batches = micro_batches("shared", groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    filled = [sum(group_tokens("shared", groups[i]) for i in batch) for batch in batches]
    assert all(tokens <= budget or len(batch) == 1 for tokens, batch in zip(filled, batches, strict=True))
    assert filled == sorted(filled, reverse=True), "the largest comes first"
    # best fit: no two micro-batches could have been one
    assert all(a + b > budget for i, a in enumerate(filled) for b in filled[:i])


@given(sizes=sizes, budget=st.integers(1, 500), packing=st.sampled_from(["shared", "padded"]))
def test_groups_of_other_sizes_are_not_mixed(
    sizes: list[tuple[int, int, int]], budget: int, packing: Literal["shared", "padded"]
) -> None:
    """Iterations may differ in the number of samples, and SPIN trains on those of two."""
    groups = [group(str(i), p, r, [g] * (1 + g % 3)) for i, (p, r, g) in enumerate(sizes)]
    batches = micro_batches(packing, groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:
        pack(packing, [groups[i] for i in batch])  # raises if they differ


@given(sizes=sizes)
def test_padded_rows_hold_every_token_once_per_response(sizes: list[tuple[int, int, int]]) -> None:
    groups = [group(str(i), p, r, [g, r + 1]) for i, (p, r, g) in enumerate(sizes)]
    layout = pack_padded(groups)
    assert layout.computed_tokens == sum(3 * p + 2 * r + 1 + g for p, r, g in sizes)
    assert layout.num_tokens.tolist() == [n for _, r, g in sizes for n in (r, g, r + 1)]
    assert len(layout.targets) == int(layout.num_tokens.sum())


@given(sizes=sizes)
def test_a_shared_row_holds_every_prompt_once(sizes: list[tuple[int, int, int]]) -> None:
    groups = [group(str(i), p, r, [g, r + 1]) for i, (p, r, g) in enumerate(sizes)]
    layout = pack_shared(groups)
    assert layout.computed_tokens == sum(p + 2 * r + 1 + g for p, r, g in sizes)
    assert layout.input_ids.shape == (1, layout.computed_tokens), "one row, no padding"
    assert layout.num_tokens.tolist() == pack_padded(groups).num_tokens.tolist()
    assert layout.targets.tolist() == pack_padded(groups).targets.tolist()


def test_a_shared_row_by_hand() -> None:
    ids = [np.array(x, dtype=np.int32) for x in ([5, 6], [7, 8, 9], [7], [3], [4, 4], [2])]
    groups = [
        Group("a", ids[0], {"real": (ids[1],), "generated": (ids[2],)}),
        Group("b", ids[3], {"real": (ids[4],), "generated": (ids[5],)}),
    ]
    layout = pack_shared(groups)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 7, 3, 4, 4, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 1]], "a response starts where its prompt ends"
    assert layout.targets.tolist() == [7, 8, 9, 7, 4, 4, 2]
    assert layout.positions.tolist() == [1, 2, 3, 1, 6, 7, 6], "the prompt's last state predicts each first token"
    assert layout.distinct_lengths == (3, 1, 2, 1)


def test_equal_answers_are_computed_once() -> None:
    answer, other, prompt = (np.array(x, dtype=np.int32) for x in ([7, 8], [7, 9, 9], [5, 6]))
    groups = [Group("a", prompt, {"real": (answer,), "generated": (other, answer.copy()), "proto": (answer,)})]
    layout = pack_shared(groups)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 7, 9, 9]]
    assert layout.response_index.tolist() == [0, 1, 0, 0]
    assert layout.num_tokens.tolist() == [2, 3, 2, 2]
    assert group_tokens("shared", groups[0]) == 7


def test_values_go_back_to_their_roles() -> None:
    groups = [group("a", 2, 3, [1, 4]), group("b", 1, 1, [2, 2])]
    batch = pack_padded(groups)
    lengths = batch.distinct_lengths
    token_logprobs = torch.cat([torch.full((n,), float(i)) for i, n in enumerate(lengths)])
    expected = batch.by_role(torch.arange(6.0))
    assert expected["real"].tolist() == [0, 3] and expected["generated"].tolist() == [[1, 2], [4, 5]]
    for role, sums in batch.scores(token_logprobs).items():
        torch.testing.assert_close(sums, expected[role] * batch.lengths()[role])
        by_token = batch.token_scores(token_logprobs, ["real", "generated"])[role]
        assert by_token.shape == (*sums.shape, max(lengths))
        torch.testing.assert_close(by_token.sum(dim=-1), sums)


def test_tokens_of_equal_responses_are_those_of_the_one_that_was_computed() -> None:
    prompt, same, other = (np.array(ids, dtype=np.int32) for ids in ([1, 2], [3, 4], [5]))
    batch = pack_shared([Group("a", prompt, {"real": (same,), "generated": (other, same)})])
    token_logprobs = torch.tensor([-1.0, -2.0, -3.0])
    by_token = batch.token_scores(token_logprobs, ["real", "generated"])
    assert by_token["real"].tolist() == [[-1.0, -2.0]]
    assert by_token["generated"].tolist() == [[[-3.0, 0.0], [-1.0, -2.0]]]
    assert batch.token_scores(token_logprobs, []) == {}


@pytest.mark.parametrize("rows", [pack_padded, pack_shared])
def test_groups_of_other_shapes_are_an_error(rows: object) -> None:
    with pytest.raises(ValueError, match="other roles or numbers of responses"):
        rows([group("a", 2, 3, [1]), group("b", 1, 1, [2, 2])])  # type: ignore[operator]


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral, window": transformers.MistralConfig(**GROUPED, sliding_window=6),
    "gemma3, windows": transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": transformers.PhiConfig(**SMALL, intermediate_size=48),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48, eos_token_id=1, bos_token_id=2),
    "olmo2": transformers.Olmo2Config(**GROUPED),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1),
}


@cache
def twins(family: str) -> tuple[Scorer, Scorer]:
    """The same weights behind a shared and a padded scorer."""
    pair = []
    for packing in ("shared", "padded"):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
        pair.append(Scorer(model, packing=packing))
    return pair[0], pair[1]


tokens = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=14)


def values_and_gradients(scorer: Scorer, groups: list[Group], batches: list[list[int]]) -> list[torch.Tensor]:
    scorer.zero_grad()
    values: list[torch.Tensor] = [torch.empty(0)] * len(groups)
    for batch in batches:
        logprobs = scorer.logprobs(pack(scorer.packing, [groups[i] for i in batch])).reshape(len(batch), -1)
        (logprobs * torch.tensor([1.0, -0.5, 0.25, -2.0])[: logprobs.shape[1]]).sum().backward()
        for i, row in zip(batch, logprobs.detach(), strict=True):
            values[i] = row
    gradient = torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])
    return [torch.stack(values), gradient / gradient.norm()]


@pytest.mark.parametrize("family", FAMILIES)
@given(drawn=st.lists(st.tuples(tokens, tokens, tokens, tokens), min_size=1, max_size=5), budget=st.integers(20, 200))
@settings(max_examples=8)
def test_shared_rows_equal_padded_rows(family: str, drawn: list[tuple[list[int], ...]], budget: int) -> None:
    """Log-probs and gradients, over random groups and packings."""
    shared, padded = twins(family)
    assert shared.packing == "shared", shared.why_padded
    groups = []
    for ids in drawn:
        prompt, real, first, second = (np.array(x, dtype=np.int32) for x in ids)
        groups.append(Group("a", prompt, {"real": (real,), "generated": (first, second), "proto": (first,)}))
    ours = values_and_gradients(shared, groups, micro_batches("shared", groups, budget))
    twin = values_and_gradients(padded, groups, [[i] for i in range(len(groups))])
    for one, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_long_responses_are_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a sliding window."""
    monkeypatch.setattr(attention, "QUERIES", 4)
    for family in ("llama", "mistral, window"):
        groups = [group("a", 5, 17, [3, 9]), group("b", 2, 4, [11, 1])]
        shared, padded = twins(family)
        ours, twin = (values_and_gradients(scorer, groups, [[0, 1]]) for scorer in (shared, padded))
        for one, other in zip(ours, twin, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_recomputes_the_shared_row() -> None:
    groups = [group("a", 5, 7, [3, 4]), group("b", 2, 3, [9, 1])]
    layout = pack_shared(groups)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        scorer = Scorer(model)
        assert scorer.packing == "shared"
        scorer(layout).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


RULED_OUT = {
    "caps": transformers.Gemma2Config(**GROUPED, head_dim=8),
    "conv": transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("reason", RULED_OUT)
def test_what_cannot_share_a_prompt_gets_padded_rows_and_says_why(reason: str) -> None:
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(RULED_OUT[reason])
    scorer = Scorer(model.eval())
    assert scorer.packing == "padded"
    assert scorer.why_padded is not None and reason in scorer.why_padded


def test_a_model_that_ignores_shared_prompts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules can miss a model; the comparison at loading does not."""
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *_, shared_prompts=None, **rest: inner(**rest))
    before = model.config._attn_implementation
    scorer = Scorer(model)
    assert scorer.packing == "padded"
    assert scorer.why_padded is not None and "differ" in scorer.why_padded
    assert model.config._attn_implementation == before


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 add up in another order for several rows than for one, as in models of real width; and
    logits so large that this moves log-probs of a few tokens by more than 0.1 nats."""
    linear = F.linear

    def rounded(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if states.dtype != torch.bfloat16 or states.dim() != 3 or len(states) == 1:
            return linear(states, weight, bias)
        half = states.shape[-1] // 2
        return linear(states[..., :half], weight[:, :half], bias) + linear(states[..., half:], weight[:, half:])

    monkeypatch.setattr(F, "linear", rounded)


def bfloat16_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.bfloat16).eval()
    model.get_output_embeddings().weight.data.mul_(100)
    return model


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("family", ["llama", "mistral, window", "gpt-neox"])
def test_the_rounding_of_bfloat16_costs_no_shared_prompts(family: str) -> None:
    """Comparisons at loading are in float32, whatever the weights are in; these stay as they are."""
    model = bfloat16_model(family)
    scorer = Scorer(model, torch.bfloat16)
    assert scorer.packing == "shared", scorer.why_padded
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("rounding")
def test_in_bfloat16_too_a_model_that_ignores_shared_prompts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bfloat16_model("llama")
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *_, shared_prompts=None, **rest: inner(**rest))
    scorer = Scorer(model, torch.bfloat16)
    assert scorer.packing == "padded"
    assert scorer.why_padded is not None and "differ" in scorer.why_padded


def test_a_real_model_in_bfloat16_shares_prompts() -> None:
    """SmolLM2-135M, where it lies: in bfloat16 alone, a row beside a longer one seems to differ by 0.1 nats."""
    folder = Path(os.environ.get("SPARRING_SMOLLM2", "/nowhere"))
    if not folder.is_dir():
        pytest.skip("set SPARRING_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert Scorer(model, torch.bfloat16).packing == "shared"


def test_the_model_still_works_as_before(tmp_path: object) -> None:
    """Sparring's attention is torch's for everybody else: plain forward with padding, and generation."""
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(FAMILIES["mistral, window"]).eval()
    ids = torch.randint(3, VOCAB, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    before = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_length=20)
    assert Scorer(model).packing == "shared"
    after = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_length=20)
    torch.testing.assert_close(after[0][:, 5:], before[0][:, 5:])
    assert after[1].tolist() == before[1].tolist()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa", "nothing of ours is saved with the model"
