"""The forecast of training memory against a trace of every layer, the rule of thumb before it, and measured steps.

The trace runs all layers on fake tensors, where the forecast has two depths. The measured steps are of a real model on
this CPU: two optimizer steps with two micro-batches each, with a checkpoint between them, in a process of its own.

    python benchmarks/forecast.py --model FOLDER --out benchmarks/results/forecast.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from sparring.commands.forecast import empty_model, forecast, training_bytes
from sparring.recipe.schema import Recipe
from sparring.stages.train.dry_run import peak_bytes, phase_peaks

TOKENS, CPU_TOKENS = 4096, 512
QWEN3 = {"vocab_size": 151_936, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
SIZES: dict[str, PreTrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, **QWEN3),
    "Qwen3-1.7B": Qwen3Config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, **QWEN3),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_key_value_heads=8, tie_word_embeddings=False
    ),
    "Mistral-7B": MistralConfig(vocab_size=32_000, sliding_window=None, tie_word_embeddings=False),
}
CASES: dict[str, tuple[str, int, dict[str, object]]] = {
    "Qwen3-0.6B, full, RMSProp": ("Qwen3-0.6B", 1, {}),
    "Qwen3-1.7B, full, RMSProp": ("Qwen3-1.7B", 1, {}),
    "Qwen3-1.7B, full, RMSProp, checkpointing": ("Qwen3-1.7B", 1, {"checkpointing": True}),
    "Llama-3.1-8B, LoRA, AdamW": ("Llama-3.1-8B", 1, {"adapter": {"r": 16}, "optimizer": "adamw"}),
    "Llama-3.1-8B, LoRA, AdamW, checkpointing": (
        "Llama-3.1-8B",
        1,
        {"adapter": {"r": 16}, "optimizer": "adamw", "checkpointing": True},
    ),
    "Mistral-7B, full, FSDP2 on 8 ranks": ("Mistral-7B", 8, {}),
    "Mistral-7B, full, FSDP2 on 8 ranks, checkpointing": ("Mistral-7B", 8, {"checkpointing": True}),
    "Mistral-7B, full, FSDP2 on 8 nodes of 8 ranks, checkpointing": ("Mistral-7B", 64, {"checkpointing": True}),
}
OPTIMIZERS = ("rmsprop", "adamw", "adamw_8bit")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A small real model for the measured steps.")
    parser.add_argument("--step", choices=OPTIMIZERS, help="Only take measured steps, and print their peak.")
    parser.add_argument("--heap", choices=("kept", "returned"), help="Only measure what the C heap keeps.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure_steps(options.model, options.step)))
        return
    if options.heap:
        print(json.dumps(measure_heap(options.heap == "returned")))
        return
    # first, while this process has loaded what every process loads and nothing else
    measured = {} if options.model is None else {name: measure(options.model, name) for name in OPTIMIZERS}
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs; no GPU",
        "versions": {package: version(package) for package in ("sparring", "torch", "transformers")},
        "tokens_per_micro_batch": TOKENS,
        "traced": {name: trace(*case) for name, case in CASES.items()},
        "measured": measured,
        "heap_mib": {name: in_a_process("--heap", name) for name in ("kept", "returned")},
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def make_recipe(dtype: str, tokens: int, settings: dict[str, object]) -> Recipe:
    train = {
        "dtype": dtype,
        "micro_batch_tokens": tokens,
        "optimizer": settings.get("optimizer", "rmsprop"),
        "gradient_checkpointing": settings.get("checkpointing", False),
    }
    raw = {"model": "m", "method": "spin", "data": {"train": "x"}, "parallel": "fsdp2", "train": train}
    return Recipe.model_validate({**raw, "adapter": settings.get("adapter")})


def trace(size: str, ranks: int, settings: dict[str, object]) -> dict[str, float]:
    """GiB per device: the forecast, the trace of every layer, the old rule; and the forecast's seconds."""
    recipe, config = make_recipe("bfloat16", TOKENS, settings), SIZES[size]
    start = time.monotonic()
    expected = peak_bytes(recipe, config, TOKENS, "cuda", ranks)
    seconds = time.monotonic() - start
    every = max(phase_peaks(recipe, config, TOKENS, "cuda", ranks).values())
    return {
        "forecast_gib": round(expected / GIB, 3),
        "every_layer_gib": round(every / GIB, 3),
        "rule_gib": round(rule_of_thumb(recipe, config, ranks) / GIB, 3),
        "forecast_seconds": round(seconds, 1),
    }


