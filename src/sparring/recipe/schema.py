"""The recipe: strict pydantic models of every setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator
from pydantic import model_validator as validator
from pydantic.config import JsonDict

from sparring.objectives import OBJECTIVES
from sparring.recipe.benchmarks import Task, parse_tasks
from sparring.recipe.yaml import set_key
from sparring.types import NonNegative, Objective, Positive, Share


@cache
def has_bfloat16_products() -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    A CPU without AVX-512-BF16, AMX or Arm's equivalent converts to float32 and is slower than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def resolve_dtype() -> Literal["bfloat16", "float32"]:
    """What `auto` is: bfloat16 on hardware that accelerates it, otherwise float32."""
    return "bfloat16" if has_bfloat16_products() else "float32"


Probability = Annotated[float, Field(gt=0, le=1)]

MAY_CHANGE: JsonDict = {"may_change": True}
"""Marks a setting that changes no result: a run may continue with another value."""


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        alias_generator=lambda name: name.rstrip("_"),  # `lambda` is a Python keyword
    )


class Data(Strict):
    train: str
    """A .jsonl, .json, .parquet or .csv file, a folder saved by `datasets`, or a hub id."""
    held_out: Share | NonNegativeInt | str = 0.05
    """A fraction of the prompts, a number of prompts, or a separate file. 0: nothing is evaluated."""
    self_play_rows: Annotated[float, Field(gt=0, lt=1)] | PositiveInt | str | None = None
    """Prompts that `sft` iterations never see and self-play uses: a fraction, a number, or a separate file.
    None: every iteration uses the same rows."""
    columns: dict[str, str] = {}
    """Field name -> name of the user's column."""
    template: str | None = None
    """None: the tokenizer's chat template. A text with {prompt}, for base models. Or a Jinja chat template."""
    turns: Literal["last", "first", "all"] = "last"
    """Which assistant turns of a conversation become examples."""
    limit: PositiveInt | None = None
    """Use only the first N usable rows."""
    split: str = "train"
    """The split of a hub dataset."""
    split_on: str | None = None
    """For `text` rows: "sentence", or a regular expression; the prompt ends at the start of its first match."""
    end_token: str | None = None
    """The token that ends a response. None: the one in the chat template, otherwise the tokenizer's."""
    empty_thought: bool = False
    """Where the template opens a thinking block in the prompt: give responses without a thought an empty one."""
    truncate_real: bool = True
    """Truncate real responses at generate.max_new_tokens too: otherwise length alone reveals which is real."""
    max_skipped: Share = 0.1
    """Refuse the data if more than this fraction of the rows cannot be used."""


class Generate(Strict):
    backend: Literal["hf", "vllm", "server"] = "hf"
    max_new_tokens: PositiveInt = 256
    temperature: NonNegative = 1.0
    top_p: Probability = 1.0
    samples: PositiveInt = 1
    """Responses per prompt."""
    batch_size: PositiveInt | None = None
    """Concurrent prompts. None: 64 with hf and server, the engine's own choice with vllm."""
    python: str | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """The Python interpreter of the environment that has vLLM. None: the current one."""
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Probability = Field(default=0.9, json_schema_extra=MAY_CHANGE)
    url: str | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """URL of a running completions server."""
    command: str | None = None
    """Command that starts a completions server on localhost, with {model}, {port}, {token} and {dtype} filled in."""

    @validator(mode="after")
    def is_read(self) -> Generate:
        """Refuses a setting that the chosen backend does not read."""
        for name, engine in {
            "python": "vllm",
            "tensor_parallel_size": "vllm",
            "gpu_memory_utilization": "vllm",
            "url": "server",
            "command": "server",
        }.items():
            if self.backend != engine and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of {engine}, but generate.backend is {self.backend}")
        if self.backend == "server" and (self.url is None) == (self.command is None):
            raise ValueError("backend server needs either url or command")
        return self


