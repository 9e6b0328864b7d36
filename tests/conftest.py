"""What the tests share: shapes checked while they run, one thread, a tiny model, and the real input if it is there."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

sys.modules["sklearn"] = None  # type: ignore[assignment]  # see WITHOUT_SKLEARN

# what sparring imports, before the hook below: within a hooked module Python ignores all compiled files of others, and
# compiling three thousand modules takes longer than most tests
for name in (
    *(
        "accelerate.utils.memory",
        "huggingface_hub.inference._client",
        "jinja2",
        "matplotlib.figure",
        "peft",
        "pyarrow.csv",
    ),
    *("pyarrow.fs", "pyarrow.parquet", "rich.progress", "ruamel.yaml", "scipy.stats", "tenacity", "triton", "typer"),
    *("torch.distributed.fsdp", "torch.distributed.launcher.api", "torch.nn.attention.flex_attention"),
    *("transformers.integrations.sdpa_attention", "transformers.models.llama.modeling_llama"),
):
    if find_spec(name.partition(".")[0]) is not None:
        import_module(name)

# executes the shapes in the signatures; before any module of sparring is imported
install_import_hook("sparring", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import sparring.report
from sparring.commands.demo import make_model, make_tokenizer, problems
from sparring.loop import play
from sparring.model.load import save_model
from sparring.recipe.schema import Recipe
from sparring.run.rundir import RunDir

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a run collects garbage whenever it frees a model: without this it visits every module's objects each time
settings.register_profile("no deadline", deadline=None)  # a loaded machine is slow, not wrong
settings.load_profile("no deadline")

SHARED = Path(__file__).parents[2] / "shared"


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real model, which lie beside the project on the machines where it is developed."""
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip(f"the real input is not at {SHARED}")
    return SHARED


WITHOUT_SKLEARN = """
import sys
if not any("harness" in word for word in sys.orig_argv):
    sys.modules["sklearn"] = None
"""
"""For processes of ours: transformers imports scikit-learn where it is installed, a fifth of a start. Only lm-eval,
which installs it, needs it."""


@pytest.fixture(autouse=True, scope="session")
def processes_start_soon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_SKLEARN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster on this machine that notices lost nodes soon. Its first node, where we are, has no CPUs."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    health = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 2}
    config = {f"health_check_{name}": value for name, value in health.items()}
    head = {"num_cpus": 0, "object_store_memory": 10**8, "_system_config": config}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True, scope="session")
def without_figures() -> Iterator[pytest.MonkeyPatch]:
    """Figures take half the time of a tiny run. Tests that look at them use `figures`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_held_out", "draw_training"):
            patch.setattr(sparring.report, name, lambda results: [])
        yield patch


@pytest.fixture(scope="module")
def figures(without_figures: pytest.MonkeyPatch) -> Iterator[None]:
    """Reports of this module have their figures."""
    from sparring.report.figures import draw_held_out, draw_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparring.report, "draw_held_out", draw_held_out)
        patch.setattr(sparring.report, "draw_training", draw_training)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, a random two-layer Llama with a chat template, and rows.jsonl, 60 problems.

    pairs.jsonl has the same ones as preference data: the rejected answer is another problem's.
    """
    folder = tmp_path_factory.mktemp("tiny")
    rows = problems(60, seed=1, largest=12)
    tokenizer = make_tokenizer(rows)
    model = make_model(tokenizer, width=32, layers=2, seed=0)
    save_model(model, tokenizer, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def make_recipe(tiny: Path) -> Callable[..., Recipe]:
    """A recipe that plays in seconds: `make_recipe("spin", train={"epochs": 1})`. For fixtures of any scope."""

    def make(method: str | dict[str, object] = "spin", **sections: object) -> Recipe:
        raw: dict[str, object] = {
            "model": str(tiny / "model"),
            "method": method,
            "iterations": 2,
            "data": {"train": str(tiny / ("pairs.jsonl" if method == "dpo" else "rows.jsonl")), "held_out": 12},
            "generate": {"max_new_tokens": 16},
            "train": {"learning_rate": 1e-3, "batch_size": 16, "micro_batch_tokens": 256, "dtype": "float32"},
            "evaluate": {"checker": "number"},
        }
        for name, section in sections.items():
            default = raw.get(name)
            raw[name] = {**default, **section} if isinstance(default, dict) and isinstance(section, dict) else section
        return Recipe.model_validate(raw)

    return make


class Played(NamedTuple):
    recipe: Recipe
    run: RunDir


@pytest.fixture(scope="session")
def played(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Played]:
    """`played("spin")`: a run of three iterations, each of one epoch. It is shared: copy it before you change it."""

    @cache
    def play_once(method: str) -> Played:
        recipe = make_recipe(method, iterations=3, train={"epochs": 1})
        return Played(recipe, play(recipe, tmp_path_factory.mktemp(f"played-{method}") / "run").run)

    return play_once
