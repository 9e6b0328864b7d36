"""`sparring plan`: what a recipe would take on given GPUs. From the model's config, the rows, and rates that are shown.

Work is counted in FLOPs and bytes, as sparring does it; rates are a share of a GPU's peak, or those of a run that has
been measured. Nothing but a config is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from sparring.commands.forecast import BYTES, Forecast, empty_model, forecast, num_training
from sparring.errors import UserError
from sparring.model.load import load_tokenizer, resolve_model
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.rundir import RunDir
from sparring.run.session import load_sealed_recipe
from sparring.stages.generate.hf import BATCH_SIZE
from sparring.stages.prepare import DataReader, make_renderer

MAX_ROWS = 2000
"""Rows whose lengths are looked at."""
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    memory_bytes: float
    flops: float  # per second, dense, bfloat16
    bandwidth: float  # bytes per second


# the makers' data sheets
GPUS = {
    "a100-40": Gpu(40e9, 312e12, 1.555e12),
    "a100": Gpu(80e9, 312e12, 2.039e12),
    "l40s": Gpu(48e9, 362e12, 0.864e12),
    "h100": Gpu(80e9, 989e12, 3.35e12),
    "h200": Gpu(141e9, 989e12, 4.8e12),
    "b200": Gpu(180e9, 2250e12, 7.7e12),
}


TRAIN, SCORE = 0.40, 0.45
"""Shares of the peak taken for training and scoring; well-tuned trainers of 7B models report 0.4 to 0.5."""
BANDWIDTH = 0.40
"""Share of the bandwidth that vLLM is taken to reach when it draws; published rates lie between 0.2 and 0.4."""
LAYER_SECONDS = 1 / 25.5 / 32
"""For so long transformers' generate waits for Python, per layer and step: 25.5 tokens/s at batch 1 with the 32 layers
of Llama 7B on an A100, where PyTorch's gpt-fast begins (pytorch.org/blog/accelerating-generative-ai-2)."""
MAX_NUM_SEQS = 256
"""Answers that vLLM draws at a time: its default."""


@dataclass(frozen=True)
class RowTokens:
    rows: int
    prompt: float  # mean, tokens
    real: float
    generated: float


@dataclass(frozen=True)
class ModelSize:
    """A model as work: counts of weights, sizes, taken from its config."""

    body: int  # weights that every position goes through
    head: int  # weights that response positions go through beside them
    layers: int
    width: int
    kv_bytes: float  # per position, both keys and values
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
        """Of a prompt and its responses in a shared row: 2 per weight and position, and attention over visible keys."""
        tokens = sum(responses)
        visible = prompt**2 / 2 + sum(r * (prompt + r / 2) for r in responses)
        return 2.0 * self.body * (prompt + tokens) + 2.0 * self.head * tokens + 4.0 * self.layers * self.width * visible


@dataclass(frozen=True)
class Stages:
    """Of one iteration, in seconds on all devices together."""

    generate: float
    score: float
    train: float

    @property
    def total(self) -> float:
        return self.generate + self.score + self.train


@dataclass(frozen=True)
class Plan:
    needs: Forecast
    train_bytes: float  # of memory, per device
    generate_bytes: float  # weights and the answers that are drawn at a time
    iterations: tuple[Stages, ...]
    disk_bytes: float
    gpus: int

    @property
    def gpu_hours(self) -> float:
        return self.gpus * sum(stages.total for stages in self.iterations) / 3600


@dataclass(frozen=True)
class Speed:
    """Of one device, with one model."""

    generate: float  # answer tokens per second
    score: float  # FLOP per second
    train: float


def gpu_speed(gpu: Gpu, recipe: Recipe, size: ModelSize, lengths: RowTokens) -> Speed:
    """A decode step reads the weights and the keys and values of all answers that are drawn at a time.

    `hf` waits for Python, and draws a batch until its longest answer ends, taken for max_new_tokens steps; the others
    refill as answers end.
    """
    settings, batch_size = recipe.generate, sampling_batch_size(recipe, size, lengths, gpu)
    tp = settings.tensor_parallel_size
    read = size.weight_bytes / tp + batch_size * (lengths.prompt + lengths.generated / 2) * size.kv_bytes / tp
    step = read / (gpu.bandwidth * BANDWIDTH)
    steps = lengths.generated
    if settings.backend == "hf":
        step, steps = max(step, size.layers * LAYER_SECONDS), settings.max_new_tokens
    prefill = size.forward_flops(lengths.prompt, []) / (gpu.flops * SCORE * tp)
    return Speed(
        generate=lengths.generated / (steps * step / batch_size + prefill) / tp,
        score=gpu.flops * SCORE,
        train=gpu.flops * TRAIN,
    )


