"""Writes the model card: method, data, numbers, use, and how to reproduce it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from sparring.recipe.schema import Recipe
from sparring.recipe.yaml import dump
from sparring.report.summary import describe_headline
from sparring.run.results import SUMMARY_METRICS, Results, phases

PAPERS = {
    "dft": "2508.05629",
    "rft": "2308.01825",
    "sdft": "2601.19897",
    "spin": "2401.01335",
    "tspin": "2601.08198",
    "space": "2512.07175",
}

TEXT = """---
{metadata}
---

# {title}

Iteration {index} of {count}: {training}, from {base},
on {num_train:,} rows of {data}. {kind}

## Results

{headline}On {num_held_out:,} held-out rows, with 95% intervals over prompts in brackets. "start" is the starting model.

{table}

## Use

Render prompts with the chat template of this folder. A response ends with `{end}`.

{use}

## Reproduce

Made with [sparring](https://pypi.org/project/sparring/) {version} by

    sparring run recipe.yaml runs/{name}

with this `recipe.yaml`:

```yaml
{recipe}
```
"""

USE_MODEL = """    from transformers import pipeline

    pipeline("text-generation", model=FOLDER)([{"role": "user", "content": "..."}])"""

USE_ADAPTER = """    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"""

USE_4BIT = """The adapter was trained on its base model in 4 bits. To load it in the same way:

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
    methods = [method for method, _ in phases(recipe, index + 1)]
    is_self_play = any(method.needs.rounds for method in methods)
    metadata = ModelCardData(
        base_model=None if Path(recipe.model).exists() else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sparring", *(["self-play"] if is_self_play else []), *dict.fromkeys(m.name for m in methods)],
        datasets=None if Path(recipe.data.train).exists() or "/" not in recipe.data.train else recipe.data.train,
    )
    headline = results.headline(index)
    card = TEXT.format(
        metadata=metadata.to_yaml(),
        title=results.run.root.name,
        index=index,
        count=recipe.iterations,
        training=describe_training(recipe, index),
        base=public_name(recipe.model),
        num_train=data.num_train if is_self_play else data.num_train - data.num_self_play,
        data=public_name(recipe.data.train),
        kind="This is an adapter, which needs its base model." if is_adapter else "This is a full model.",
        headline=f"{describe_headline(headline)}\n\n" if headline else "",
        num_held_out=data.num_held_out,
        table=metrics_table(results),
        end=data.end_token,
        use=usage(recipe, is_adapter),
        version=version("sparring"),
        name=results.run.root.name,
        recipe=dump(public_recipe(recipe)).strip(),
    )
    return str(ModelCard(card))


def describe_training(recipe: Recipe, index: int) -> str:
    """The training up to iteration `index`, such as "supervised fine-tuning in iteration 0, then ..."."""
    played = phases(recipe, index + 1)
    texts = []
    for method, iterations in played:
        if method.needs.accepted:
            text = "rejection fine-tuning on the model's own accepted responses"
        elif method.needs.teacher is not None:
            text = "self-distillation from the model that is shown the real response"
        elif method.needs.rounds:
            text = f"self-play fine-tuning with {method.name}"
        elif "rejected" in method.needs.roles:
            text = f"preference optimization with {method.name}"
        else:
            text = "supervised fine-tuning" + (f" with {method.name}" if method.name != "sft" else "")
        if paper := PAPERS.get(method.name):
            text += f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))"
        if len(played) > 1:
            first, last = iterations[0], iterations[-1]
            text += f" in iteration {first}" if first == last else f" in iterations {first} to {last}"
        texts.append(text)
    return ", then ".join(texts)


def usage(recipe: Recipe, is_adapter: bool) -> str:
    if not is_adapter:
        return USE_MODEL
    return USE_4BIT.format(dtype=recipe.train.dtype) if recipe.in_4bit else USE_ADAPTER


def metrics_table(results: Results) -> str:
    evaluations = results.evaluations()
    names = [name for name in SUMMARY_METRICS if any(name in metrics for metrics in evaluations.values())]
    lines = [f"| iteration | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for index, metrics in evaluations.items():
        cells = []
        for name in names:
            ends = [metrics[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in metrics]
            interval = " [{:.4g}, {:.4g}]".format(*ends) if ends else ""
            cells.append(f"{metrics[name]:.4g}{interval}" if name in metrics else "")
        lines.append(f"| {'start' if index < 0 else index} | {' | '.join(cells)} |")
    return "\n".join(lines) if evaluations else "This run was not evaluated."


def public_name(name: str) -> str:
    """A Hub id unchanged, or the last component of a local path, so that a card does not reveal local folders."""
    return Path(name).name if Path(name).exists() else name


def public_recipe(recipe: Recipe) -> dict[str, object]:
    """The recipe without local folders."""
    raw = recipe.model_dump(by_alias=True, mode="json")
    raw["model"] = public_name(recipe.model)
    raw["data"]["train"] = public_name(recipe.data.train)
    if isinstance(recipe.data.held_out, str):
        raw["data"]["held_out"] = public_name(recipe.data.held_out)
    return raw
