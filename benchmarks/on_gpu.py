"""Measures everything that needs a GPU, as one JSON: see on_gpu.sh."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.model.kernels import chunked, linear_logprob, reference, rows
from sparring.model.logprobs import Scorer
from sparring.model.packing import micro_batches, pack
from sparring.types import Group

MODELS = {  # width, inner width, layers, heads, key-value heads, vocabulary
    "tiny": (32, 64, 2, 4, 2, 199),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128_256),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}
FAST = torch.bfloat16


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median of one call, after a first one. On a CPU, where only the script is checked, of the first one."""
    if device.type == "cuda":
        run()
    found = []
    for _ in range(repeats if device.type == "cuda" else 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Beyond what was there before."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait(device)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def matrix_peak(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of square products."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype)[6:]] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b, device) / 1e12
    return found


def head(device: torch.device, tokens: int, width: int, vocab: int) -> dict[str, Any]:
    """The head alone: ours against its specification, torch's own, and libraries that are installed."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocab, width, device=device) * width**-0.5
    targets = torch.randint(vocab, (tokens,), device=device)
    outer = torch.linspace(-1, 2, tokens, device=device)

    def both(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        values = function(*inputs, targets).float()
        return [values.detach(), *(g.float() for g in torch.autograd.grad(values, inputs, outer))]

    arms: dict[str, Callable[..., Tensor]] = {
        "reference": lambda h, w, t: reference.linear_logprob(h, w, None, t),
        "ours": lambda h, w, t: linear_logprob(h, w, None, t),
        "torch linear_cross_entropy": lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none"),  # type: ignore[attr-defined]
    }
    if has("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        arms["cut-cross-entropy"] = lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none")
    if has("liger_kernel"):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        arms["liger"] = lambda h, w, t: -liger_fused_linear_cross_entropy(h, w, t, reduction="none")
    exact = both(arms["reference"], torch.float32)
    found: dict[str, Any] = {"rows": chunked.rows_for(device).__name__}
    for dtype in (torch.float32, FAST):
        for name, function in arms.items():

            def one(function: Callable[..., Tensor] = function, dtype: torch.dtype = dtype) -> dict[str, Any]:
                values = both(function, dtype)
                return {
                    "largest_error_of_log_prob": float((values[0] - exact[0]).abs().max()),
                    "gradient_errors": [
                        float((a - b).norm() / b.norm()) for a, b in zip(values[1:], exact[1:], strict=True)
                    ],
                    "milliseconds": 1e3 * seconds(lambda: both(function, dtype), device),
                    "mib": peak_mib(lambda: both(function, dtype), device),
                }

            found[f"{name}, {str(dtype)[6:]}"] = attempt(one)
    return found


def kernels(device: torch.device) -> dict[str, float]:
    """What works on rows of logits there, against plain torch in float64."""
    work, found = chunked.rows_for(device), {}
    for vocab in (65, 5000, 50_257)[: 3 if device.type == "cuda" else 1]:
        for scale, softcap in ((1.0, None), (0.5, 3.0)):
            logits = 4 * torch.randn(33, vocab, device=device)
            targets, outer = torch.randint(vocab, (33,), device=device), torch.randn(33, device=device)
            values, normalizers = work.logprobs_of(logits.clone(), targets, scale, softcap)
            exact = rows.logprobs_of(logits.double(), targets, scale, softcap)
            slopes, torchs = logits.clone(), logits.double()
            work.slopes_(slopes, targets, normalizers, outer, scale, softcap)
            rows.slopes_(torchs, targets, exact[1], outer.double(), scale, softcap)
            errors = ((values - exact[0]).abs().max(), (slopes - torchs).abs().max())
            found[f"vocabulary {vocab}, cap {softcap}"] = max(float(e) for e in errors)
    assert max(found.values()) < 1e-4, found
    return found


def make_model(size: str, device: torch.device, layers: int | None = None) -> LlamaForCausalLM:
    width, inner, depth, heads, kv_heads, vocab = MODELS[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
    )
    with device:
        return LlamaForCausalLM(config).train()


def make_groups(count: int, prompt: int, answer: int, vocab: int) -> list[Group]:
    """Pairs; each length varies by 25 % to both sides."""
    random = np.random.default_rng(0)

    def tokens(mean: int) -> np.ndarray:
        size = random.integers(round(0.75 * mean), round(1.25 * mean) + 1)
        return random.integers(3, vocab, size).astype(np.int32)

    return [
        Group(str(i), tokens(prompt), {"real": (tokens(answer),), "generated": (tokens(answer),)}) for i in range(count)
    ]


def step(scorer: Scorer, groups: list[Group], budget: int) -> None:
    """Forward and backward of the groups, and no optimizer."""
    scorer.zero_grad()
    for batch in micro_batches(scorer.packing, groups, budget):
        packed = pack(scorer.packing, [groups[i] for i in batch]).to(scorer.device)
        scores = packed.scores(scorer(packed))
        margin = scores["real"] - scores["generated"][:, 0]
        F.softplus(-0.1 * margin).sum().div(len(groups)).backward()


def layouts(device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """Shared rows against padded ones on a small model, in float32: log-probs and gradients."""
    size = "tiny" if is_tiny else "1b"
    model = make_model(size, device, layers=2)
    groups = make_groups(4, 40, 60, MODELS[size][5])
    found: dict[str, list[Tensor]] = {}
    arms: dict[str, Any] = {"padded": ("padded", False), "pieces": ("shared", False), "flex": ("shared", True)}
    for name, (packing, is_flex) in arms.items():
        if is_flex and device.type != "cuda":
            continue  # it has no backward pass on CPU
        scorer = Scorer(model, packing=packing)
        is_at_hand, scorer.is_flex = scorer.is_flex, is_flex
        assert is_at_hand or not is_flex, "FlexAttention was tried at loading and given up"
        model.zero_grad()
        values = scorer(pack(scorer.packing, groups).to(device))
        (values * torch.linspace(-1, 2, len(values), device=device)).sum().backward()
        found[name] = [values.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]
    return {
        name: [float((a - b).norm() / b.norm()) for a, b in zip(values, found["padded"], strict=True)]
        for name, values in found.items()
    }


def training(device: torch.device, size: str, peak: float, count: int, budget: int, checkpoint: bool) -> dict[str, Any]:
    """Steps of chat lengths (prompt 150, answers 250) in bfloat16: throughput, MFU over the least FLOPs, memory."""
    width, inner, depth, heads, kv_heads, vocab = MODELS[size]
    model = make_model(size, device)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups(count, *((15, 25) if size == "tiny" else (150, 250)), vocab)
    body = depth * (2 * width * width + 2 * width * kv_heads * (width // heads) + 3 * width * inner)
    shared = pack("shared", groups)
    visible = sum(p**2 // 2 + sum(r * p + r**2 // 2 for r in rest) for p, *rest in shared.shared_prompts.sizes)  # type: ignore[union-attr]
    flops = 6 * body * shared.computed_tokens + 6 * width * vocab * len(shared.targets) + 12 * depth * width * visible
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "least_tflops": flops / 1e12}
    for packing in ("padded", "shared"):
        scorer = Scorer(model, FAST, packing)  # type: ignore[arg-type]

        def one(scorer: Scorer = scorer) -> dict[str, Any]:
            took = seconds(lambda: step(scorer, groups, budget), device, 3)
            return {
                "seconds": took,
                "row_tokens_per_second": sum(2 * len(g.prompt_ids) + sum(map(len, _answers(g))) for g in groups) / took,
                "share_of_matrix_peak": flops / took / 1e12 / peak,
                "mib_beyond_the_weights": peak_mib(lambda: step(scorer, groups, budget), device),
                "is_flex": scorer.is_flex,
            }

        model.zero_grad(set_to_none=True)
        found[packing] = attempt(one)
    return found


def _answers(group: Group) -> list[np.ndarray]:
    return [answer for answers in group.responses.values() for answer in answers]


def attempt(run: Callable[[], Any]) -> Any:
    """Its result, or what went wrong: one failure must not cost the rest of the call."""
    try:
        return run()
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def has(name: str) -> bool:
    try:
        version(name.replace("_", "-"))
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to check the script")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing after so many")
    arguments = parser.parse_args()
    began, is_tiny = time.monotonic(), arguments.tiny
    device = torch.device("cuda" if torch.cuda.is_available() and not is_tiny else "cpu")
    if device.type == "cpu" and not is_tiny:
        raise SystemExit("no GPU here; --tiny checks the script without one")
    peak = matrix_peak(device, 64 if is_tiny else 8192)
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {p: version(p) for p in ("torch", "transformers", "accelerate", "triton") if has(p)},
        "matrix_peak_tflops": peak,
    }
    sections: dict[str, Callable[[], Any]] = {
        "kernels": lambda: kernels(device),
        "layouts": lambda: layouts(device, is_tiny),
        "head 32k": lambda: head(device, *((40, 16, 199) if is_tiny else (8192, 2048, 32_000))),
        "head 128k": lambda: head(device, *((40, 16, 299) if is_tiny else (8192, 4096, 128_256))),
    }
    cases = [("tiny", 3, 1000, False), ("tiny", 3, 100, True)] if is_tiny else []
    cases = cases or [("1b", 64, 16_384, False), ("8b", 32, 16_384, True), ("3b", 64, 16_384, True)]
    for size, count, budget, checkpoint in cases:
        name = f"training {size}, {budget} tokens per micro-batch{', checkpointing' if checkpoint else ''}"
        sections[name] = lambda a=(size, peak["bfloat16"], count, budget, checkpoint): training(device, *a)
    for name, run in sections.items():
        is_late = time.monotonic() - began > 60 * arguments.minutes
        result[name] = {"failed": "no time was left"} if is_late else attempt(run)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
