"""Simulates where the loop stops scaling: 10 million prompts on 1 to 512 nodes that fail.

The costs of the coordinating process (reading rows, planning and committing parts, rereading them) are measured with
the real code on this machine, in CPU seconds and seconds of waiting for the disk. GPU rates are those of `sparring
plan`. Failure rates, restart times and network speed are assumptions, and are printed with the result.

    python benchmarks/scale.py --out benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import os
import platform
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparring.commands.plan import GPUS, ModelSize, RowTokens, Speed, gpu_speed, score_flops, train_flops
from sparring.data.tables import read_generations, write_generations, write_rows
from sparring.recipe.schema import Recipe
from sparring.run.iteration import DataSummary, Iteration
from sparring.run.manifest import begin_work, commit, commit_folder, commit_part, has_part, verify
from sparring.run.rundir import RunDir
from sparring.stages.generate import plan_parts
from sparring.types import Generation, Rendered

PROMPTS = 10_000_000
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT_TOKENS, ANSWER_TOKENS = 150, 256
GPU, GPUS_PER_NODE = "h100", 8
LENGTHS = RowTokens(PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS)
MISTRAL_7B = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Assumptions:
    hours_between_failures: float = 1000.0  # of a node
    node_returns_seconds: float = 600.0
    engine_starts_seconds: float = 120.0
    part_spread: float = 0.15  # of the time of a part, relative, one standard deviation
    training_restarts_seconds: float = 300.0
    checkpoint_seconds: float = 300.0  # the default of train.checkpoint_minutes
    copy_bytes_per_second: float = 5e9  # a rank's part of a checkpoint into CPU memory; a thread writes it to disk
    network_bytes_per_second: float = 50e9  # into a node (400 Gb/s), for the gradients


@dataclass(frozen=True)
class Costs:
    """Costs of the coordinating process in CPU seconds. `wait_part` is waiting for the disk."""

    read_row: float
    cut_prompt: float
    commit_part: float
    wait_part: float
    has_part: float
    ray_part: float  # receiving a part from an actor and assigning the next one
    reread_answer: float
    commit_folder_part: float
    row_bytes: float  # resident memory: a row, its request, its answer
    prompt_bytes: float
    answer_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=20_480, help="rows that the costs are measured on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        costs = measure(Path(folder), arguments.rows)
        Path(folder, "config.json").write_text(json.dumps(MISTRAL_7B))
        work = make_recipe(folder), ModelSize.of(Path(folder), "bfloat16"), LENGTHS
        speed = gpu_speed(GPUS[GPU], *work)
        found = {
            f"failures_every_{hours:g}_hours_of_a_node": simulate_all(costs, speed, Path(folder), Assumptions(hours))
            for hours in (1000.0, 20.0)
        }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("sparring", "ray", "pyarrow", "numpy")},
        "load": round(os.getloadavg()[0], 1),
        "prompts": PROMPTS,
        "rows_measured": arguments.rows,
        "costs": {name: float(f"{value:.3g}") for name, value in asdict(costs).items()},
        "assumptions": asdict(Assumptions())
        | {"gpu": GPU, "gpus_per_node": GPUS_PER_NODE, "model": "7B", "backend": "vllm"},
        **owner(costs, speed.generate),
        **found,
    }
    text = json.dumps(result, indent=1) + "\n"
    text = re.sub(r"\{\n +(\"nodes\"[^}]*?)\n +\}", lambda row: "{" + re.sub(r"\n +", " ", row[1]) + "}", text)
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


# -- measured costs of the coordinating process


@contextmanager
def cpu_seconds(found: dict[str, float], name: str, count: int) -> Iterator[None]:
    gc.collect()
    memory, start, wall = resident_bytes(), time.process_time(), time.perf_counter()
    yield
    found[name] = (time.process_time() - start) / count
    found[f"{name}_wall"] = (time.perf_counter() - wall) / count
    found[f"{name}_bytes"] = (resident_bytes() - memory) / count


def measure(folder: Path, num_rows: int) -> Costs:
    iteration = make_iteration(folder / "run", num_rows)
    found: dict[str, float] = {}
    with cpu_seconds(found, "read", num_rows):
        rows = iteration.train_rows()
    with cpu_seconds(found, "cut", num_rows):
        parts = plan_parts(iteration)
    found["cut"] -= found["read"]  # it reads the rows itself
    del rows
    work = begin_work(iteration.run.work(iteration.stage("generate")), {"data": "0" * 32})
    assert all(path.parent == work for path in parts)
    draw = np.random.default_rng(0)
    answers = {
        path: [Generation(p.id, 0, draw.integers(0, 32000, ANSWER_TOKENS, dtype=np.int32), "stop") for p in wanted]
        for path, wanted in parts.items()
    }
    texts = ["word " * (ANSWER_TOKENS // 2)] * 512
    with cpu_seconds(found, "commit", len(parts)):
        for path, drawn in answers.items():
            commit_part(path, lambda p, a=drawn: write_generations(p, a, texts[: len(a)]))
    found["ray"] = ray_seconds(list(answers.values())[:16], texts)
    del answers
    with cpu_seconds(found, "has", len(parts)):
        assert all(has_part(path) for path in parts)
    with cpu_seconds(found, "reread", num_rows):
        again = read_generations(parts)
    assert len(again) == num_rows
    with cpu_seconds(found, "folder", len(parts)):
        commit_folder(work, iteration.stage("generate"))
    verify(iteration.stage("generate"))
    return Costs(
        read_row=found["read"],
        cut_prompt=found["cut"],
        commit_part=found["commit"],
        wait_part=max(0.0, found["commit_wall"] - found["commit"]),
        has_part=found["has"],
        ray_part=found["ray"],
        reread_answer=found["reread"],
        commit_folder_part=found["folder"],
        row_bytes=found["read_bytes"],
        prompt_bytes=max(0.0, found["cut_bytes"]),
        answer_bytes=found["reread_bytes"],
    )


def make_iteration(root: Path, num_rows: int) -> Iteration:
    """A run with random tokens as rows, and everything that the generate stage reads."""
    run, draw = RunDir(root), np.random.default_rng(0)
    rows = [
        Rendered(
            id=f"{n:032x}",
            row=n + 1,
            prompt_ids=draw.integers(0, 32000, PROMPT_TOKENS, dtype=np.int32),
            real_ids=draw.integers(0, 32000, ANSWER_TOKENS, dtype=np.int32),
            real_finish="stop",
            prompt="word " * (PROMPT_TOKENS // 2),
            real="word " * (ANSWER_TOKENS // 2),
        )
        for n in range(num_rows)
    ]
    with commit(run.data) as folder:
        write_rows(folder / "train.parquet", rows)
        DataSummary("none", "none", num_rows, 0, {}, 0, "</s>", (2,), "", 2048, PROMPT_TOKENS, ANSWER_TOKENS).write(
            folder / "summary.json"
        )
    return Iteration(run, make_recipe("none"), 0)


def make_recipe(model: str) -> Recipe:
    raw = {"model": model, "method": "spin", "data": {"train": "none"}, "generate": {"backend": "vllm"}}
    return Recipe.model_validate(raw)


def ray_seconds(drawn: list[list[Generation]], texts: list[str]) -> float:
    """CPU seconds of this process per part that an actor streams to it."""
    import ray

    class Canned:
        def draw(self, wanted: Any) -> Iterator[tuple[list[Generation], list[str]]]:
            for part in drawn:
                yield part, texts[: len(part)]

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", object_store_memory=2 * 10**8)  # type: ignore[arg-type]
    try:
        actor: Any = ray.remote(Canned).remote()
        for stream in [actor.draw.options(num_returns="streaming").remote([])]:  # warm-up
            for reference in stream:
                ray.get(reference)
        start = time.process_time()
        stream = actor.draw.options(num_returns="streaming").remote(
            [answer.token_ids for part in drawn for answer in part]
        )
        for _ in drawn:
            ray.wait([stream], num_returns=1)
            ray.get(next(stream))
        return (time.process_time() - start) / len(drawn)
    finally:
        ray.shutdown()


# -- simulation of many nodes


def simulate_all(costs: Costs, speed: Speed, model: Path, assumed: Assumptions) -> list[dict[str, float]]:
    recipe = make_recipe(str(model))
    size = ModelSize.of(model, "bfloat16")
    table = []
    for nodes in NODES:
        generating = generate(nodes, costs, speed, assumed, np.random.default_rng(nodes))
        alone = alone_seconds(costs)
        scoring = score_flops(recipe, 0, size, LENGTHS) / (nodes * GPUS_PER_NODE * speed.score)
        flops = train_flops(recipe, 0, size, LENGTHS)
        by_batch = {
            batch: train(nodes, flops, batch, size, speed, assumed, np.random.default_rng(nodes))
            for batch in (64, 1024)
        }
        row = {
            "nodes": nodes,
            "alone_hours": alone / 3600,
            "generate_hours": generating["seconds"] / 3600,
            "owner_busy": generating["owner_busy"],
            "engines_busy": generating["engines_busy"],
            "parts_drawn_again": generating["again"],
            "score_hours": scoring / 3600,
            **{f"train_hours_batch_{batch}": seconds / 3600 for batch, seconds in by_batch.items()},
        }
        row["iteration_hours"] = (
            sum(row[f"{n}_hours"] for n in ("alone", "generate", "score")) + row["train_hours_batch_64"]
        )
        table.append({name: round(float(value), 3) for name, value in row.items()})
    first = table[0]
    for row in table:
        for name in ("generate_hours", "iteration_hours"):
            row[name.replace("hours", "efficiency")] = round(first[name] / (row["nodes"] * row[name]), 3)
    return table


def owner(costs: Costs, tokens_per_second: float) -> dict[str, object]:
    """Limits of the coordinating process: memory for rows, requests and answers, and the engines that it can serve."""
    memory = PROMPTS * (2 * costs.row_bytes + costs.prompt_bytes + costs.answer_bytes)
    part_seconds = 512 * ANSWER_TOKENS / tokens_per_second
    cpu = costs.commit_part + costs.ray_part
    return {
        "generate_tokens_per_second_and_gpu": round(tokens_per_second),
        "owner_memory_gib": round(memory / 2**30, 1),
        "nodes_that_one_owner_serves": round(part_seconds / (cpu + costs.wait_part) / GPUS_PER_NODE, 1),
        "nodes_that_it_would_without_waiting_for_the_disk": round(part_seconds / cpu / GPUS_PER_NODE, 1),
    }


def alone_seconds(costs: Costs) -> float:
    """Seconds that more nodes do not shorten: reading rows for three stages, planning and counting parts."""
    parts = PROMPTS / 512
    rows = PROMPTS * (3 * costs.read_row + costs.cut_prompt * 2 + 3 * costs.reread_answer)
    return rows + parts * (costs.has_part + costs.commit_folder_part)


def generate(
    nodes: int, costs: Costs, speed: Speed, assumed: Assumptions, draw: np.random.Generator
) -> dict[str, float]:
    """The pool of stages/generate/ray_pool.py: shrinking leases, one committing process, nodes that fail and return."""
    engines = nodes * GPUS_PER_NODE
    num_parts = -(-PROMPTS // 512)
    part_seconds = 512 * ANSWER_TOKENS / speed.generate
    serve = costs.commit_part + costs.wait_part + costs.ray_part
    todo, done, again = num_parts, 0, 0
    owner_free = owner_busy = worked = 0.0
    alive = [0] * nodes  # restarts of each node; events from before a restart are void
    leases = [0] * engines  # assigned parts that are not committed
    events: list[tuple[float, int, int, int]] = []  # time, kind, engine or node, restarts of its node
    START, PART, FAIL = 0, 1, 2
    for engine in range(engines):
        heapq.heappush(events, (assumed.engine_starts_seconds, START, engine, 0))
    for node in range(nodes):
        heapq.heappush(events, (draw.exponential(3600 * assumed.hours_between_failures), FAIL, node, 0))

    def assign_parts(now: float, engine: int) -> None:
        nonlocal todo
        count = min(todo, -(-todo // (2 * engines)))
        todo -= count
        leases[engine] = count
        if count:
            begin(now, engine)
        else:
            heapq.heappush(events, (now + 1.0, START, engine, alive[engine // GPUS_PER_NODE]))  # a node may still fail

    def begin(now: float, engine: int) -> None:
        length = part_seconds * max(0.3, draw.normal(1.0, assumed.part_spread))
        heapq.heappush(events, (now + length, PART, engine, alive[engine // GPUS_PER_NODE]))

    now = 0.0
    while done < num_parts:
        now, kind, which, restarts = heapq.heappop(events)
        if kind == FAIL:
            alive[which] += 1
            for engine in range(which * GPUS_PER_NODE, (which + 1) * GPUS_PER_NODE):
                todo, again = todo + leases[engine], again + (leases[engine] > 0)
                leases[engine] = 0
                back = now + assumed.node_returns_seconds + assumed.engine_starts_seconds
                heapq.heappush(events, (back, START, engine, alive[which]))
            heapq.heappush(events, (now + draw.exponential(3600 * assumed.hours_between_failures), FAIL, which, 0))
            continue
        if restarts != alive[which // GPUS_PER_NODE]:
            continue
        if kind == START:
            assign_parts(now, which)
            continue
        # parts are committed one by one; an engine with more work does not wait
        owner_free = max(owner_free, now) + serve
        owner_busy += serve
        worked += part_seconds
        done += 1
        leases[which] -= 1
        if leases[which]:
            begin(now, which)
        else:
            assign_parts(owner_free, which)
    end = max(now, owner_free)
    return {
        "seconds": end,
        "owner_busy": owner_busy / end,
        "engines_busy": worked / (end * engines),
        "again": float(again),
    }


def train(
    nodes: int, flops: float, batch: int, size: ModelSize, speed: Speed, assumed: Assumptions, draw: np.random.Generator
) -> float:
    """Seconds for all steps of `batch` prompts on at most as many ranks. A failure restarts from a checkpoint."""
    steps = 2 * PROMPTS // batch
    nodes = max(1, min(nodes, batch // GPUS_PER_NODE))
    ranks = nodes * GPUS_PER_NODE
    # within a node shards travel over NVLink; between nodes float32 gradients are added once per step, after the last
    # backward pass, which hides none of it
    gradient_bytes = 4 * (size.body + 2 * size.head)
    add = 2 * (nodes - 1) / nodes * gradient_bytes / assumed.network_bytes_per_second
    step = flops / steps / (ranks * speed.train) + add
    save = checkpoint_wait(size, assumed)
    between = max(1, int(assumed.checkpoint_seconds / step))
    seconds, at, saved = 0.0, 0, 0
    mean = 3600 * assumed.hours_between_failures / nodes
    until_failure = draw.exponential(mean)
    while at < steps:
        chunk = min(between, steps - at)
        length = chunk * step + save
        if until_failure < length:
            seconds += until_failure + assumed.training_restarts_seconds
            at = saved
            until_failure = draw.exponential(mean)
            continue
        seconds, until_failure = seconds + length, until_failure - length
        at += chunk
        saved = at
    return seconds


def checkpoint_wait(size: ModelSize, assumed: Assumptions) -> float:
    """Seconds that training waits: each GPU of a node copies its part of the weights and of one moment, in float32."""
    return 8 * (size.body + 2 * size.head) / GPUS_PER_NODE / assumed.copy_bytes_per_second


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def processor() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
