"""Exports a run's policy as a model folder that transformers and vLLM load, and that responds as it did in the run."""

from __future__ import annotations

import json
import shutil
from glob import escape
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparring.commands.export.card import model_card
from sparring.commands.export.modelfile import modelfile
from sparring.data.render import chat_template_of
from sparring.errors import UserError
from sparring.model.load import load_model, load_tokenizer, save_merged, save_successor
from sparring.model.lora import CONFIG, WEIGHTS, base_of, is_adapter
from sparring.run.iteration import Iteration
from sparring.run.manifest import Json, commit, hash_path, is_committed, remove_leftovers, write_json
from sparring.run.results import Results
from sparring.stages.prepare import make_renderer


def export_model(
    results: Results, out: Path, *, iteration: str = "best", merge: bool = False, dtype: str | None = None
) -> int:
    """Writes a model folder; returns its iteration.

    `dtype` None is the dtype that the run computed in. An adapter stays an adapter, in float32, unless `merge`.
    """
    check_output(out)
    index = select_iteration(results, iteration)
    source = results.run.model(index)
    input_digests = results.run.input_digests(results.run.data, source)  # verifies every file
    if merge and not is_adapter(source):
        raise UserError(f"--merge: {source} is a full model, not an adapter. Remove --merge.")
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: unknown dtype. Use float32, bfloat16 or float16.")
    base = base_of(source)
    if is_adapter(source) and (digest := json.loads((source / "base.json").read_text())["xxh3"]) != hash_path(base):
        raise UserError(f"{base} has changed since the adapter was trained on it (hash {digest}). Restore its files.")
    target_dtype = getattr(torch, dtype or results.recipe.train.dtype)
    with commit(out, input_digests=input_digests) as folder:
        if is_adapter(source) and not merge:
            if dtype is not None:
                raise UserError("--dtype: an adapter is exported in float32. Add --merge to export a full model.")
            copy_adapter(source, folder, results.recipe.model)
        elif merge:
            run_dtype = getattr(torch, results.recipe.train.dtype)
            save_merged(source, folder, dtype=target_dtype, quantized_in=run_dtype if results.recipe.in_4bit else None)
        else:
            save_successor(load_model(source, dtype=target_dtype, device=torch.device("cpu")), source, folder)
        tokenizer = load_tokenizer(source)
        write_usage(results, tokenizer, base, folder)
        if not is_adapter(folder):
            recipe, data = results.recipe, Iteration(results.run, results.recipe, index).data
            renderer = make_renderer(recipe, base, tokenizer)
            text = modelfile(renderer, recipe.generate, data.end_ids, data.max_length)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(results, index, is_adapter(folder)), encoding="utf-8")
    return index


def check_output(out: Path) -> None:
    """Raises `UserError` if `out` exists. Removes what a killed export to it left behind."""
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder, or remove it.")
    remove_leftovers(out.parent.glob(f".{escape(out.name)}.tmp-*"))


def select_iteration(results: Results, iteration: str) -> int:
    if iteration == "best":
        best = results.best()
        if best is None:
            raise UserError("--iteration best: nothing has been evaluated yet. Give a number.")
        if best < 0:
            raise UserError(
                f"--iteration best: no iteration improves {results.recipe.evaluate.save_best_by} over the starting "
                "model. To export one anyway, give its number."
            )
        return best
    if not iteration.isdecimal() or not is_committed(results.run.stage(int(iteration), "train")):
        done = [t for t in range(results.recipe.iterations) if is_committed(results.run.stage(t, "train"))]
        trained = f"one of {', '.join(map(str, done))}" if done else "a number once an iteration is trained"
        raise UserError(f"--iteration {iteration}: not a trained iteration. Use 'best' or {trained}.")
    return int(iteration)


def copy_adapter(source: Path, folder: Path, name: str) -> None:
    """Copies the adapter. Its config refers to the base model as the recipe does: by Hub id or local folder."""
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    repo, _, revision = name.partition("@")
    if not Path(name).exists():
        config |= {"base_model_name_or_path": repo, "revision": revision or None}
    write_json(folder / CONFIG, config)


def write_usage(results: Results, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Writes the tokenizer, chat template and generation settings that the run used.

    Does not copy the base model's generation settings: a repetition penalty, say, would change the responses that were
    trained and evaluated.
    """
    recipe, data = results.recipe, results.data
    assert data is not None
    for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"):
        for file in (f for f in base.glob(pattern) if f.is_file()):
            shutil.copyfile(file, folder / file.name)
    if template := chat_template_of(recipe.template, tokenizer, data.end_token):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else data.end_ids[0]
    settings: Json = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(data.end_ids), "pad_token_id": pad}
    generate = recipe.generate
    if generate.temperature > 0:
        settings |= {"do_sample": True, "temperature": generate.temperature, "top_p": generate.top_p, "top_k": 0}
    write_json(folder / "generation_config.json", settings)
