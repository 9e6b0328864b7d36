"""The file that `accelerate config` writes, as settings of a recipe: how many ranks, and how they train.

What it says is taken, or refused by its name; nothing in it is passed over that would change how a run trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparring.errors import Refused
from sparring.recipe import yaml as strict_yaml

WAYS = {"NO": "ddp", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp2", "DEEPSPEED": "zero2"}

DTYPES = {"bf16": "bfloat16", "no": "float32"}
OFF = (None, False, "no", "none", "NONE", "", [], {})
ANY: tuple[Any, ...] = ()

TOP: Mapping[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ANY,
    "num_processes": ANY,
    "mixed_precision": ANY,
    "fsdp_config": ANY,
    "deepspeed_config": ANY,
    "num_machines": (1,),
    "gpu_ids": ("all", None),
    "use_cpu": ANY,
    "dynamo_config": ({}, {"dynamo_backend": "NO"}),
    # of several machines, of the launcher, or of checks
    **dict.fromkeys(("machine_rank", "main_process_ip", "main_process_port", "main_training_function"), ANY),
    **dict.fromkeys(("rdzv_backend", "same_network", "debug", "enable_cpu_affinity"), ANY),
}
FSDP: Mapping[str, tuple[Any, ...]] = {
    "fsdp_version": (2,),
    "fsdp_reshard_after_forward": (True, "FULL_SHARD"),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "fsdp_activation_checkpointing": ANY,
    # how a model is loaded and kept is sparring's own
    "fsdp_cpu_ram_efficient_loading": ANY,
    "fsdp_state_dict_type": ANY,
}
DEEPSPEED: Mapping[str, tuple[Any, ...]] = {
    "zero_stage": (2, 3),
    "gradient_accumulation_steps": (1, "auto"),  # sparring cuts a step by its tokens
    "gradient_clipping": ANY,
    "deepspeed_multinode_launcher": ANY,
    "zero3_init_flag": ANY,
    "zero3_save_16bit_model": ANY,
}


def with_accelerate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose `parallel` names such a file, with what the file says in its place."""
    path = raw["parallel"]
    file, _ = strict_yaml.read(Path(path))
    way = file.get("distributed_type") if isinstance(file, dict) else None
    if not isinstance(file, dict) or way not in WAYS:
        raise Refused(f"{path}: its distributed_type is {way}; sparring knows {', '.join(WAYS)}")
    _check(path, TOP, file)
    if (file.get("use_cpu") or way == "MULTI_CPU") and torch.cuda.is_available():
        raise Refused(f"{path}: it wants CPUs, and here is a GPU, which is used; hide it with CUDA_VISIBLE_DEVICES=")
    says: dict[str, Any] = {"parallel": WAYS[way], "launch": "torchrun", "processes": file.get("num_processes", "auto")}
    if way == "NO":
        says = {"parallel": "ddp", "launch": "inline"}
    precision = file.get("mixed_precision") or "no"
    if precision not in DTYPES:
        raise Refused(f"{path}: mixed_precision must be {' or '.join(DTYPES)}, and is {precision}")
    says["train.dtype"] = DTYPES[precision]
    if way == "FSDP":
        inner = {"fsdp_version": 1, **(file.get("fsdp_config") or {})}
        _check(path, FSDP, inner)
        if inner.get("fsdp_activation_checkpointing"):
            says["train.gradient_checkpointing"] = True
    if way == "DEEPSPEED":
        inner = {"zero_stage": 2, **(file.get("deepspeed_config") or {})}
        _check(path, DEEPSPEED, inner)
        says["parallel"] = f"zero{inner['zero_stage']}"
        if inner.get("gradient_clipping", "auto") != "auto":
            says["train.gradient_clipping"] = inner["gradient_clipping"]
    made: dict[str, Any] = {**raw, "parallel": says["parallel"], "train": dict(raw.get("train") or {})}
    for key, value in says.items():
        section, _, name = key.rpartition(".")
        place = made[section] if section else made
        if place.get(name, "auto") not in ("auto", value):
            raise Refused(f"{path} says {key} {value}, and the recipe {place[name]}; leave one of them out")
        place[name] = value
    return made


def _check(path: str, known: Mapping[str, tuple[Any, ...]], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in known:
            if value not in OFF:
                raise Refused(f"{path}: sparring has nothing for {key} ({value}); take it out, if you can do without")
        elif known[key] and value not in known[key]:
            raise Refused(f"{path}: {key} must be {' or '.join(map(str, known[key]))}, and is {value}")
