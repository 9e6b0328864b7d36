"""FlexAttention on shared rows: its mask, its choice on a device, and its values on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import group, twins
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from sparring.model import attention, flex
from sparring.model.logprobs import Scorer
from sparring.model.packing import pack_padded, pack_shared

CPU = torch.device("cpu")
Sizes = tuple[tuple[int, ...], ...]


def mask_from_definition(sizes: Sizes, window: int) -> BlockMask:
    """The readable twin: same group, own response or the prompt, not later, not beyond the window."""
    rows = [
        (number, response, place)
        for number, (prompt, *rest) in enumerate(sizes)
        for response, (before, size) in enumerate([(0, prompt), *((prompt, size) for size in rest)])
        for place in range(before, before + size)
    ]
    owner, response, place = torch.tensor(rows).unbind(1)

    def visible(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (
            (owner[q] == owner[k])
            & ((response[k] == 0) | (response[q] == response[k]))
            & (place[k] <= place[q])
            & (place[q] - place[k] < window)
        )

    return create_block_mask(visible, None, None, len(rows), len(rows), device="cpu")


def dense(mask: BlockMask) -> Tensor:
    places = torch.arange(mask.seq_lengths[0])
    return mask.mask_mod(places[:1], places[:1], places[:, None], places[None])


SHORT, LONG = st.integers(1, 9), st.integers(1, 300)


@given(
    sizes=st.lists(
        st.lists(SHORT, min_size=2, max_size=4) | st.lists(LONG, min_size=2, max_size=4), min_size=1, max_size=5
    ),
    window=st.sampled_from([1, 2, 5, 100, 128, 200, 10**6]),
)
@settings(max_examples=25, deadline=None)
def test_the_mask_from_sizes_is_create_block_mask_s(sizes: list[list[int]], window: int) -> None:
    packed = tuple(map(tuple, sizes))
    found, expected = flex.block_mask(packed, window, CPU), mask_from_definition(packed, window)
    assert torch.equal(dense(found), dense(expected))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.bytes = max(
            [self.bytes, *(x.nbytes for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, Tensor))]
        )
        return made


def test_the_mask_of_64_thousand_tokens_takes_two_megabytes() -> None:
    """`create_block_mask` would make 43 GB on the way."""
    with Largest() as largest:
        mask = flex.block_mask(((150, 250, 250),) * 100, 65_000, CPU)
    assert mask.seq_lengths == (65_000, 65_000)
    assert largest.bytes < 2.2e6, "8 bytes for each pair of blocks"


def dense_attention(too_much: Callable[[dict[str, Any]], bool], asked: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """FlexAttention as a GPU computes it, with a limit to the options that it can compile."""

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, **rest: Any) -> Tensor:
        asked.append(rest["kernel_options"])
        if too_much(rest["kernel_options"]):
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376\nmore")
        return F.scaled_dot_product_attention(q, k, v, dense(block_mask), scale=scale, enable_gqa=True)

    return attend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Makes the CPU one that has FlexAttention; returns the options that are asked for."""

    def become(too_much: Callable[[dict[str, Any]], bool] = lambda options: False) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []
        monkeypatch.setattr(flex, "is_compiled", lambda device: True)
        monkeypatch.setattr(flex, "compiled", lambda device: dense_attention(too_much, asked))
        attention.flex_options.cache_clear()
        return asked

    yield become
    attention.flex_options.cache_clear()


SHAPE = (4, 2, 16, 16, 0.25, torch.bfloat16, CPU)


def test_smaller_blocks_where_shared_memory_is_short(
    gpu: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = gpu(lambda options: "num_stages" not in options)
    own, small = flex.kernel_options(16, torch.bfloat16)
    assert attention.flex_options(*SHAPE) == small
    assert asked == [own, small]
    assert attention.flex_options(*SHAPE) == small and len(asked) == 2, "tried once"
    assert capfd.readouterr().err == ""


def test_the_reason_is_logged_where_it_is_off(gpu: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    gpu(lambda options: True)
    assert attention.flex_options(*SHAPE) is None
    said = " ".join(capfd.readouterr().err.split())
    assert "FlexAttention is off for 4 heads of 16 in bfloat16: out of resource: shared memory" in said
    assert "Hardware limit: 101376. Attention runs in pieces" in said, "the first line of the error only"


def test_wrong_values_turn_it_off(
    gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu()
    monkeypatch.setattr(
        attention.SharedPrompts, "block_mask", lambda self, window, device: flex.block_mask(((800,),), 800, CPU)
    )
    assert attention.flex_options(*SHAPE) is None
    assert "differs from plain attention" in " ".join(capfd.readouterr().err.split())


def test_it_is_chosen_where_it_trains(gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the model is loaded: FSDP2 loads on the CPU and shards onto GPUs. In the dtype that trains, and without
    a trace in the gradient-checkpointed pass that asks first. The pieces are not used then."""
    model = twins("llama")[0].model
    tried: list[tuple[Any, ...]] = []
    probe = attention._probe
    monkeypatch.setattr(attention, "_probe", lambda *of: tried.append(of) or probe(*of))
    scorer = Scorer(model, torch.bfloat16)
    assert scorer.packing == "shared"
    gpu()
    assert not tried
    row = pack_shared([group("a", 5, 41, [3, 50]), group("b", 2, 4, [11, 1])])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        scorer(row).sum().backward()
        assert [(of[:2], of[5]) for of in tried] == [((4, 2), torch.bfloat16)]
        monkeypatch.setattr(attention, "by_pieces", None)
        scorer(row).sum().backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma3, windows"])
def test_flex_attention_sees_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, on a CPU. Its forward pass alone: there is no backward pass here."""
    shared, padded = twins(family)
    groups = [group("a", 5, 41, [3, 50]), group("b", 2, 4, [11, 1]), group("c", 37, 1, [36, 8])]
    monkeypatch.setattr(attention, "flex_options", lambda *of: flex.kernel_options(8, torch.float32)[0])
    monkeypatch.setattr(attention, "by_pieces", None)
    with torch.no_grad():
        torch.testing.assert_close(shared(pack_shared(groups)), padded(pack_padded(groups)), atol=1e-4, rtol=1e-5)


def test_rows_of_any_length_and_window_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from row to row is in tensors, so that training never waits for a compiler after its first rows."""
    graphs: list[Any] = []

    def count(graph: nn.Module, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=count)
    for sizes, window in ((attention.PROBE, 800), (((700, 10), (5, 7)), 722), (((700, 10), (5, 7)), 16)):
        time = sum(map(sum, sizes))
        q, k = torch.randn(1, 4, time, 16), torch.randn(1, 2, time, 16)
        mask = flex.block_mask(sizes, window, CPU)
        call(q, k, k, block_mask=mask, scale=0.25, enable_gqa=True, kernel_options={"BACKEND": "TRITON"})
    torch._dynamo.reset()
    assert len(graphs) == 1