def rule_of_thumb(recipe: Recipe, config: PreTrainedConfig, ranks: int) -> float:
    """What the forecast was until it was traced: 34 bytes in 16 bits per layer, token and hidden unit, and two blocks
    of logits, beside weights, gradients and optimizer state."""
    is_checkpointed = recipe.train.gradient_checkpointing
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        state = forecast(recipe, Path(folder), 1000).state_bytes
        width = empty_model(Path(folder)).config.get_text_config()
    kept = width.num_hidden_layers * width.hidden_size * 2 * (1 if is_checkpointed else 17)
    return state / ranks + TOKENS * kept + (0 if is_checkpointed else 2**27) + 256 * width.vocab_size * 2


def measure(folder: Path, optimizer: str) -> dict[str, float]:
    """GiB of a process: the forecast, and the peak that the system counted."""
    recipe = make_recipe("float32", CPU_TOKENS, {"optimizer": optimizer})
    expected = training_bytes(recipe, folder, "cpu", 1)
    found = in_a_process("--model", str(folder), "--step", optimizer)
    return {"forecast_gib": round(expected / GIB, 3), **found}


def in_a_process(*options: str) -> dict[str, float]:
    words = [sys.executable, __file__, *options]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure_steps(folder: Path, optimizer: str) -> dict[str, float]:
    import numpy as np
    import torch

    from sparring.model.load import load_model
    from sparring.model.logprobs import Scorer
    from sparring.model.memory import peak_memory_mib, return_freed_memory
    from sparring.parallel import SingleProcess
    from sparring.stages.train import checkpoint
    from sparring.stages.train.policy import make_policy
    from sparring.stages.train.step import forward_backward
    from sparring.types import Group, TrainingExample

    return_freed_memory()
    torch.set_num_threads(1)
    recipe, cpu = make_recipe("float32", CPU_TOKENS, {"optimizer": optimizer}), torch.device("cpu")
    here = SingleProcess(device=cpu)
    model = load_model(folder, dtype=torch.float32, device=cpu)
    policy = make_policy(model, recipe, 0, here, Scorer)
    random = np.random.default_rng(0)

    def example() -> TrainingExample:
        prompt, real, generated = (random.integers(3, 20_000, n).astype(np.int32) for n in (128, 192, 192))
        opponent = {"real": np.float32(-300), "generated": np.full(1, -300, dtype=np.float32)}
        return TrainingExample(Group("", prompt, {"real": (real,), "generated": (generated,)}), opponent)  # type: ignore[arg-type]

    def step() -> None:
        forward_backward(policy, recipe.method, [example(), example()], CPU_TOKENS, 0.0, here)
        here.optimizer_step(policy.forward, policy.optimizer, 1.0)

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as work:
        metrics = Path(work) / "metrics.jsonl"
        metrics.write_text("")
        step()
        with checkpoint.Checkpointer(metrics.parent, policy.model, policy.optimizer, metrics, here) as checkpoints:
            checkpoints.save(1)
            step()
    return {"measured_gib": round(peak_memory_mib(cpu) / 1024, 3)}


def measure_heap(is_returned: bool, steps: int = 40) -> dict[str, float]:
    """MiB of the process beyond its tensors after steps with rows of varying length: all of them, after 5 and at the
    end. `is_returned`: as training sets the C library; otherwise as it is."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from sparring.model.logprobs import Scorer
    from sparring.model.memory import return_freed_memory
    from sparring.model.optimizers import make_optimizer
    from sparring.model.packing import pack_shared
    from sparring.types import Group

    if is_returned:
        return_freed_memory()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
    )
    before = anonymous_mib()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scorer, optimizer = Scorer(model), make_optimizer("adamw", model, 1e-5, 0.0)
    tensors = 3 * sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    random, beyond = np.random.default_rng(0), []
    for _ in range(steps):

        def ids() -> np.ndarray:
            return random.integers(0, 8000, random.integers(10, 90)).astype(np.int32)

        scorer(pack_shared([Group(str(i), ids(), {"real": (ids(),)}) for i in range(4)])).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        beyond.append(anonymous_mib() - before - tensors)
    return {"after_5_steps": round(beyond[4]), f"after_{steps}_steps": round(beyond[-1])}


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