class Adapter(Strict):
    """A low-rank adapter instead of full fine-tuning. Names as in peft's LoraConfig."""

    r: PositiveInt = 16
    lora_alpha: Positive = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    """Suffixes of module names, or one regular expression; "all-linear": every linear layer except the head."""
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    """QLoRA: the frozen base in 4 bits (NF4), for sampling, scoring and training; dequantized for vLLM."""
    merge: Literal["each_iteration"] | None = None
    """None: one adapter, trained further in each iteration. each_iteration: a new one each time, then merged."""

    @validator(mode="after")
    def is_kept_apart(self) -> Adapter:
        if self.load_in_4bit and self.merge:
            raise ValueError(
                "merge: each_iteration merges the adapter into the weights, which load_in_4bit keeps in 4 bits: those "
                "cannot hold the result. Remove one of the two."
            )
        return self

    def for_peft(self) -> dict[str, object]:
        fields = self.model_dump(exclude={"merge", "load_in_4bit"})
        is_text = isinstance(self.target_modules, str)
        return fields if is_text else {**fields, "target_modules": list(self.target_modules)}


class Train(Strict):
    optimizer: Literal["rmsprop", "adamw", "adamw_8bit"] = "rmsprop"
    learning_rate: Positive = 5e-7
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Share = 0.1
    weight_decay: NonNegative = 0.0
    epochs: PositiveInt = 2
    batch_size: PositiveInt = 64
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 2048
    dtype: Literal["auto", "bfloat16", "float32"] = Field(default_factory=resolve_dtype)
    """Compute dtype. auto: bfloat16 on hardware that accelerates it, otherwise float32; a run keeps its dtype."""
    max_grad_norm: Positive | None = 1.0
    sft_weight: NonNegative = 0.0
    """Weight of the real response's NLL, in nats per token, added to the loss of any method."""
    gradient_checkpointing: bool = False
    checkpoint_minutes: NonNegative = Field(default=5.0, json_schema_extra=MAY_CHANGE)
    """Minutes of training between checkpoints. 0: one after every step."""

    @validator(mode="before")
    @classmethod
    def auto_is_unset(cls, raw: Any) -> Any:
        """Drops `dtype: auto`, so that `has_auto_dtype` tells it from a dtype that the user named."""
        is_auto = isinstance(raw, Mapping) and raw.get("dtype") == "auto"
        return {key: value for key, value in raw.items() if key != "dtype"} if is_auto else raw

    @property
    def has_auto_dtype(self) -> bool:
        return "dtype" not in self.model_fields_set


class Regex(Strict):
    regex: str
    """The answer is the first group that took part in the last match, or the whole match."""

    @field_validator("regex")
    @classmethod
    def compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class JsonSchema(Strict):
    json_schema: dict[str, Any]
    """A response is right if it is JSON that this schema accepts."""


class Function(Strict):
    function: Annotated[str, Field(pattern=r".:\w+$")]
    """file.py:function or module:function, called as function(prompt, answer, row); returns 0 (wrong) to 1 (right)."""


Checker = Literal["number", "math", "exact"] | Regex | JsonSchema | Function


class Harness(Strict):
    """Benchmarks of lm-evaluation-harness for the start and every iteration, each in its own process."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = Field(json_schema_extra=MAY_CHANGE)
    """Names or YAML files, with the number of shots after a colon. "tspin" and "spin": the papers' suites."""
    limit: PositiveInt | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Only the first N rows of each task."""
    apply_chat_template: bool = Field(default=False, json_schema_extra=MAY_CHANGE)

    def stages(self) -> dict[str, Task]:
        """Stage name -> task. The name includes every setting that changes the result."""
        more = ("-chat" if self.apply_chat_template else "") + (f"-first{self.limit}" if self.limit else "")
        return {task.label + more: task for task in parse_tasks(self.tasks)}

    @field_validator("tasks")
    @classmethod
    def have_labels_of_their_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        labels = [task.label for task in parse_tasks(value)]
        for label in labels:
            if labels.count(label) > 1 or not re.fullmatch(r"[\w.+-]+", label):
                raise ValueError(f"'{label}' is listed twice, or is not a task name")
        return value


class Evaluate(Strict):
    checker: Checker | None = None
    """How a response is checked: a number after ####, math-verify, the whole text, a pattern, a schema, a function."""
    save_best_by: Literal["held_out_nll", "greedy_accuracy", "sampled_accuracy"] = Field(
        default="held_out_nll", json_schema_extra=MAY_CHANGE
    )
    harness: Harness | None = None
    mt_bench: str | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """A file such as FastChat's question.jsonl, whose questions every iteration answers for `sparring judge`."""


