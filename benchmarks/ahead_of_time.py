"""Compiles every GPU kernel of sparring ahead of time, on a machine without a GPU, and reads what each one needs.

Inductor writes FlexAttention's forward and backward kernels for the masks of shared prompts, as it does on a GPU;
Triton and ptxas compile them, and the head's own two kernels, for each GPU. A kernel that needs more shared memory than
a card has cannot start there.

    python benchmarks/ahead_of_time.py --out benchmarks/results/ahead_of_time.json
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparring.model import flex
from sparring.model.kernels import triton as head

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a kernel may ask for, by compute capability (CUDA C Programming Guide, table 30)."""
CARDS = {80: "A100", 86: "A10, RTX 30", 89: "L4, L40S, RTX 40", 90: "H100, H200", 100: "B200"}
SIZES = ((150, 250, 250), (100, 300))
"""A row of two prompts, the second with one response."""
HEADS, KV_HEADS = 8, 2

BLOCKS = ("torch's", "small")
INDUCTOR = {
    "force_disable_caches": True,
    "pattern_matcher": False,
    "compile_threads": 1,
    "use_static_triton_launcher": False,
}

Graph = tuple[torch.fx.GraphModule, Sequence[Any], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 96, 128, 256], help="of attention heads")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=SHARED, default=list(SHARED))
    parser.add_argument(
        "--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="small ones where others fail"
    )
    wanted = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in wanted.dtypes:
        for width in wanted.widths:
            rows += attention_rows(getattr(torch, dtype), width, wanted.capabilities, wanted.blocks)
        for capability in wanted.capabilities:
            rows += [{"dtype": dtype, **row} for row in head_kernels(getattr(torch, dtype), capability)]
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "kernels": rows,
    }
    text = "".join(json.dumps(row) + "\n" for row in rows)
    print(text, end="")
    if wanted.out:
        wanted.out.write_text(json.dumps(found, indent=1) + "\n")


def attention_rows(
    dtype: torch.dtype, width: int, capabilities: Sequence[int], blocks: Sequence[str]
) -> list[dict[str, Any]]:
    """Both kernels for each GPU, with small blocks only where torch's own do not fit."""
    rows, remaining = [], list(capabilities)
    for name, options in zip(BLOCKS, flex.kernel_options(width, dtype), strict=True):
        if name not in blocks or not remaining:
            continue
        graphs = attention_graphs(dtype, width, options)
        for capability in tuple(remaining):
            kernels = list(attention_kernels(graphs, capability))
            rows += [{"dtype": str(dtype)[6:], "width": width, "blocks": name, **row} for row in kernels]
            print(json.dumps(rows[-2:]), file=sys.stderr, flush=True)
            if all(row["fits"] for row in kernels):
                remaining.remove(capability)
    return rows


def attention_kernels(graphs: Sequence[Graph], capability: int) -> Iterator[dict[str, Any]]:
    """Both kernels of FlexAttention, as compiled for a GPU."""
    for graph in graphs:
        for name, source in inductor_code(graph, capability).items():
            if name.startswith("triton_tem"):  # written from a template: attention itself
                kernel = "attention backward" if graph[2] else "attention forward"
                yield {
                    "kernel": kernel,
                    "capability": capability,
                    **resources(compile_inductor(name, source, capability), capability),
                }


