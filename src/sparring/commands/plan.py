"""`sparring plan`: forecasts memory, time, disk and cost of a recipe on given GPUs.

Work is counted in FLOPs and bytes from the model's config and the rows. Speeds are a fraction of a GPU's peak, or those
of a measured run. Loads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from sparring.commands.forecast import (
    BYTES,
    UNKNOWN_ARCHITECTURE,
    Forecast,
    empty_model,
    forecast,
    num_training,
    training_bytes,
)
from sparring.errors import UserError
from sparring.model.load import load_tokenizer, resolve_model
from sparring.parallel import local_device
from sparring.recipe.schema import Recipe
from sparring.report.bars import format_duration
from sparring.run.disk import format_bytes
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.rundir import RunDir
from sparring.run.session import load_sealed_recipe
from sparring.stages.generate.hf import BATCH_SIZE
from sparring.stages.prepare import DataReader, make_renderer

MAX_ROWS = 2000
"""Rows to tokenize for the mean lengths."""


@dataclass(frozen=True)
class Gpu:
    memory_bytes: float
    flops: float  # per second, dense, bfloat16
    bandwidth: float  # bytes per second


# from the manufacturers' data sheets
GPUS = {
    "a100-40": Gpu(40e9, 312e12, 1.555e12),
    "a100": Gpu(80e9, 312e12, 2.039e12),
    "l40s": Gpu(48e9, 362e12, 0.864e12),
    "h100": Gpu(80e9, 989e12, 3.35e12),
    "h200": Gpu(141e9, 989e12, 4.8e12),
    "b200": Gpu(180e9, 2250e12, 7.7e12),
}

TRAIN, SCORE = 0.40, 0.45
"""Fractions of peak FLOP/s for training and scoring. Well-tuned trainers of 7B models report 0.4 to 0.5."""
BANDWIDTH = 0.40
"""Fraction of memory bandwidth that vLLM reaches when it decodes. Published rates are between 0.2 and 0.4."""
LAYER_SECONDS = 1 / 25.5 / 32
"""Minimum time per layer and decoding step of transformers' generate, which waits for Python: 25.5 tokens/s at batch
size 1 with the 32 layers of Llama 7B on an A100 (pytorch.org/blog/accelerating-generative-ai-2)."""
MAX_NUM_SEQS = 256
"""Sequences that vLLM decodes concurrently by default."""


@dataclass(frozen=True)
class RowTokens:
    """Number of rows, and mean tokens of each part."""

    rows: int
    prompt: float
    real: float
    generated: float


@dataclass(frozen=True)
class ModelSize:
    """The sizes that determine a model's work, from its config."""

    body: int  # weights that every token uses
    head: int  # weights that only response tokens use
    layers: int
    width: int
    kv_bytes: float  # per token, keys and values
    weight_bytes: float

    @staticmethod
    def of(folder: Path, dtype: str) -> ModelSize:
        model = empty_model(folder)
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight.numel()  # type: ignore[union-attr]
        output: Any = model.get_output_embeddings()
        parameters = sum(p.numel() for p in model.parameters())
        is_tied = output is None or output.weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
        heads = config.num_attention_heads
        kv_width = getattr(config, "num_key_value_heads", heads) * (
            getattr(config, "head_dim", None) or config.hidden_size // heads
        )
        return ModelSize(
            body=parameters - embedding * (1 if is_tied else 2),
            head=embedding,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            kv_bytes=2.0 * config.num_hidden_layers * kv_width * BYTES[dtype],
            weight_bytes=float(parameters * BYTES[dtype]),
        )

    def forward_flops(self, prompt: float, responses: Sequence[float]) -> float:
        """Of a prompt packed with its responses: 2 per weight and token, plus attention over visible keys."""
        tokens = sum(responses)
        visible = prompt**2 / 2 + sum(r * (prompt + r / 2) for r in responses)
        return 2.0 * self.body * (prompt + tokens) + 2.0 * self.head * tokens + 4.0 * self.layers * self.width * visible


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of the stages of one iteration, on all devices together."""

    generate: float
    score: float
    train: float

    @property
    def total(self) -> float:
        return self.generate + self.score + self.train


@dataclass(frozen=True)
class Plan:
    forecast: Forecast
    generate_bytes: float  # memory per device: weights and the KV cache
    iterations: tuple[StageSeconds, ...]
    disk_bytes: float
    gpus: int

    @property
    def gpu_hours(self) -> float:
        return self.gpus * sum(seconds.total for seconds in self.iterations) / 3600


@dataclass(frozen=True)
class Speed:
    """Throughput of one device with one model."""

    generate: float  # response tokens per second
    score: float  # FLOP per second
    train: float  # FLOP per second


def gpu_speed(gpu: Gpu, recipe: Recipe, size: ModelSize, tokens: RowTokens) -> Speed:
    """Estimates a device's throughput. A decoding step reads the weights and the KV cache of all concurrent sequences.

    `hf` waits for Python, and decodes a batch until its longest response ends, assumed to take max_new_tokens steps.
    The other engines refill the batch as responses end.
    """
    settings, batch_size = recipe.generate, sampling_batch_size(recipe, size, tokens, gpu)
    tp = settings.tensor_parallel_size
    read = size.weight_bytes / tp + batch_size * (tokens.prompt + tokens.generated / 2) * size.kv_bytes / tp
    step = read / (gpu.bandwidth * BANDWIDTH)
    steps = tokens.generated
    if settings.backend == "hf":
        step, steps = max(step, size.layers * LAYER_SECONDS), settings.max_new_tokens
    prefill = size.forward_flops(tokens.prompt, []) / (gpu.flops * SCORE * tp)
    return Speed(
        generate=tokens.generated / (steps * step / batch_size + prefill) / tp,
        score=gpu.flops * SCORE,
        train=gpu.flops * TRAIN,
    )


def measured_speed(run_dir: Path, size: ModelSize) -> Speed:
    """A device's throughput in iteration 0 of a run with the same model, from the seconds in its manifests."""
    run = RunDir(run_dir)
    if not run.recipe.is_file() or not is_committed(run.stage(0, "train")):
        raise UserError(f"--measured {run_dir}: not a run that has finished iteration 0.")
    iteration = Iteration(run, load_sealed_recipe(run.recipe).at(0), 0)
    recipe, data = iteration.recipe, iteration.data
    if ModelSize.of(Path(data.model), recipe.train.dtype) != size:
        raise UserError(f"--measured {run_dir}: its model differs from the recipe's. Give a run of the same model.")
    done = [name for name in iteration.stages if is_committed(iteration.stage(name))]
    infos: dict[str, Any] = {name: read_manifest(iteration.stage(name)).info for name in done}
    generation = infos.get("generate")
    generated = generation["tokens"] / generation["answers"] if generation else data.mean_real_tokens
    tokens = RowTokens(data.num_train, data.mean_prompt_tokens, data.mean_real_tokens, generated)
    train = train_flops(recipe, 0, size, tokens) / infos["train"]["seconds"]
    return Speed(
        generate=generation["tokens"] / generation["seconds"] if generation else math.inf,
        score=score_flops(recipe, 0, size, tokens) / infos["score"]["seconds"] if "score" in infos else train,
        train=train,
    )


