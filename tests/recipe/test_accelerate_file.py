"""Files as accelerate's own code writes them: taken over, or refused by the name of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from sparring.errors import Refused
from sparring.recipe.load import json_schema, load_recipe
from sparring.recipe.schema import Recipe

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}
ZERO3 = {
    "zero_stage": 3,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.7,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
    "deepspeed_multinode_launcher": "standard",
}


def load(folder: Path, overrides: tuple[str, ...] = (), **settings: Any) -> Recipe:
    """A recipe with such a file."""
    base: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "bf16",
        "num_processes": 8,
        "use_cpu": False,
        "debug": False,
        "downcast_bf16": "no",
        "tpu_env": [],
        "tpu_use_cluster": False,
        "gpu_ids": "all",
    }
    ClusterConfig(**{**base, **settings}).to_yaml_file(folder / "accelerate.yaml")
    recipe = {
        "model": "m",
        "method": "spin",
        "data": {"train": "rows.jsonl"},
        "parallel": str(folder / "accelerate.yaml"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("settings", "parallel", "launch"),
    [
        ({"distributed_type": "NO", "num_processes": 1}, "ddp", "inline"),
        ({"distributed_type": "MULTI_GPU"}, "ddp", "torchrun"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP2}, "fsdp2", "torchrun"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO3, "zero_stage": 2}}, "zero2", "torchrun"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO3}, "zero3", "torchrun"),
    ],
)
def test_what_it_says_is_taken(settings: dict[str, Any], parallel: str, launch: str, tmp_path: Path) -> None:
    found = load(tmp_path, **settings)
    assert (found.parallel, found.launch, found.train.dtype) == (parallel, launch, "bfloat16")
    assert found.processes == (8 if launch == "torchrun" else "auto")
    assert found.train.gradient_clipping == (0.7 if parallel.startswith("zero") else 1.0)
    assert found == load(tmp_path, ("train.dtype=bfloat16", f"launch={launch}"), **settings), "said twice, and the same"


def test_activation_checkpointing_is_taken(tmp_path: Path) -> None:
    with_it = {**FSDP2, "fsdp_activation_checkpointing": True}
    assert load(tmp_path, distributed_type="FSDP", fsdp_config=with_it).train.gradient_checkpointing
    assert not load(tmp_path, distributed_type="FSDP", fsdp_config=FSDP2).train.gradient_checkpointing
    assert load(tmp_path, mixed_precision="no").train.dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "overrides", "words"),
    [
        ({"distributed_type": "MEGATRON_LM"}, (), "its distributed_type is MEGATRON_LM; sparring knows NO, MULTI_GPU"),
        ({"mixed_precision": "fp16"}, (), "mixed_precision must be bf16 or no, and is fp16"),
        ({"num_machines": 2}, (), "num_machines must be 1, and is 2"),
        ({"gpu_ids": "0,1"}, (), "gpu_ids must be all or None, and is 0,1"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, (), "sparring has nothing for parallelism_config"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, (), "dynamo_config must be"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {**FSDP2, "fsdp_version": 1}},
            (),
            "fsdp_version must be 2, and is 1",
        ),
        ({"distributed_type": "FSDP"}, (), "fsdp_version must be 2, and is 1"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {**FSDP2, "fsdp_offload_params": True}},
            (),
            "sparring has nothing for fsdp_offload_params",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {**FSDP2, "fsdp_reshard_after_forward": False}},
            (),
            "fsdp_reshard_after_forward must be True",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO3, "gradient_accumulation_steps": 4}},
            (),
            "gradient_accumulation_steps must be 1 or auto, and is 4",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO3, "zero_stage": 1}},
            (),
            "zero_stage must be 2 or 3, and is 1",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO3, "offload_optimizer_device": "cpu"}},
            (),
            "sparring has nothing for offload_optimizer_device .cpu.",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            (),
            "sparring has nothing for deepspeed_config_file",
        ),
        ({}, ("train.dtype=float32",), "says train.dtype bfloat16, and the recipe float32; leave one of them out"),
        ({}, ("processes=2",), "says processes 8, and the recipe 2"),
        ({}, ("launch=ray",), "says launch torchrun, and the recipe ray"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO3},
            ("train.gradient_clipping=null",),
            "says train.gradient_clipping 0.7, and the recipe None",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    settings: dict[str, Any], overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=rf"accelerate\.yaml.* {words}" if not overrides else words):
        load(tmp_path, overrides, **settings)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / "accelerate.yaml").write_text("- one\n", encoding="utf-8")
    with pytest.raises(Refused, match="its distributed_type is None"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "accelerate.yaml").unlink()
    with pytest.raises(Refused, match="there is no file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_editors_know_it() -> None:
    assert json_schema()["properties"]["parallel"]["anyOf"][0]["pattern"] == r"\.ya?ml$"
