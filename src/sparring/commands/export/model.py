"""A policy of a run as a model folder that loads anywhere, and answers as it did in the run."""

from __future__ import annotations

import json
import shutil
from glob import escape
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparring.commands.export.card import model_card
from sparring.data.render import chat_template_of
from sparring.errors import UserError
from sparring.model.load import load_model, load_tokenizer, save_merged, save_successor
from sparring.model.lora import CONFIG, WEIGHTS, base_of, is_adapter
from sparring.run.manifest import Json, commit, hash_path, is_committed, remove_leftovers, write_json
from sparring.run.results import Results


def export_model(
    results: Results, out: Path, *, iteration: str = "best", merge: bool = False, dtype: str | None = None
) -> int:
    """Writes a model folder; returns the iteration that it holds.

    `dtype` None keeps the one that the run computed in. An adapter stays one, in float32, unless `merge`.
    """
    begin_export(out)
    index = chosen_iteration(results, iteration)
    source = results.run.model(index)
    input_digests = results.run.input_digests(results.run.data, source)  # verifies every file
    if merge and not is_adapter(source):
        raise UserError(f"--merge: {source} is no adapter but a whole model; leave the option out")
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: one of float32, bfloat16, float16")
    base = base_of(source)
    if is_adapter(source) and (digest := json.loads((source / "base.json").read_text())["xxh3"]) != hash_path(base):
        raise UserError(f"{base} has changed since the adapter was trained on it ({digest}); put the old files back")
    kept = getattr(torch, dtype or results.recipe.train.dtype)
    with commit(out, input_digests=input_digests) as folder:
        if is_adapter(source) and not merge:
            if dtype is not None:
                raise UserError("--dtype: an adapter is kept in float32; add --merge to make a whole model")
            copy_adapter(source, folder, results.recipe.model)
        elif merge:
            run_dtype = getattr(torch, results.recipe.train.dtype)
            save_merged(source, folder, dtype=kept, quantized_in=run_dtype if results.recipe.in_4bit else None)
        else:
            save_successor(load_model(source, dtype=kept, device=torch.device("cpu")), source, folder)
        write_usage(results, load_tokenizer(source), base, folder)
        (folder / "README.md").write_text(model_card(results, index, is_adapter(folder)), encoding="utf-8")
    return index


def begin_export(out: Path) -> None:
    """Refuses a place that is taken, and removes what an export to it left there that was killed."""
    if out.exists():
        raise UserError(f"{out} is there already; give a new folder, or remove that one")
    remove_leftovers(out.parent.glob(f".{escape(out.name)}.tmp-*"))


def chosen_iteration(results: Results, iteration: str) -> int:
    if iteration == "best":
        best = results.best()
        if best is None:
            raise UserError("--iteration best: nothing has been evaluated yet; give a number")
        if best.iteration < 0:
            raise UserError(
                f"--iteration best: no iteration is better than the starting model by {best.metric}; to export one "
                "all the same, give its number"
            )
        return best.iteration
    if not iteration.isdecimal() or not is_committed(results.run.stage(int(iteration), "train")):
        done = [t for t in range(results.recipe.iterations) if is_committed(results.run.stage(t, "train"))]
        trained = f"trained are {', '.join(map(str, done))}" if done else "none is trained yet"
        raise UserError(f"--iteration {iteration}: 'best', or the number of a trained iteration; {trained}")
    return int(iteration)


def copy_adapter(source: Path, folder: Path, name: str) -> None:
    """The adapter, which names its base as the recipe does: by hub id, or by folder where it is a local one."""
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    repo, _, revision = name.partition("@")
    if not Path(name).exists():
        config |= {"base_model_name_or_path": repo, "revision": revision or None}
    write_json(folder / CONFIG, config)


def write_usage(results: Results, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation settings, as the run used them.

    The model's own generation settings are not taken over: a repetition penalty among them would give other
    answers than those that were trained and evaluated.
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
