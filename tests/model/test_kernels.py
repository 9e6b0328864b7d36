"""The kernels against their specification, torch's own fused loss, and finite differences."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparring.model.kernels import chunked, reference, rows


@pytest.fixture(params=["kept", "recomputed", "both"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens, whose logits the backward pass finds kept, computes again, or some of each."""
    monkeypatch.setattr(chunked, "BLOCK", 3)
    monkeypatch.setattr(rows, "STRIP", 200)
    monkeypatch.setattr(chunked, "KEPT", {"kept": 10**9, "recomputed": 0, "both": 4000}[request.param])


def make(tokens: int, width: int, vocab: int, dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + width * 100 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = [normal(tokens, width), normal(vocab, width)] + ([normal(vocab)] if bias else [])
    return inputs, torch.randint(vocab, (tokens,), generator=generator)


def gradients(values: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, len(values), dtype=values.dtype)
    return list(torch.autograd.grad((values * weights).sum(), inputs))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens, width, vocab", [(1, 1, 2), (7, 5, 61), (33, 16, 199), (5, 3, 1001)])
def test_value_and_gradient_in_float64(
    tokens: int, width: int, vocab: int, bias: bool, scale: float, softcap: float | None
) -> None:
    inputs, targets = make(tokens, width, vocab, torch.float64, bias)
    hidden, weight, *rest = inputs
    found = chunked.linear_logprob(hidden, weight, rest[0] if rest else None, targets, scale=scale, softcap=softcap)
    logits = (hidden @ weight.T + (rest[0] if rest else 0)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(1)[torch.arange(tokens), targets]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_several_targets_of_a_token_are_as_many_calls_with_one(scale: float, softcap: float | None) -> None:
    """Values are the same bytes; the gradient is the sum. Against the reference too; a target may occur twice."""
    inputs, first = make(13, 5, 61, torch.float64)
    targets = torch.stack([first, first.roll(1), first, first.roll(5)], dim=1)
    found = chunked.linear_logprob(*inputs, targets, scale=scale, softcap=softcap)
    alone = [chunked.linear_logprob(*inputs, column, scale=scale, softcap=softcap) for column in targets.T]
    assert torch.equal(found, torch.stack(alone, dim=1))
    outer = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view_as(found)
    ours = torch.autograd.grad((found * outer).sum(), inputs)
    summed = torch.autograd.grad(torch.stack([one * outer[:, i] for i, one in enumerate(alone)]).sum(), inputs)
    specified = reference.linear_logprob(*inputs, targets, scale=scale, softcap=softcap)
    torch.testing.assert_close(found.float(), specified, atol=1e-6, rtol=1e-6)
    for one, other in zip(ours, summed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_likeliest_tokens_are_those_of_the_whole_softmax(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "BLOCK", 4)
    (hidden, weight, bias), _ = make(11, 4, 37, dtype)
    whole = (hidden @ weight.T + bias).log_softmax(dim=1)
    found = chunked.linear_topk(hidden, weight, bias, 5)
    assert torch.equal(found, whole.topk(5).indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = chunked.linear_topk(hidden, weight, bias, 5)
        products = torch.nn.functional.linear(hidden, weight, bias)
    assert torch.equal(products.gather(1, rounded), products.topk(5).values), "of the products that are scored"


@pytest.mark.usefixtures("memory")
def test_finite_differences() -> None:
    inputs, targets = make(9, 4, 37, torch.float64)

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked.linear_logprob(hidden, weight, bias, targets, scale=0.7, softcap=2.0)

    assert torch.autograd.gradcheck(values, inputs)


@given(tokens=st.integers(1, 40), width=st.integers(1, 20), vocab=st.integers(2, 300))
@settings(max_examples=40)
def test_equals_the_reference_and_torch_s_own(tokens: int, width: int, vocab: int) -> None:
    inputs, targets = make(tokens, width, vocab, torch.float32, bias=False)
    found = chunked.linear_logprob(*inputs, None, targets)
    specified = reference.linear_logprob(*inputs, None, targets)
    torchs = -F.linear_cross_entropy(*inputs, targets, reduction="none")
    ours = gradients(found, inputs)
    for expected in (specified, torchs):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, gradients(expected, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("memory")
def test_a_frozen_head_costs_no_gradient_of_its_own() -> None:
    """What LoRA needs: the gradient goes through the head, not into it."""
    (hidden, weight, bias), targets = make(11, 4, 37, torch.float64)
    frozen = chunked.linear_logprob(hidden, weight.detach(), bias.detach(), targets)
    everything = chunked.linear_logprob(hidden, weight, bias, targets)
    torch.testing.assert_close(gradients(frozen, [hidden]), gradients(everything, [hidden]))
    assert weight.grad is None


@pytest.mark.usefixtures("memory")
def test_a_second_backward_pass_gives_the_same() -> None:
    """The first one overwrites what was kept."""
    inputs, targets = make(11, 4, 37, torch.float64)
    values = chunked.linear_logprob(*inputs, targets).sum()
    first = torch.autograd.grad(values, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(values, inputs), first)


def test_bfloat16_products_with_float32_statistics() -> None:
    """Log-probs stay float32 and near the exact ones; a bfloat16 log-softmax would be off by 0.03 and more."""
    inputs, targets = make(64, 32, 999, torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked.linear_logprob(*inputs, None, targets)
        specified = reference.linear_logprob(*inputs, None, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, specified, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(found, inputs), gradients(specified, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The Triton kernels, run by Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        # Triton reads the source of its kernels, which the hook that checks shapes would wrap
        patch.setattr(sys, "meta_path", [f for f in sys.meta_path if "jaxtyping" not in type(f).__module__])
        patch.setattr(import_module("sparring.model.kernels.triton"), "TILE", 64)
        yield import_module("sparring.model.kernels.triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("tokens, vocab", [(1, 2), (7, 64), (5, 199), (3, 65)])
@pytest.mark.parametrize("several", [(), (3,)], ids=["one target", "three targets"])
def test_triton_equals_torch(
    interpreted: ModuleType,
    tokens: int,
    vocab: int,
    several: tuple[int, ...],
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(vocab)
    logits = (8 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)).to(dtype).to(device)
    targets = torch.randint(vocab, (tokens, *several), generator=generator).to(device)
    expected = rows.logprobs_of(logits.clone(), targets, scale, softcap)
    found = interpreted.logprobs_of(logits.clone(), targets, scale, softcap)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=exact, rtol=exact)
    outer = torch.linspace(-1, 2, targets.numel(), dtype=expected[0].dtype, device=device).view_as(targets)
    slopes, torchs = logits.clone(), logits.clone()
    interpreted.slopes_(slopes, targets, expected[1], outer, scale, softcap)
    rows.slopes_(torchs, targets, expected[1], outer, scale, softcap)
    exact = 1e-2 if dtype == torch.bfloat16 else exact  # rounded to bfloat16, perhaps to its other side
    torch.testing.assert_close(slopes, torchs, atol=exact, rtol=exact)


class WithoutCompiler:
    """A kernel that Triton cannot compile, as in an image without gcc."""

    def __getitem__(self, grid: object) -> object:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A device that holds no values, for what is decided without them."""
    chunked.rows_for.cache_clear()
    with FakeTensorMode():
        yield torch.device("cuda")
    chunked.rows_for.cache_clear()


def test_without_a_c_compiler_torch_s_rows_are_used(
    interpreted: ModuleType, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreted, "_logprobs", WithoutCompiler())
    assert [chunked.rows_for(cuda), chunked.rows_for(cuda)] == [rows, rows]
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("do not compile here: Failed to find C compiler.") == 1
    assert said.endswith("Triton needs a C compiler and Python's headers (gcc, python3-dev).")


def test_triton_s_rows_are_used_where_they_compile(
    interpreted: ModuleType, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "_logprobs", defaultdict(lambda: lambda *of, **settings: None))
    assert chunked.rows_for(cuda) is interpreted


def test_blocks_on_a_gpu_are_by_bytes() -> None:
    """16 thousand tokens of a vocabulary of 128 thousand: 9 products, not 64, each added to 1 GB of gradient."""
    row_bytes = 2 * 128_256
    sizes = chunked._blocks(16_384, chunked.KEPT // row_bytes, chunked.block_tokens("cuda", row_bytes))
    assert sum(sizes) == 16_384 and len(sizes) == 9
    assert 2**28 < max(sizes) * row_bytes <= 2**29
    assert chunked.block_tokens("cpu", row_bytes) == chunked.BLOCK


def test_the_head_with_triton_in_its_place(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK", 4)
    monkeypatch.setattr(chunked, "rows_for", lambda device: interpreted)
    inputs, targets = make(11, 4, 37, torch.float64)
    found = chunked.linear_logprob(*inputs, targets, scale=0.7, softcap=2.0)
    monkeypatch.undo()
    expected = chunked.linear_logprob(*inputs, targets, scale=0.7, softcap=2.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), atol=1e-12, rtol=1e-12)
