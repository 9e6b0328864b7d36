"""The process that runs lm-evaluation-harness on one model and one task: python -m ... REQUEST RESULT

A separate process isolates its seeds, imports and memory. The model is loaded as everywhere in sparring, so adapter,
4-bit base and dtype are the run's. Nothing is cached.
"""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def main() -> None:
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = Path(request["task"]) if request["task"].endswith((".yaml", ".yml")) else None
    if file is not None:  # the user's own task and data: no request leaves this machine
        os.environ |= dict.fromkeys(OFFLINE, "1")
        with suppress(ImportError):  # IFEval's checkers would download its data on import
            import nltk

            nltk.download = lambda *words, **more: False

    import torch
    from lm_eval import evaluator
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager
    from transformers import GenerationConfig

    from sparring.model.load import load_model, load_tokenizer
    from sparring.model.memory import peak_memory_mib
    from sparring.parallel import local_device

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    folder = Path(request["model"])
    dtype = getattr(torch, request["dtype"])
    model = load_model(folder, dtype=dtype, device=local_device(), in_4bit=request["in_4bit"])
    # not the model's own settings, such as a repetition penalty, but the run's end tokens
    model.generation_config = GenerationConfig(eos_token_id=request["end_ids"])
    tokenizer = load_tokenizer(folder)
    if request["chat_template"] is not None:
        tokenizer.chat_template = request["chat_template"]
    manager = TaskManager(include_path=str(file.parent), include_defaults=False) if file else TaskManager()
    wrap, evaluate = cast(Any, huggingface.HFLM), cast(Any, evaluator.simple_evaluate)
    found = evaluate(
        model=wrap(pretrained=model, tokenizer=tokenizer, batch_size=request["batch_size"]),
        tasks=[task_of(file) if file else request["task"]],
        num_fewshot=request["num_shots"],
        limit=request["limit"],
        use_cache=None,
        cache_requests=False,
        apply_chat_template=request["chat_template"] is not None,
        task_manager=manager,
    )
    name = next(iter({**found.get("groups", {}), **found["results"]}))
    answers = [
        {"task": task, "row": sample["doc_id"], "target": sample["target"], "answers": sample["filtered_resps"]}
        | {metric: sample[metric] for metric in sample["metrics"]}
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    result = {
        "metrics": metrics_of({**found["results"], **found.get("groups", {})}[name]),
        "results": {task: metrics_of(values) for task, values in found["results"].items()},
        "versions": found["versions"],
        "num_rows": found["n-samples"],
        "shots": found["n-shot"],
        "peak_memory_mib": peak_memory_mib(local_device()),
        "samples": answers,
    }
    Path(sys.argv[2]).write_text(json.dumps(result, default=str), encoding="utf-8")


def task_of(file: Path) -> str:
    """The task's name in a YAML file, which may contain tags that only the harness can load."""
    named = re.search(r"^(?:task|group):\s*['\"]?([\w.+-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if named is None:
        raise ValueError(f"{file} has no line 'task: NAME'")
    return named.group(1)


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """From {"acc,none": x, "exact_match_stderr,strict": e} to {"acc": x, "exact_match/strict_stderr": e}."""
    found = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        name = metric.removesuffix("_stderr") + (f"/{filtered}" if filtered != "none" else "")
        found[f"{name}_stderr" if metric.endswith("_stderr") else name] = float(value)
    return found


if __name__ == "__main__":
    main()