def plan(recipe: Recipe, folder: Path, tokens: RowTokens, gpus: int, speed: Speed, gpu: Gpu | None) -> Plan:
    size = ModelSize.of(folder, recipe.train.dtype)
    needs = forecast(recipe, folder, tokens.rows)
    iterations = []
    for index in range(recipe.iterations):
        settings = recipe.at(index)
        generated = tokens.rows * settings.generate.samples * tokens.generated if settings.method.needs.rounds else 0.0
        trainers = min(gpus, settings.train.batch_size)  # a rank needs at least one prompt per step
        iterations.append(
            StageSeconds(
                generate=generated / (gpus * speed.generate),
                score=score_flops(settings, index, size, tokens) / (gpus * speed.score),
                train=train_flops(settings, index, size, tokens) / (trainers * speed.train),
            )
        )
    batch_size = sampling_batch_size(recipe, size, tokens, gpu)
    # token ids of 4 bytes, and text of about the same size
    per_response = tokens.generated * 8 + 64 if recipe.method.needs.rounds else 0
    if (teacher := recipe.method.needs.teacher) is not None:  # its candidates, and its log-probs of them
        per_response += tokens.generated * 4 * (1 + 2 * teacher.candidates)
    kv_cache = batch_size * (tokens.prompt + recipe.generate.max_new_tokens) * size.kv_bytes
    return Plan(
        forecast=needs,
        generate_bytes=(size.weight_bytes + kv_cache) / recipe.generate.tensor_parallel_size,
        iterations=tuple(iterations),
        disk_bytes=needs.disk_bytes + recipe.iterations * tokens.rows * recipe.generate.samples * per_response,
        gpus=gpus,
    )


