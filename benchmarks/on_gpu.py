"""What a GPU has to show, part by part: see on_gpu.sh. Each part is a process with a time limit of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.model.attention import flex_options
from sparring.model.kernels import chunked, linear_logprob, reference, rows
from sparring.model.logprobs import Scorer
from sparring.model.packing import micro_batches, pack
from sparring.types import Group

Result = dict[str, Any]

LIMITS = {
    "play full": 100,
    "play LoRA": 60,
    "fsdp2 on one rank": 90,
    "kernels": 30,
    "layouts": 50,
    "training 0.6b": 50,
    "training 3b": 60,
    "head": 40,
    "kill and continue": 60,
}
"""Seconds that each part may take, in the order in which they run; all together, at most SECONDS."""
SECONDS = 540
END = "<|end|>"
CPU = torch.device("cpu")
MODELS = {  # width, inner width, layers, heads, key-value heads, width of a head, vocabulary
    "tiny": (32, 64, 2, 4, 2, 16, 199),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "3b": (2048, 11_008, 36, 16, 2, 128, 151_936),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to check the script")
    parser.add_argument("--part", choices=LIMITS, help="run this part alone, in this process")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments.part, arguments.tiny)))
        return
    end = time.monotonic() + SECONDS
    for part, limit in LIMITS.items():
        words = [sys.executable, __file__, "--part", part, *(["--tiny"] if arguments.tiny else [])]
        left = min(limit, end - time.monotonic())
        line = supervise(part, words, left) if left > 10 else {"part": part, "failed": "no time was left"}
        print(json.dumps(line), flush=True)


def supervise(part: str, words: list[str], limit: float) -> Result:
    """Runs a part in a process of its own; whatever happens there, the next part follows."""
    start = time.monotonic()
    line: Result = {"part": part}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=limit)
            if process.returncode:
                raise RuntimeError(f"status {process.returncode}")
            line |= json.loads(output.splitlines()[-1])
        except (subprocess.TimeoutExpired, RuntimeError, ValueError, IndexError) as error:
            line["failed"] = f"more than {limit:.0f} s" if process.poll() is None else str(error)
            log.seek(0)
            line["last_words"] = log.read().decode(errors="replace")[-1500:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return {**line, "seconds": round(time.monotonic() - start, 1)}


def run_part(part: str, is_tiny: bool) -> Result:
    device = torch.device("cuda" if torch.cuda.is_available() and not is_tiny else "cpu")
    if device.type == "cpu" and not is_tiny:
        raise SystemExit("no GPU here; --tiny checks the script without one")
    parts: dict[str, Callable[[], Result]] = {
        "play full": lambda: play_run(is_tiny),
        "play LoRA": lambda: play_run(is_tiny, "adapter={r: 16}"),
        "fsdp2 on one rank": lambda: play_run(is_tiny, *FSDP2),
        "kernels": lambda: kernels(device),
        "layouts": lambda: layouts(device, is_tiny),
        "training 0.6b": lambda: training(device, "tiny" if is_tiny else "0.6b"),
        "training 3b": lambda: training(device, "tiny" if is_tiny else "3b"),
        "head": lambda: head(device, *((40, 16, 199) if is_tiny else (8192, 2048, 151_936))),
        "kill and continue": lambda: kill_and_continue(is_tiny),
    }
    found = parts[part]()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"machine": machine, "torch": torch.__version__, **found}


# runs: what a user does on the first day


FSDP2 = ("launch=torchrun", "num_processes=1", "parallel=fsdp2", "iterations=1")


def play_run(is_tiny: bool, *overrides: str) -> Result:
    """`play()` of SPIN from the first row to the report, and its peak memory against the forecast."""
    from sparring.commands.forecast import training_bytes
    from sparring.loop import play
    from sparring.recipe.load import load_recipe
    from sparring.run.manifest import read_manifest

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(write_run(Path(folder), is_tiny), list(overrides))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        forecast = training_bytes(recipe, Path(recipe.model), device, 1)
        run = play(recipe, Path(folder) / "run").run
        stages = {
            f"{file.parent.parent.name}/{file.parent.name}": {k: info[k] for k in ("seconds", "peak_memory_mib")}
            for file in sorted(run.root.glob("iter-*/*/MANIFEST.json"))
            if "peak_memory_mib" in (info := read_manifest(file.parent).info)
        }
    return {"stages": stages, "forecast_mib": round(forecast / 2**20)}


def write_run(folder: Path, is_tiny: bool) -> Path:
    """A model with random weights, 64 rows of words that are tokens, and a recipe for them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    from sparring.model.load import save_model

    size = "tiny" if is_tiny else "0.6b"
    vocab = MODELS[size][-1]
    words = Tokenizer(WordLevel({END: 0} | {str(i): i + 1 for i in range(vocab - 1)}, unk_token=END))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    save_model(make_model(size), tokenizer, folder / "model")
    random = np.random.default_rng(0)

    def text(mean: int) -> str:
        return " ".join(map(str, random.integers(0, vocab - 1, random.integers(mean // 2, 2 * mean))))

    rows = [{"question": text(10 if is_tiny else 150), "answer": text(10 if is_tiny else 120)} for _ in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {folder / 'model'}\n"
        "method: spin\n"
        "iterations: 2\n"
        f"data: {{train: {folder / 'rows.jsonl'}, held_out: 4, template: '{{prompt}} '}}\n"
        f"generate: {{max_new_tokens: {12 if is_tiny else 128}}}\n"
        "train: {batch_size: 16, epochs: 1, max_length: 1024, checkpoint_minutes: 0}\n"
    )
    return recipe


def kill_and_continue(is_tiny: bool) -> Result:
    """One run that is never stopped, and one that is killed in training and continued: are the weights the same bytes?

    The products of a GPU are; what adds up with atomics is not promised to be (docs/reliability.md).
    """
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_run(Path(folder), is_tiny)
        for name, deaths in (("whole", ()), ("killed", ("train-step:3",))):
            words = [sys.executable, "-m", "sparring.cli", "run", str(recipe), f"{folder}/{name}", "iterations=1"]
            for death in (*deaths, ""):
                environment = {**os.environ, "SPARRING_FAIL_AT": death}
                done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
                if done.returncode != (137 if death else 0):
                    raise RuntimeError(f"status {done.returncode}: {done.stderr[-1000:]}")
            weights = sorted(Path(folder, name, "iter-00", "train", "model").glob("*.safetensors"))
            digests.append(hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest())
    return {"same_bytes": digests[0] == digests[1]}


# kernels and steps


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
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        arms["cut-cross-entropy"] = lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none")
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        arms["liger"] = lambda h, w, t: -liger_fused_linear_cross_entropy(h, w, t, reduction="none")
    exact = both(arms["reference"], torch.float32)
    found: dict[str, Any] = {"rows": chunked.rows_for(device).__name__}
    for dtype in (torch.float32, torch.bfloat16):
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


def make_model(size: str, device: torch.device = CPU, layers: int | None = None) -> LlamaForCausalLM:
    width, inner, depth, heads, kv_heads, head_width, vocab = MODELS[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
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


def layouts(device: torch.device, is_tiny: bool) -> Result:
    """Shared rows against padded ones, in float32: relative errors of log-probs and gradients. And which blocks
    FlexAttention runs with, in both dtypes."""
    size = "tiny" if is_tiny else "0.6b"
    model = make_model(size, device, layers=2)
    groups = make_groups(4, 40, 60, MODELS[size][-1])
    values: dict[str, list[Tensor]] = {}
    scorer = Scorer(model)
    assert scorer.packing == "shared", scorer.why_padded
    padded, shared = pack("padded", groups).to(device), pack("shared", groups).to(device)
    assert shared.shared_prompts is not None
    pieces = replace(shared, shared_prompts=replace(shared.shared_prompts, in_pieces=True))
    for name, batch in {"padded": padded, "pieces": pieces, "shared": shared}.items():
        model.zero_grad()
        logprobs = batch.sums(scorer(batch))
        (logprobs * torch.linspace(-1, 2, len(logprobs), device=device)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        values[name] = [logprobs.detach(), gradient]
    _, _, _, heads, kv_heads, width, _ = MODELS[size]
    shape = heads, kv_heads, width, width, width**-0.5
    return {
        "errors": {
            name: [float((a - b).norm() / b.norm()) for a, b in zip(found, values["padded"], strict=True)]
            for name, found in values.items()
        },
        "flex_options": {
            str(dtype)[6:]: flex_options(*shape, dtype, padded.input_ids.device)
            for dtype in (torch.bfloat16, torch.float32)
        },
    }


def training(device: torch.device, size: str) -> Result:
    """Steps of chat lengths (prompt 150, answers 250) in bfloat16 with checkpointing: throughput, memory, and MFU over
    the least FLOPs against the measured peak of products. TRL's DPOTrainer, with cached reference, where installed."""
    width, inner, depth, heads, kv_heads, head_width, vocab = MODELS[size]
    is_tiny = size == "tiny"
    peak = matrix_peak(device, 64 if is_tiny else 8192)["bfloat16"]
    model = make_model(size, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups(3 if is_tiny else 48, *((15, 25) if is_tiny else (150, 250)), vocab)
    body = depth * (2 * width * (heads + kv_heads) * head_width + 3 * width * inner)
    shared = pack("shared", groups)
    assert shared.shared_prompts is not None
    visible = sum(p**2 // 2 + sum(r * p + r**2 // 2 for r in rest) for p, *rest in shared.shared_prompts.sizes)
    products = 6 * body * shared.computed_tokens + 6 * width * vocab * len(shared.targets)
    flops = products + 12 * depth * heads * head_width * visible
    scorers = {packing: Scorer(model, torch.bfloat16, packing) for packing in ("padded", "shared")}  # type: ignore[arg-type]
    arms: dict[str, Callable[[], object]] = {
        name: lambda scorer=scorer: step(scorer, groups, 100 if is_tiny else 16_384) for name, scorer in scorers.items()
    }
    if find_spec("trl") and not is_tiny:
        arms["trl"] = trl_step(model, groups)

    def measure(run: Callable[[], object]) -> Result:
        took = seconds(run, device, 3)
        return {
            "seconds": took,
            "share_of_matrix_peak": flops / took / 1e12 / peak,
            "mib_beyond_the_weights": peak_mib(run, device),
        }

    found: Result = {"matrix_peak_tflops": peak, "least_tflops": flops / 1e12}
    for name, run in arms.items():
        model.zero_grad(set_to_none=True)
        found[name] = attempt(lambda run=run: measure(run))
    return found


def trl_step(model: LlamaForCausalLM, groups: list[Group]) -> Callable[[], object]:
    """Forward and backward of TRL's DPO on the same tokens, 8 pairs at a time, with cached reference log-probs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparring.commands.demo import make_tokenizer

    settings = DPOConfig(
        tempfile.mkdtemp(), precompute_ref_log_probs=True, bf16=True, gradient_checkpointing=True, report_to=[]
    )
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    words = make_tokenizer([{"question": "1 2 3", "answer": "1 2 3"}])
    trainer = DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list([row]), processing_class=words)
    batches = [
        trainer.data_collator(
            [
                {
                    "prompt_ids": group.prompt_ids.tolist(),
                    "chosen_ids": group.responses["real"][0].tolist(),
                    "rejected_ids": group.responses["generated"][0].tolist(),
                    "ref_chosen_logps": -100.0,
                    "ref_rejected_logps": -100.0,
                }
                for group in groups[start : start + 8]
            ]
        )
        for start in range(0, len(groups), 8)
    ]

    def run() -> None:
        model.zero_grad()
        for batch in batches:
            trainer.compute_loss(model, {name: x.to(model.device) for name, x in batch.items()}).backward()

    return run


def attempt(run: Callable[[], Any]) -> Any:
    """Its result, or what went wrong: one arm must not cost the others."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