def measured_speed(run_dir: Path, size: ModelSize) -> Speed:
    """What a device reached in iteration 0 of a run with the same model: its manifests' seconds, its rows' work."""
    run = RunDir(run_dir)
    if not run.recipe.is_file() or not is_committed(run.stage(0, "train")):
        raise UserError(f"--measured {run_dir}: it is no run that has finished its iteration 0")
    iteration = Iteration(run, load_sealed_recipe(run.recipe).at(0), 0)
    recipe, data = iteration.recipe, iteration.data
    theirs = ModelSize.of(Path(data.model), recipe.train.dtype)
    if theirs != size:
        raise UserError(
            f"--measured {run_dir}: its model has other sizes than the recipe's, and rates are of one model"
        )
    done = [name for name in iteration.stages if is_committed(iteration.stage(name))]
    infos: dict[str, Any] = {name: read_manifest(iteration.stage(name)).info for name in done}
    drawn = infos.get("generate")
    generated = drawn["tokens"] / drawn["answers"] if drawn else data.mean_real_tokens
    lengths = RowTokens(data.num_train, data.mean_prompt_tokens, data.mean_real_tokens, generated)
    train = train_flops(recipe, 0, size, lengths) / infos["train"]["seconds"]
    return Speed(
        generate=drawn["tokens"] / drawn["seconds"] if drawn else math.inf,
        score=score_flops(recipe, 0, size, lengths) / infos["score"]["seconds"] if "score" in infos else train,
        train=train,
    )


def plan(
    recipe: Recipe, folder: Path, lengths: RowTokens, gpus: int, speed: Speed, gpu: Gpu | None, *, parallel: str
) -> Plan:
    """`parallel`: as in the recipe, for devices that train together, however they are started."""
    size = ModelSize.of(folder, recipe.train.dtype)
    needs = forecast(recipe, folder, lengths.rows)
    iterations = []
    for index in range(recipe.iterations):
        now = recipe.at(index)
        tokens = lengths.rows * now.generate.samples * lengths.generated if now.method.needs.rounds else 0.0
        trainers = min(gpus, now.train.batch_size)  # a step cannot be cut finer than its prompts
        iterations.append(
            Stages(
                generate=tokens / (gpus * speed.generate),
                score=score_flops(now, index, size, lengths) / (gpus * speed.score),
                train=train_flops(now, index, size, lengths) / (trainers * speed.train),
            )
        )
    batch_size = sampling_batch_size(recipe, size, lengths, gpu)
    # ids of 4 bytes, and text of about that size
    answers = lengths.rows * recipe.generate.samples * (lengths.generated * 8 + 64) if recipe.method.needs.rounds else 0
    kept = batch_size * (lengths.prompt + recipe.generate.max_new_tokens) * size.kv_bytes
    return Plan(
        needs=needs,
        train_bytes=needs.state_on_each(parallel, gpus) + needs.work_bytes,
        generate_bytes=(size.weight_bytes + kept) / recipe.generate.tensor_parallel_size,
        iterations=tuple(iterations),
        disk_bytes=needs.disk_bytes + recipe.iterations * answers,
        gpus=gpus,
    )


def sampling_batch_size(recipe: Recipe, size: ModelSize, lengths: RowTokens, gpu: Gpu | None) -> int:
    """The recipe's batch; with vLLM and a server it is limited by the memory that the weights leave, too."""
    settings = recipe.generate
    if settings.backend == "hf":
        return settings.batch_size or BATCH_SIZE
    wanted = settings.batch_size or MAX_NUM_SEQS
    if gpu is None:
        return wanted
    room = settings.tensor_parallel_size * gpu.memory_bytes * settings.gpu_memory_utilization - size.weight_bytes
    return max(1, min(wanted, int(room / ((lengths.prompt + lengths.generated) * size.kv_bytes))))


def score_flops(recipe: Recipe, index: int, size: ModelSize, lengths: RowTokens) -> float:
    needs = recipe.method.needs
    if not needs.opponent:
        return 0.0
    group = size.forward_flops(lengths.prompt, responses(recipe, lengths))
    return lengths.rows * rounds_of(recipe, index) * group


def train_flops(recipe: Recipe, index: int, size: ModelSize, lengths: RowTokens) -> float:
    """Backward is twice forward, and checkpointing computes forward once more."""
    passes = 4 if recipe.train.gradient_checkpointing else 3
    group = size.forward_flops(lengths.prompt, responses(recipe, lengths))
    return passes * recipe.train.epochs * lengths.rows * rounds_of(recipe, index) * group


def rounds_of(recipe: Recipe, index: int) -> int:
    """How many rounds of answers iteration `index` plays with."""
    return max(1, min(recipe.method.needs.rounds, index + 1))


def responses(recipe: Recipe, lengths: RowTokens) -> list[float]:
    tokens = {
        "real": [lengths.real],
        "generated": recipe.generate.samples * [lengths.generated],
        "proto": [lengths.generated],
        "rejected": [lengths.real],
    }
    return [count for role in recipe.method.needs.roles for count in tokens[role]]


