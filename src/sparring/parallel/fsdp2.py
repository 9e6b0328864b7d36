"""Fully sharded data parallelism (FSDP2): ranks shard weights, gradients and optimizer state. Through accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, patch_environment
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from sparring.parallel.ddp import Ddp
from sparring.parallel.rendezvous import Rendezvous


def shard_within_nodes(num_ranks: int, ranks_per_node: int) -> ParallelismConfig | None:
    """On several nodes with several ranks each: a mesh of (nodes, ranks of a node). None: all ranks shard.

    Weights are gathered for every layer and micro-batch, at the speed of a node's own links (GPUs: hundreds of GB/s, a
    network: tens). Nodes replicate, and exchange the sums of a node's gradients once per step.
    """
    if not 1 < ranks_per_node < num_ranks or num_ranks % ranks_per_node:
        return None
    return ParallelismConfig(dp_replicate_size=num_ranks // ranks_per_node, dp_shard_size=ranks_per_node)


def keep_residual_stream_in_float32(module: nn.Module) -> None:
    """For weights that are trained in float32 and used in bfloat16. A frozen base in bfloat16 keeps its own stream."""
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.weight.requires_grad:
            part.register_forward_hook(lambda part, inputs, output: output.float())


class Fsdp2(Ddp):
    """`Parallel` for ranks that each hold a shard of the model; on several nodes, each node holds all of it.

    With `dtype` bfloat16 weights are gathered in it, at half the traffic and memory. Shards, gradients' sums and the
    residual stream stay float32, so that a step is what it is with DDP but for the rounding of norms' weights. With
    `offload` shards, gradients and optimizer state are in CPU memory, which updates them too.
    """

    name = "fsdp2"

    def __init__(self, rendezvous: Rendezvous, dtype: torch.dtype = torch.float32, *, offload: bool = False) -> None:
        self.dtype = dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=None if dtype == torch.float32 else policy,
            cpu_offload=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else None,
        )
        # with these accelerate also starts gloo, for collectives of what is in CPU memory
        settings = {"accelerate_use_fsdp": "true", "fsdp_offload_params": "true"} if offload else {}
        with patch_environment(**settings):
            super().__init__(rendezvous, fsdp_plugin=self.plugin)
        if self.device.type == "cpu":  # accelerate shards on accelerators only; torch also shards on CPUs
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = self.plugin
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks))
        self.within_nodes = shard_within_nodes(self.num_ranks, ranks_per_node)
        if self.within_nodes is not None:
            state: Any = self.accelerator.state
            state.parallelism_config = self.within_nodes
            state.device_mesh = self.within_nodes.get_device_mesh(self.device.type)

    @property
    def is_sharded(self) -> bool:
        return self.num_ranks > 1

    @property
    def topology(self) -> str:
        nodes = "" if self.within_nodes is None else f" on {self.within_nodes.dp_replicate_size} nodes"
        return super().topology + nodes

    def prepare(self, module: nn.Module, blocks: Sequence[str], optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        if self.plugin.transformer_cls_names_to_wrap is None:
            self.plugin.transformer_cls_names_to_wrap = list(blocks)
        if self.dtype != torch.float32:
            keep_residual_stream_in_float32(module)
        wrapped, wrapped_optimizer = super().prepare(module, blocks, optimizer)
        if any(p.requires_grad and p.dtype != torch.float32 for p in wrapped.parameters()):
            wrapped.float()  # weights that were loaded as they are stored: now each rank has its shard only
        return wrapped, wrapped_optimizer

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Sharded gradients are reduced for every micro-batch: keeping them whole would cost what sharding saves.

        Between nodes, each of which has all shards, they are reduced after the last one.
        """
        if isinstance(module, FSDPModule) and self.within_nodes is not None:
            module.set_requires_all_reduce(is_last)
        return nullcontext() if self.is_sharded else super().accumulate(module, is_last=is_last)
