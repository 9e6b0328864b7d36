"""The scorer against a plain transformers forward, and the ways in which log-probs usually go wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from sparring.errors import UserError
from sparring.model.kernels import chunked, linear_logprob
from sparring.model.logprobs import Scorer, score_groups, sequence_logprobs
from sparring.model.packing import pack_padded
from sparring.parallel import SingleProcess
from sparring.types import Group

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}

FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "llama, tied": transformers.LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "mistral, sliding window": transformers.MistralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=5
    ),
    "gemma2, soft caps": transformers.Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0
    ),
    "granite, scaled logits": transformers.GraniteConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, logits_scaling=4.0
    ),
    "cohere, scaled logits": transformers.CohereConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, logit_scale=0.25
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "phi, bias in the head": transformers.PhiConfig(**SMALL, intermediate_size=48),
    "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
}


def make(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # zero at first, which would hide a forgotten bias
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make(FAMILIES["llama"])


def make_groups(count: int = 5, samples: int = 2) -> list[Group]:
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return random.integers(1, VOCAB, random.integers(low, high)).astype(np.int32)

    return [
        Group(
            str(i),
            tokens(1, 9),
            {
                "real": (tokens(1, 12),),
                "generated": tuple(tokens(1, 12) for _ in range(samples)),
                "proto": (tokens(1, 6),),
            },
        )
        for i in range(count)
    ]


def plain(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> float:
    """One sequence, full logits, cross-entropy token by token: nothing of ours."""
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return -sum(
        F.cross_entropy(logits[at - 1], ids[0, at]).item() for at in range(len(prompt), len(prompt) + len(response))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_forward(family: str) -> None:
    model = make(FAMILIES[family])
    groups = make_groups()
    scores = score_groups(Scorer(model), groups, micro_batch_tokens=100, parallel=SingleProcess())
    for index, group in enumerate(groups):
        for role, responses in group.responses.items():
            for ours, response in zip(np.atleast_1d(scores[role][index]), responses, strict=True):
                assert ours == pytest.approx(plain(model, group.prompt_ids, response), abs=1e-5)


def test_hand_computed_shift() -> None:
    """Logits at position i predict token i + 1; scored against token i the answer would be another."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [1 / 3, 1 / 3, 1 / 3]]]))
    input_ids = torch.tensor([[0, 2, 1, 2]])
    is_response = torch.tensor([[False, False, True, True]])
    expected = math.log(0.7) + math.log(0.4)  # token 1 from position 1, token 2 from position 2
    assert sequence_logprobs(logits, input_ids, is_response).item() == pytest.approx(expected, abs=1e-6)


def test_layout_scores_each_response_token_from_the_position_before() -> None:
    group = Group("a", np.array([5, 6, 7], dtype=np.int32), {"real": (np.array([8, 9, 1], dtype=np.int32),)})
    layout = pack_padded([group])
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert layout.positions.tolist() == [2, 3, 4]
    assert layout.targets.tolist() == [8, 9, 1]


def test_prompt_tokens_are_context_but_not_scored(llama: PreTrainedModel) -> None:
    scorer = Scorer(llama)
    prompt, response = np.array([3, 4, 5], dtype=np.int32), np.array([6, 7], dtype=np.int32)
    other = np.array([9, 4, 5], dtype=np.int32)

    def score(prompt: np.ndarray) -> float:
        return score_groups(scorer, [Group("a", prompt, {"real": (response,)})], 100, SingleProcess())["real"][0]

    assert score(prompt) != pytest.approx(score(other), abs=1e-4)
    # all tokens minus the prompt's: the sum over the response alone
    whole = plain(llama, prompt[:1], np.concatenate([prompt[1:], response]))
    head = plain(llama, prompt[:1], prompt[1:])
    assert score(prompt) == pytest.approx(whole - head, abs=1e-5)


