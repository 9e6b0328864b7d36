"""The model card: what was played, on what, with which numbers, and how to repeat it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from sparring.recipe.schema import Recipe
from sparring.recipe.yaml import dump
from sparring.run.results import SUMMARY_METRICS, Results

PAPERS = {"spin": "2401.01335", "tspin": "2601.08198", "space": "2512.07175"}

TEXT = """---
{metadata}
---

# {title}

Iteration {index} of {count} of self-play fine-tuning with {method}{paper}, from {base},
on {num_train:,} rows of {data}. {kind}

## Numbers

On {num_held_out:,} held-out rows, ± one standard error. "start" is the model that the run began with.

{table}

## Use

Prompts are rendered with the chat template of this folder; an answer ends with `{end}`.

{use}

## To repeat it

Made by [sparring](https://pypi.org/project/sparring/) {version} with

    sparring run recipe.yaml runs/{name}

and this as `recipe.yaml`:

```yaml
{recipe}
```
"""

USE_MODEL = """    from transformers import pipeline

    pipeline("text-generation", model=FOLDER)([{"role": "user", "content": "..."}])"""

USE_ADAPTER = """    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"""

USE_4BIT = """It was trained on its base in 4 bits, and computes on that as it did in the run:

    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.{dtype},
    )
    model = AutoPeftModelForCausalLM.from_pretrained(FOLDER, quantization_config=quantization, dtype=torch.{dtype})"""


def model_card(results: Results, index: int, is_adapter: bool) -> str:
    from importlib.metadata import version

    recipe, data = results.recipe, results.data
    assert data is not None
    base = recipe.model.partition("@")[0]
    metadata = ModelCardData(
        base_model=None if Path(recipe.model).exists() else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sparring", "self-play", recipe.method.name],
        datasets=None if Path(recipe.data.train).exists() or "/" not in recipe.data.train else recipe.data.train,
    )
    paper = PAPERS.get(recipe.method.name)
    card = TEXT.format(
        metadata=metadata.to_yaml(),
        title=results.run.root.name,
        index=index,
        count=recipe.iterations,
        method=recipe.method.name,
        paper=f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else "",
        base=public(recipe.model),
        num_train=data.num_train,
        data=public(recipe.data.train),
        kind="An adapter: it needs its base model." if is_adapter else "A whole model.",
        num_held_out=data.num_held_out,
        table=table(results),
        end=data.end_token,
        use=use(recipe, is_adapter),
        version=version("sparring"),
        name=results.run.root.name,
        recipe=dump(without_folders(recipe)).strip(),
    )
    return str(ModelCard(card))


def use(recipe: Recipe, is_adapter: bool) -> str:
    if not is_adapter:
        return USE_MODEL
    return USE_4BIT.format(dtype=recipe.train.dtype) if recipe.in_4bit else USE_ADAPTER


def table(results: Results) -> str:
    evaluations = results.evaluations()
    shown = [name for name in SUMMARY_METRICS if any(name in metrics for metrics in evaluations.values())]
    lines = [f"| iteration | {' | '.join(shown)} |", f"| --- |{' --- |' * len(shown)}"]
    for index, metrics in evaluations.items():
        cells = []
        for name in shown:
            error = f" ± {metrics[f'{name}_stderr']:.2g}" if f"{name}_stderr" in metrics else ""
            cells.append(f"{metrics[name]:.4g}{error}" if name in metrics else "")
        lines.append(f"| {'start' if index < 0 else index} | {' | '.join(cells)} |")
    return "\n".join(lines) if evaluations else "Nothing was evaluated."


def public(name: str) -> str:
    """A hub id as it is; of a local path its last part: where it lies is nobody's business."""
    return Path(name).name if Path(name).exists() else name


def without_folders(recipe: Recipe) -> dict[str, object]:
    raw = recipe.model_dump(by_alias=True, mode="json")
    raw["model"] = public(recipe.model)
    raw["data"]["train"] = public(recipe.data.train)
    if isinstance(recipe.data.held_out, str):
        raw["data"]["held_out"] = public(recipe.data.held_out)
    return raw