def sampling_batch_size(recipe: Recipe, size: ModelSize, tokens: RowTokens, gpu: Gpu | None) -> int:
    """The recipe's batch size. For vLLM and servers it is also limited by the memory beside the weights."""
    settings = recipe.generate
    if settings.backend == "hf":
        return settings.batch_size or BATCH_SIZE
    requested = settings.batch_size or MAX_NUM_SEQS
    if gpu is None:
        return requested
    cache_bytes = settings.tensor_parallel_size * gpu.memory_bytes * settings.gpu_memory_utilization - size.weight_bytes
    return max(1, min(requested, int(cache_bytes / ((tokens.prompt + tokens.generated) * size.kv_bytes))))


def score_flops(recipe: Recipe, index: int, size: ModelSize, tokens: RowTokens) -> float:
    if not recipe.method.needs.opponent:
        return 0.0
    shown = tokens.real if recipe.method.needs.teacher else 0.0  # to the teacher, in its prompt
    group = size.forward_flops(tokens.prompt + shown, response_tokens(recipe, tokens))
    return tokens.rows * num_rounds(recipe, index) * group


def train_flops(recipe: Recipe, index: int, size: ModelSize, tokens: RowTokens) -> float:
    """The backward pass costs two forward passes, and gradient checkpointing adds one."""
    passes = 4 if recipe.train.gradient_checkpointing else 3
    group = size.forward_flops(tokens.prompt, response_tokens(recipe, tokens))
    return passes * recipe.train.epochs * tokens.rows * num_rounds(recipe, index) * group


def num_rounds(recipe: Recipe, index: int) -> int:
    """How many iterations' responses iteration `index` trains on."""
    return max(1, min(recipe.method.needs.rounds, index + 1))


def response_tokens(recipe: Recipe, tokens: RowTokens) -> list[float]:
    """Tokens of each response that the objective reads for one prompt."""
    by_role = {
        "real": [tokens.real],
        "generated": recipe.generate.samples * [tokens.generated],
        "proto": [tokens.generated],
        "rejected": [tokens.real],
    }
    return [count for role in recipe.method.needs.roles for count in by_role[role]]


def measure_rows(recipe: Recipe, rows: int | None, means: tuple[float, float] | None) -> tuple[Path, RowTokens]:
    """The model's folder, and the tokens of its rows. With `rows` and `means` it reads the config only."""
    if means is not None and (rows or recipe.data.limit):
        folder, (prompt, real) = find_config(recipe.model), means
        count = rows or recipe.data.limit or 0
        generated = min(real, recipe.generate.max_new_tokens)
        real = generated if recipe.data.truncate_real else real
    else:
        folder = resolve_model(recipe.model)
        reader = DataReader(recipe, make_renderer(recipe, folder, load_tokenizer(folder)))
        sample = [one.row for one in reader.read(recipe.data.train, MAX_ROWS)]
        prompt = sum(len(row.prompt_ids) for row in sample) / len(sample)
        real = sum(len(row.real_ids) for row in sample) / len(sample)
        count = rows or recipe.data.limit or len(sample)
        generated = min(real, recipe.generate.max_new_tokens)
    return folder, RowTokens(num_training(recipe, count), prompt, real, generated)


def find_config(name: str) -> Path:
    """The folder with a model's config. From the Hub it downloads nothing else."""
    folder = Path(name).resolve()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.count("/") != 1:
        raise UserError(f"model: {folder} has no config.json.")
    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model: the config of '{name}' cannot be downloaded: {error}. Set model to a local folder."
        ) from error