def test_the_end_token_is_scored_and_attended_to(llama: PreTrainedModel) -> None:
    """An end token inside or at the end of an answer counts like any other, whatever its id (here the pad's, 0)."""
    scorer = Scorer(llama)
    prompt = np.array([3, 4, 5], dtype=np.int32)
    for response in ([6, 7, 0], [6, 0, 7], [0]):
        ids = np.array(response, dtype=np.int32)
        longer = np.array([8] * 9, dtype=np.int32)  # so that the row is padded
        group = Group("a", prompt, {"real": (ids,), "generated": (longer,)})
        assert score_groups(scorer, [group], 100, SingleProcess())["real"][0] == pytest.approx(
            plain(llama, prompt, ids), abs=1e-5
        )


def test_sum_not_mean(llama: PreTrainedModel) -> None:
    prompt = np.array([3, 4], dtype=np.int32)
    response = np.array([6, 7, 8, 9], dtype=np.int32)
    scorer = Scorer(llama)
    parts = [
        score_groups(
            scorer,
            [Group("a", np.concatenate([prompt, response[:i]]), {"real": (response[i : i + 1],)})],
            99,
            SingleProcess(),
        )
        for i in range(4)
    ]
    whole = score_groups(scorer, [Group("a", prompt, {"real": (response,)})], 99, SingleProcess())
    assert whole["real"][0] == pytest.approx(sum(part["real"][0] for part in parts), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_micro_batches_do_not_change_scores(llama: PreTrainedModel, budget: int) -> None:
    groups = make_groups(7)
    scorer = Scorer(llama)
    alone = [score_groups(scorer, [group], 1, SingleProcess()) for group in groups]
    together = score_groups(scorer, groups, budget, SingleProcess())
    for role in ("real", "generated", "proto"):
        np.testing.assert_allclose(together[role], np.concatenate([one[role] for one in alone]), atol=1e-5)


def test_blocks_of_the_head_change_nothing(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pack_padded(make_groups())

    def gradients() -> list[torch.Tensor]:
        llama.zero_grad()
        values = Scorer(llama)(layout)
        (values * torch.arange(len(values))).sum().backward()
        return [values.detach(), *(p.grad.clone() for p in llama.parameters() if p.grad is not None)]

    whole = gradients()
    monkeypatch.setattr(chunked, "BLOCK", 4)
    monkeypatch.setattr(chunked, "KEPT", VOCAB * 9 * 4)
    for expected, found in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_logits_are_kept_where_memory_was_asked_for(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient checkpointing the head computes its logits again too; the gradient is the same."""
    layout = pack_padded(make_groups())
    kept: list[int] = []
    blocks = chunked._blocks

    def seen(tokens: int, first: int, block: int) -> list[int]:
        kept.append(first)
        return blocks(tokens, first, block)

    monkeypatch.setattr(chunked, "_blocks", seen)

    def gradient() -> torch.Tensor:
        llama.zero_grad()
        Scorer(llama)(layout).sum().backward()
        return torch.cat([p.grad.flatten() for p in llama.parameters() if p.grad is not None])

    expected = gradient()
    assert kept[-1] > 0
    llama.train().gradient_checkpointing_enable({"use_reentrant": False})
    try:
        torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-5)
        assert kept[-1] == 0
    finally:
        llama.eval().gradient_checkpointing_disable()


def test_an_unknown_head_is_refused() -> None:
    """A model that does something of its own to its logits is never scored wrong in silence."""
    model = make(FAMILIES["llama"])
    forward = model.forward

    def twisted(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = twisted  # type: ignore[method-assign]
    with pytest.raises(UserError, match="transforms its logits in an unsupported way"):
        Scorer(model)


def test_bfloat16_stays_near_float32(llama: PreTrainedModel) -> None:
    groups = make_groups(8)
    exact = score_groups(Scorer(llama), groups, 1000, SingleProcess())
    rounded = score_groups(Scorer(llama, torch.bfloat16), groups, 1000, SingleProcess())
    for role in ("real", "generated", "proto"):
        np.testing.assert_allclose(rounded[role], exact[role], atol=0.2)


def test_reference_kernel_against_float64() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 16), torch.randn(VOCAB, 16), torch.randn(VOCAB)
    targets = torch.randint(VOCAB, (7,))
    logits = 2.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) * 0.5 / 2.0)
    expected = logits.log_softmax(-1)[torch.arange(7), targets]
    found = linear_logprob(hidden, weight, bias, targets, scale=0.5, softcap=2.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