class Stop(Strict):
    """When a run stops before its last iteration. A function of the evaluations, so a resumed run stops alike."""

    equilibrium: bool = Field(default=False, json_schema_extra=MAY_CHANGE)
    """Stop when wins and losses on held-out rows balance and NLL and accuracy have not changed, within error."""
    decline: NonNegativeInt = Field(default=0, json_schema_extra=MAY_CHANGE)
    """Stop after this many iterations without a better evaluate.save_best_by; 0: never."""


if TYPE_CHECKING:
    Method = Objective
else:
    Method = Annotated[Union[tuple(OBJECTIVES.values())], Field(discriminator="name")]  # noqa: UP007  (made at run time)


class Recipe(Strict):
    model: str
    method: Method
    iterations: Annotated[int, Field(ge=1, json_schema_extra=MAY_CHANGE)] = 4
    data: Data
    adapter: Adapter | None = None
    generate: Generate = Generate()
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Evaluate()
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=(), json_schema_extra=MAY_CHANGE
    )
    """Trackers that get every metric, in addition to metrics.jsonl."""
    mirror: str | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """Where finished stages are copied, and fetched into an empty run directory: s3://bucket/folder, ..."""
    stop: Stop = Stop()
    per_iteration: dict[NonNegativeInt, dict[str, Any]] = {}
    seed: NonNegativeInt = 0
    launch: Literal["inline", "torchrun", "ray"] = Field(default="inline", json_schema_extra=MAY_CHANGE)
    """inline: one process. torchrun: one rank per device of this machine. ray: ranks and engines on a cluster."""
    ray_address: str | None = Field(default=None, json_schema_extra=MAY_CHANGE)
    """HOST:PORT of the Ray cluster. None: RAY_ADDRESS, a cluster on this machine, or a new one."""
    num_processes: PositiveInt | Literal["auto"] = Field(default="auto", json_schema_extra=MAY_CHANGE)
    """Number of ranks. auto: one per GPU, or per CPU core without GPUs."""
    parallel: Literal["ddp", "fsdp2", "fsdp2_offload"] = Field(default="ddp", json_schema_extra=MAY_CHANGE)
    """How ranks train. ddp: each holds the whole model. fsdp2: they shard weights, gradients and optimizer state.
    fsdp2_offload: and keep the shards in CPU memory, where they are also updated."""
    threads: PositiveInt | None = None
    """CPU threads. None: as many as this process may use. Recorded, since rounding depends on it."""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks, if there are several, hold parts of the model in training."""
        return self.parallel != "ddp"

    @property
    def weights_dtype(self) -> Literal["bfloat16", "float32"]:
        """Of parameters in memory: float32 if they are trained; a frozen base has the compute dtype."""
        return "bfloat16" if self.adapter is not None and self.train.dtype == "bfloat16" else "float32"

    @property
    def template(self) -> str | None:
        """`data.template`; for `text` rows, the prompt is the text itself."""
        return "{prompt}" if self.data.template is None and self.data.split_on is not None else self.data.template

    @property
    def in_4bit(self) -> bool:
        return self.adapter is not None and self.adapter.load_in_4bit

    @validator(mode="before")
    @classmethod
    def expand_method(cls, raw: Any) -> Any:
        """Expands `method: spin` to a mapping."""
        if isinstance(raw, Mapping) and isinstance(raw.get("method"), str):
            return {**raw, "method": {"name": raw["method"]}}
        return raw

    @validator(mode="after")
    def consistent(self) -> Recipe:
        if self.evaluate.save_best_by != "held_out_nll" and self.evaluate.checker is None:
            raise ValueError(f"evaluate.save_best_by is {self.evaluate.save_best_by}, which needs evaluate.checker")
        if self.in_4bit and self.launch != "inline" and self.parallel != "ddp":
            raise ValueError(f"adapter.load_in_4bit: {self.parallel} cannot shard 4-bit weights. Set parallel: ddp.")
        if self.in_4bit and self.generate.backend == "server":
            raise ValueError(
                "adapter.load_in_4bit: a server would sample from other weights than are trained. Set "
                "generate.backend: hf, which samples from the same 4-bit weights, or vllm, for a dequantized copy."
            )
        if self.train.optimizer == "adamw_8bit" and self.launch != "inline" and self.parallel != "ddp":
            raise ValueError(f"train.optimizer: {self.parallel} cannot shard adamw_8bit. Set adamw, or parallel: ddp.")
        if self.ray_address is not None and self.launch != "ray":
            raise ValueError(f"ray_address is a setting of launch: ray, but launch is {self.launch}")
        if (self.stop.equilibrium or self.stop.decline) and not self.data.held_out:
            raise ValueError("stop needs held-out rows; set data.held_out")
        for index in self.per_iteration:
            try:
                changed = self.at(index)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"per_iteration.{index}: {where}: {first['msg']}") from error
            if (new := changed.length_limits) != (old := self.length_limits):
                name = next(name for name in old if old[name] != new[name])
                raise ValueError(
                    f"per_iteration.{index}: {name} would be {new[name]}, but {old[name]} in other iterations. Rows "
                    f"are truncated there once, for all iterations. Use one {name}, or another run."
                )
        if self.evaluate.checker is None and (named := [m.name for m in self.methods() if m.needs.accepted]):
            raise ValueError(f"method {named[0]} trains on responses that evaluate.checker accepts. Set it.")
        if self.train.sft_weight and "real" not in self.method.needs.roles:
            raise ValueError(f"train.sft_weight: {self.method.name} does not train on real responses. Set it to 0.")
        return self

    @property
    def length_limits(self) -> dict[str, int]:
        """The settings at which the data stage truncates rows."""
        limits = {"train.max_length": self.train.max_length}
        return limits | ({"generate.max_new_tokens": self.generate.max_new_tokens} if self.data.truncate_real else {})

    def methods(self) -> list[Objective]:
        """The recipe's method, and those of single iterations."""
        return [self.method, *(self.at(index).method for index in self.per_iteration)]

    def at(self, index: int) -> Recipe:
        """The settings of one iteration."""
        changes = self.per_iteration.get(index, {})
        is_first_round = index >= 0 and self._method_name(index) not in map(self._method_name, range(index))
        if not changes and not (is_first_round and self.method.needs.first_round):
            return self
        raw = {**self.model_dump(by_alias=True), "per_iteration": {}}
        for key, value in changes.items():
            section, _, _ = key.partition(".")
            if (
                section not in ("method", "generate", "train") or key == "method.name"
            ):  # a new method replaces the whole mapping
                raise ValueError(f"per_iteration.{index}: '{key}' cannot change between iterations")
            set_key(raw, key.split("."), value)
        if isinstance(raw["train"], dict) and raw["train"].get("dtype", "auto") == "auto":
            raw["train"] = {**raw["train"], "dtype": self.train.dtype}  # as the run resolved it
        recipe = Recipe.model_validate(raw)
        if not is_first_round:
            return recipe
        mapping = changes.get("method")
        given = {*changes, *(f"method.{name}" for name in (mapping if isinstance(mapping, Mapping) else ()))}
        method: Any = recipe.method
        first = {name: value for name, value in method.needs.first_round.items() if f"method.{name}" not in given}
        return recipe.model_copy(update={"method": replace(method, **first)})

    def _method_name(self, index: int) -> object:
        method = self.per_iteration.get(index, {}).get("method", self.method.name)
        return method.get("name") if isinstance(method, Mapping) else method


SECTIONS: Mapping[str, type[Strict]] = {
    "data": Data,
    "adapter": Adapter,
    "generate": Generate,
    "train": Train,
    "evaluate": Evaluate,
    "evaluate.harness": Harness,
    "stop": Stop,
}