def measure_rows(recipe: Recipe, rows: int | None, tokens: tuple[float, float] | None) -> tuple[Path, RowTokens]:
    """The model's folder and the rows' lengths. Reads the rows unless both are given: then a config is enough."""
    if tokens is not None and (rows or recipe.data.limit):
        prompt, answer = tokens
        generated = min(answer, recipe.generate.max_new_tokens)
        real = generated if recipe.data.truncate_real else answer
        return config_folder(recipe.model), RowTokens(
            num_training(recipe, rows or recipe.data.limit or 0), prompt, real, generated
        )
    folder = resolve_model(recipe.model)
    found = DataReader(recipe, make_renderer(recipe, folder, load_tokenizer(folder))).read(recipe.data.train, MAX_ROWS)
    prompt, real = (
        sum(lengths) / len(found)
        for lengths in zip(*((len(r.prompt_ids), len(r.real_ids)) for _, r in found), strict=True)
    )
    count = rows or recipe.data.limit or len(found)
    generated = min(real, recipe.generate.max_new_tokens)
    return folder, RowTokens(num_training(recipe, count), prompt, real, generated)


def config_folder(name: str) -> Path:
    """Where the config of a model is; of the hub's, nothing else is fetched."""
    folder = Path(name).resolve()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.count("/") != 1:
        raise UserError(f"model: {folder} has no config.json")
    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"model: the hub did not give the config of '{name}': {error}. Pass model=FOLDER") from error


def lines(
    recipe: Recipe, found: Plan, lengths: RowTokens, speed: Speed, name: str, gpu: Gpu | None, price: float | None
) -> Iterator[str]:
    """The plan, and what it rests on, for people."""
    needs, gpus = found.needs, found.gpus
    yield f"{needs.num_parameters:,} parameters, {needs.num_trained:,} trained; {lengths.rows:,} training rows"
    room = "" if gpu is None else f" of {gpu.memory_bytes / GIB:.0f}"
    for what, size in (("training", found.train_bytes), ("generation", found.generate_bytes)):
        fits = "" if gpu is None or size < 0.95 * gpu.memory_bytes else "  DOES NOT FIT"
        yield f"memory per device, {what}: {size / GIB:.1f}{room} GiB{fits}"
    for index, stages in enumerate(found.iterations):
        parts = ", ".join(f"{n} {getattr(stages, n) / 3600:.2f} h" for n in ("generate", "score", "train"))
        yield f"iteration {index}: {parts}; {stages.total / 3600:.2f} h"
    cost = "" if price is None else f", {price * found.gpu_hours:,.0f} at {price:g} per GPU-hour"
    yield f"all: {found.gpu_hours / gpus:.1f} h on {gpus} x {name}, {found.gpu_hours:,.1f} GPU-hours{cost}"
    yield f"disk: {found.disk_bytes / GIB:.1f} GiB"
    yield "assumed:"
    means = f"prompt {lengths.prompt:.0f}, real answer {lengths.real:.0f}, generated {lengths.generated:.0f}"
    yield f"  tokens per row: {means}"
    yield f"  answer tokens/s of a device: {speed.generate:,.0f}"
    yield f"  FLOP/s of a device: scoring {speed.score:.3g}, training {speed.train:.3g}"
    if gpu is not None:
        yield f"    {SCORE:.0%} and {TRAIN:.0%} of its peak; drawing reads at {BANDWIDTH:.0%} of its bandwidth, and"
        yield f"    a step of hf takes {LAYER_SECONDS * 1e3:.1f} ms per layer at least. After an iteration was played,"
        yield "    --measured RUN_DIR takes what it reached in place of these"
    yield "  every stage is shared out to all devices; start-up, loading, evaluation and failures are not counted"


def print_plan(
    recipe: Recipe,
    gpus: int,
    name: str | None,
    measured: Path | None,
    rows: int | None,
    tokens: str | None,
    price: float | None,
) -> None:
    """The command: either --gpu or --measured says how fast a device is."""
    if (name is None) == (measured is None):
        raise UserError(f"say how fast a device is: --gpu {' | '.join(GPUS)}, or --measured RUN_DIR")
    if name is not None and name not in GPUS:
        raise UserError(f"--gpu {name} is not known; known are {', '.join(GPUS)}; --measured RUN_DIR takes any device")
    try:
        means = tuple(float(part) for part in tokens.split(",")) if tokens is not None else None
        wanted = None if means is None else (means[0], means[1])
    except (ValueError, IndexError) as error:
        raise UserError(f"--tokens {tokens}: write two numbers with a comma between, such as 150,250") from error
    folder, lengths = measure_rows(recipe, rows, wanted)
    size = ModelSize.of(folder, recipe.train.dtype)
    gpu = None if name is None else GPUS[name]
    speed = (
        measured_speed(measured, size) if measured is not None else gpu_speed(GPUS[str(name)], recipe, size, lengths)
    )
    found = plan(recipe, folder, lengths, gpus, speed, gpu, parallel=recipe.parallel)
    for line in lines(recipe, found, lengths, speed, name or f"device of {measured}", gpu, price):
        print(line)