def format_plan(
    result: Plan,
    train_bytes: float | None,
    tokens: RowTokens,
    speed: Speed,
    name: str,
    gpu: Gpu | None,
    price: float | None,
) -> Iterator[str]:
    """The plan and its assumptions, as lines of text. `train_bytes`: memory per device; None if it is unknown."""
    needs = result.forecast
    yield f"{needs.num_parameters:,} parameters, {needs.num_trained:,} trained; {tokens.rows:,} training rows"
    for purpose, size in (("training", train_bytes), ("generation", result.generate_bytes)):
        if size is None:
            yield f"Memory per device, {purpose}: cannot be forecast for this architecture"
            continue
        limit = "" if gpu is None else f" of {format_bytes(gpu.memory_bytes)}"
        fits = "" if gpu is None or size < 0.95 * gpu.memory_bytes else "  DOES NOT FIT"
        yield f"Memory per device, {purpose}: {format_bytes(size)}{limit}{fits}"
    for index, seconds in enumerate(result.iterations):
        stages = ", ".join(f"{s} {format_duration(getattr(seconds, s))}" for s in ("generate", "score", "train"))
        yield f"Iteration {index}: {format_duration(seconds.total)} ({stages})"
    cost = "" if price is None else f", ${price * result.gpu_hours:,.0f} at ${price:.2f} per GPU-hour"
    total = format_duration(result.gpu_hours * 3600 / result.gpus)
    yield f"Total: {total} on {result.gpus} x {name}, {result.gpu_hours:,.1f} GPU-hours{cost}"
    yield f"Disk: {format_bytes(result.disk_bytes)}"
    yield "Assumptions:"
    yield f"  Mean tokens: prompt {tokens.prompt:.0f}, real {tokens.real:.0f}, generated {tokens.generated:.0f}"
    yield f"  Generation per device: {speed.generate:,.0f} tokens/s"
    yield f"  Scoring per device: {speed.score:.3g} FLOP/s; training: {speed.train:.3g} FLOP/s"
    if gpu is not None:
        yield f"    from {SCORE:.0%} and {TRAIN:.0%} of peak FLOP/s, {BANDWIDTH:.0%} of bandwidth when decoding, and at"
        yield f"    least {LAYER_SECONDS * 1e3:.1f} ms per layer and step with hf. After one iteration,"
        yield "    --measured RUN_DIR replaces them with measured speeds."
    yield "  All stages use all devices. Startup, loading, evaluation and failures are not included."


def print_plan(
    recipe: Recipe,
    gpus: int,
    name: str | None,
    measured: Path | None,
    rows: int | None,
    tokens: str | None,
    price: float | None,
) -> None:
    """Prints the plan. Exactly one of `name` (--gpu) and `measured` sets the speed of a device."""
    if (name is None) == (measured is None):
        raise UserError(f"Set the speed of a device with either --gpu {'|'.join(GPUS)} or --measured RUN_DIR.")
    if name is not None and name not in GPUS:
        raise UserError(
            f"--gpu {name}: unknown GPU. Use one of {', '.join(GPUS)}, or --measured RUN_DIR for any device."
        )
    means = None
    if tokens is not None:
        try:
            prompt, response = (float(part) for part in tokens.split(","))
        except ValueError as error:
            raise UserError(f"--tokens {tokens}: not two numbers. Write PROMPT,RESPONSE, such as 150,250.") from error
        means = prompt, response
    folder, row_tokens = measure_rows(recipe, rows, means)
    size = ModelSize.of(folder, recipe.train.dtype)
    gpu = None if name is None else GPUS[name]
    if measured is not None:
        speed = measured_speed(measured, size)
    else:
        speed = gpu_speed(GPUS[str(name)], recipe, size, row_tokens)
    result = plan(recipe, folder, row_tokens, gpus, speed, gpu)
    try:
        train_bytes = training_bytes(recipe, folder, local_device().type if gpu is None else "cuda", gpus)
    except UNKNOWN_ARCHITECTURE:
        train_bytes = None
    for line in format_plan(result, train_bytes, row_tokens, speed, name or f"device of {measured}", gpu, price):
        print(line)
