"""Measures for how long training waits for a checkpoint: python benchmarks/checkpoint.py [--out FILE].

A model of SmolLM2-135M's shapes with AdamW's moments, 1.6 GB, on one process and sharded on two. Two arms in one run:
`gathered`, as up to November 2026 (every rank gathers whole tensors, the main rank writes, all wait), and `sharded`, as
it is now. Seconds, median of three: what training waits, and until the checkpoint is committed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.model.logprobs import Scorer
from sparring.model.optimizers import state_tensors
from sparring.parallel import Parallel, SingleProcess
from sparring.parallel.fsdp2 import Fsdp2
from sparring.parallel.rendezvous import Rendezvous
from sparring.run.manifest import commit
from sparring.stages.train.checkpoint import Checkpointer, trained_parameters

REPEATS = 3


def trained_model(parallel: Parallel) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    _, optimizer = parallel.prepare(Scorer(model, torch.float32), ["LlamaDecoderLayer"], AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, parallel.unwrap(optimizer)


def save_gathered(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, parallel: Parallel) -> None:
    """The version before."""
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in trained_parameters(model):
        for key, tensor in (("weights", parameter), *state_tensors(optimizer.state[parameter])):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # on every rank
            whole = whole.detach().cpu().contiguous()
            if parallel.is_main:
                gathered[f"{name}/{key}"] = whole
    if parallel.is_main:
        with commit(folder) as temporary:
            save_file(gathered, temporary / "model.safetensors")
    parallel.barrier()


def measure(parallel: Parallel, work: Path) -> dict[str, dict[str, float]]:
    model, optimizer = trained_model(parallel)
    (work / "metrics.jsonl").touch()
    waited: dict[str, list[float]] = {"gathered": [], "sharded": []}
    committed: dict[str, list[float]] = {"gathered": [], "sharded": []}
    with Checkpointer(work, model, optimizer, work / "metrics.jsonl", parallel) as checkpoints:
        for number in range(REPEATS):
            os.sync()
            parallel.barrier()
            start = time.monotonic()
            save_gathered(work / f"gathered-{number}", model, optimizer, parallel)
            waited["gathered"].append(time.monotonic() - start)
            committed["gathered"].append(time.monotonic() - start)
            os.sync()
            parallel.barrier()
            start = time.monotonic()
            checkpoints.save(number + 1)
            waited["sharded"].append(time.monotonic() - start)
            checkpoints.wait()
            parallel.barrier()
            committed["sharded"].append(time.monotonic() - start)
    return {
        arm: {
            "training_waits_seconds": round(statistics.median(waited[arm]), 2),
            "committed_after_seconds": round(statistics.median(committed[arm]), 2),
        }
        for arm in waited
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-in", type=Path, help="for ranks: the folder that all of them see")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.rank_in is not None:
        parallel = Fsdp2(Rendezvous(600.0))
        found = measure(parallel, wanted.rank_in)
        if parallel.is_main:
            (wanted.rank_in / "found.json").write_text(json.dumps(found))
        parallel.barrier()
        os._exit(0)
    results: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        results["1"] = measure(SingleProcess(), Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "sparring.parallel.torchrun", "2", "1", f"{folder}/note"]
        subprocess.run([*launcher, str(Path(__file__).resolve()), f"--rank-in={folder}"], check=True)
        results["2"] = json.loads(Path(folder, "found.json").read_text())
    text = json.dumps(results, indent=1) + "\n"
    print(text, end="")
    if wanted.out:
        wanted.out.write_text(text)


if __name__ == "__main__":
    main()