def attention_graphs(dtype: torch.dtype, width: int, options: Mapping[str, Any]) -> list[Graph]:
    """What torch traces of FlexAttention on a shared row, forward and backward, before any code is written."""
    graphs: list[Graph] = []

    def keep(is_backward: bool) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            kept = copy.deepcopy(graph)
            for node in kept.graph.nodes:
                if node.target is torch.ops.higher_order.flex_attention:  # on a GPU it is kept for the backward pass
                    options = {**node.args[6], "OUTPUT_LOGSUMEXP": True}
                    node.args = (*node.args[:6], options, *node.args[7:])
            graphs.append((kept, inputs, is_backward))
            return make_boxed_func(graph)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep(False), bw_compiler=keep(True), decompositions=select_decomp_table())
    time = sum(map(sum, SIZES))
    states = [torch.randn(1, heads, time, width, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    mask = flex.block_mask(SIZES, time, torch.device("cpu"))
    with mock.patch.object(torch_flex, "_validate_device", lambda *states: None):  # "no backward pass on CPU"
        call = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=backend)
        found = call(
            *(x.requires_grad_() for x in states),
            block_mask=mask,
            scale=width**-0.5,
            enable_gqa=True,
            kernel_options=dict(options),
        )
        with suppress(NotImplementedError):  # torch has no backward pass to run here; its graph is there by now
            found.sum().backward()
    assert [is_backward for *_, is_backward in graphs] == [False, True]
    return graphs


def inductor_code(graph: Graph, capability: int) -> dict[str, str]:
    """The Triton kernels that Inductor writes for a GPU, by name."""
    traced, inputs, is_backward = graph
    module, code = copy.deepcopy(traced), {}

    def keep(self: object, name: str, source: str, *rest: Any, **more: Any) -> Callable[..., None]:
        code[name] = source
        return lambda *a, **k: None

    mode = detect_fake_mode(inputs)
    assert mode is not None

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    with fake_gpu(capability), mock.patch.object(AsyncCompile, "triton", keep), torch.no_grad():
        with mode:
            moved = [move(value) for value in inputs]
            for part in module.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    node.meta["val"] = tree_map(move, node.meta.get("val"))
                    if "device" in node.kwargs:
                        node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        compile_fx_inner(module, moved, is_backward=is_backward)
    return code


@contextmanager
def fake_gpu(capability: int) -> Iterator[None]:
    """A machine that seems to have such a GPU, for what Inductor asks before it writes code."""
    properties = SimpleNamespace(
        name=CARDS[capability],
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=100,
        warp_size=32,
        total_memory=2**34,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=SHARED[capability],
        L2_cache_size=2**25,
    )
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: 0)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_rng_state": torch.zeros(1),
        "set_rng_state": None,
        "synchronize": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda: True))
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name, answer in answers.items():
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, lambda *a, answer=answer, **k: answer))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        # torch without CUDA cannot copy even tensors that have no memory
        stack.enter_context(mock.patch.object(Tensor, "copy_", lambda self, *a, **k: self))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(torch._inductor.config.patch(**INDUCTOR))
        triton.runtime.driver.set_active(driver)
        try:
            yield
        finally:
            triton.runtime.driver._active = before


def compile_inductor(name: str, source: str, capability: int) -> Any:
    """A kernel as Inductor would compile it before its first start."""
    with fake_gpu(capability):
        tuner = getattr(PyCodeCache.load(source), name)
        return tuner._precompile_config(tuner.configs[0]).kernel


def head_kernels(dtype: torch.dtype, capability: int) -> Iterator[dict[str, Any]]:
    """Both kernels of the output head, with and without a soft cap."""
    logits = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {"targets": "*i64", "vocab": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32"}
    for name, kernel in (("head forward", head._logprobs), ("head backward", head._slopes)):
        for is_capped in (False, True):
            constants = {"IS_CAPPED": is_capped, "IS_DOUBLE": False, "NUM_TARGETS": 1, "TILE": head.TILE}
            signature = {
                argument: "constexpr" if argument in constants else types.get(argument, "*fp32")
                for argument in kernel.arg_names
            } | {"logits": logits}
            source = ASTSource(kernel, signature, constants)
            with fake_gpu(capability):
                binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            yield {"kernel": name, "is_capped": is_capped, "capability": capability, **resources(binary, capability)}


def resources(binary: Any, capability: int) -> dict[str, Any]:
    """Registers per thread, bytes of spilled registers, and shared memory against the card's limit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        printed = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", printed)[-1]) for name in ("REG", "STACK"))
    shared = binary.metadata.shared
    return {
        "warps": binary.metadata.num_warps,
        "registers": registers,
        "spilled_bytes": stack,
        "shared": shared,
        "fits": shared <= SHARED[capability],
    }


if __name__ == "__main__":
    main()
