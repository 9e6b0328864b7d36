"""Benchmarks of lm-evaluation-harness. Each is a stage of its iteration and runs in its own process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparring.data.render import chat_template_of
from sparring.errors import UserError
from sparring.model.load import load_tokenizer
from sparring.parallel.processes import guarded_process
from sparring.recipe.benchmarks import Task
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, write_json
from sparring.run.rundir import BENCHMARKS


def benchmark(iteration: Iteration, task: Task, label: str) -> None:
    """Writes benchmarks/LABEL/: metrics.json, results.json with the subtasks of a group, samples.jsonl.

    Measures the policy whose digest the manifest has; reuses nothing from other iterations.
    """
    start = time.monotonic()
    settings = iteration.recipe.evaluate.harness
    assert settings is not None
    require_lm_eval()
    file = task_file(task)
    input_digests = iteration.run.input_digests(iteration.policy, *([file] if file else []))
    result = run_in_subprocess(
        {
            "model": str(iteration.policy),
            "task": str(file) if file else task.name,
            "num_shots": task.num_shots,
            "limit": settings.limit,
            "batch_size": 8,
            "dtype": iteration.recipe.weights_dtype,
            "in_4bit": iteration.recipe.in_4bit,
            "end_ids": list(iteration.data.end_ids),
            "chat_template": template(iteration) if settings.apply_chat_template else None,
            "threads": iteration.recipe.threads,
        }
    )
    samples, metrics = result.pop("samples"), result.pop("metrics")
    memory = result.pop("peak_memory_mib")
    info = {"seconds": time.monotonic() - start, "peak_memory_mib": memory, "rows": len(samples)}
    with commit(iteration.stage(f"{BENCHMARKS}/{label}"), input_digests=input_digests, info=info) as folder:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "results.json", result)
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")


def require_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.harness: lm-evaluation-harness is not installed. Run pip install 'sparring[lm-eval]'."
        )


def task_file(task: Task) -> Path | None:
    if not task.name.endswith((".yaml", ".yml")):
        return None
    file = Path(task.name).resolve()
    if not file.is_file():
        raise UserError(
            f"evaluate.harness.tasks: there is no file {file}. Relative paths start at the working directory."
        )
    return file


def template(iteration: Iteration) -> str:
    """The run's chat template, so that the harness prompts as the run does."""
    tokenizer = load_tokenizer(iteration.policy)
    found = chat_template_of(iteration.recipe.template, tokenizer, iteration.data.end_token)
    assert found is not None  # the data stage used it
    return found


def run_in_subprocess(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "request.json", Path(place) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        words = [sys.executable, "-m", "sparring.stages.evaluate.harness_process", str(asked), str(answered)]
        with (Path(place) / "log").open("w+b") as log:
            with guarded_process(words, log) as process:
                process.wait()
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        if not answered.is_file():
            raise UserError(
                f"evaluate.harness: {request['task']} of {request['model']} ended with status {process.returncode}:\n  "
                + "\n  ".join(said[-3:])
                + "\nTasks other than your own files download their data from the hub."
            )
        return json.loads(answered.read_text(encoding="utf-8"))
