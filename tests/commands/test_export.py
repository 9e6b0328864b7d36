"""`sparring export`: the same responses as in the run, a correct model card, and nothing private."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sparring.commands.export import export_model, export_pairs, push_folder
from sparring.commands.export.card import describe_training
from sparring.commands.export.pairs import chat_pair, schema
from sparring.data.formats import detect_format, examples
from sparring.data.read import read_rows
from sparring.data.render import Renderer, text_as_jinja
from sparring.data.tables import TURNS, read_rendered, write_table
from sparring.errors import CorruptedError, UserError
from sparring.loop import play
from sparring.model.load import check_model_folder, load_tokenizer
from sparring.model.lora import CONFIG
from sparring.recipe.schema import Data, Generate, Recipe
from sparring.report.summary import summary
from sparring.run.examples import read_iteration
from sparring.run.iteration import Iteration
from sparring.run.results import Results, name_methods
from sparring.run.rundir import RunDir
from sparring.stages.evaluate.held_out import answer
from sparring.stages.generate import open_backend
from sparring.stages.generate.server import started_server
from sparring.stages.generate.vllm import VllmBackend
from sparring.types import Generation, Rendered

VLLM_PYTHON = os.environ.get("SPARRING_VLLM_PYTHON")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
needs_vllm = pytest.mark.skipif(VLLM_PYTHON is None, reason="SPARRING_VLLM_PYTHON is not set; 'make test-vllm' sets it")
CPU = torch.device("cpu")

TEMPLATE = "{system}### Problem: {prompt}\n\n### Answer:  "


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A full model with the tokenizer's template, and an adapter with a text template in bfloat16."""
    folder = tmp_path_factory.mktemp("export")
    raw = {
        "model": str(tiny / "model"),
        "method": "spin",
        "iterations": 2,
        "data": {"train": str(tiny / "rows.jsonl"), "held_out": 8},
        "generate": {"max_new_tokens": 12},
        "train": {"learning_rate": 3e-3, "batch_size": 16, "dtype": "float32", "epochs": 2},
    }
    adapted = {
        **raw,
        "data": {**raw["data"], "template": TEMPLATE},
        "adapter": {"r": 4, "lora_alpha": 8},
        "train": {**raw["train"], "dtype": "bfloat16", "learning_rate": 1e-2},
    }
    return {
        "whole": play(Recipe.model_validate(raw), folder / "whole").run,
        "adapter": play(Recipe.model_validate(adapted), folder / "adapter").run,
    }


def greedy_in_the_run(run: RunDir, index: int) -> dict[str, list[int]]:
    """Responses of the run's own engine to the held-out rows, end tokens included."""
    recipe = Results(run.root).recipe
    iteration = Iteration(run, recipe, index)
    rows = iteration.held_out_rows()
    settings, data = Generate(max_new_tokens=12, batch_size=1), iteration.data
    with open_backend(run.model(index), settings, recipe.train.dtype, data.end_ids, data.max_length) as engine:
        found = answer(iteration, engine, rows, greedy=True)
    return {a.id: a.token_ids.tolist() for a in found}


def greedy_in_transformers(folder: Path, run: RunDir) -> dict[str, list[int]]:
    """Responses of transformers with the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for row in read_rendered(run.data / "held_out.parquet"):
        ids = torch.from_numpy(row.prompt_ids.astype(np.int64))[None]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        found[row.id] = output[0, len(row.prompt_ids) :].tolist()
    return found


def test_a_whole_model_gives_the_same_greedy_tokens(runs: dict[str, RunDir], tmp_path: Path) -> None:
    run = runs["whole"]
    assert export_model(Results(run.root), tmp_path / "out", iteration="1") == 1
    check_model_folder(tmp_path / "out")
    expected = greedy_in_the_run(run, 1)
    assert greedy_in_transformers(tmp_path / "out", run) == expected
    assert greedy_in_the_run(run, 0) != expected, "control: another iteration responds differently"
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    stop, system = 'PARAMETER stop "<|end|>"', "SYSTEM"
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert stop in text and system not in text and "{{ range .Messages }}" in text
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.temperature, settings.top_k) == ([3], 1.0, 0)


def test_an_adapter_merged_gives_the_same_greedy_tokens(runs: dict[str, RunDir], tmp_path: Path) -> None:
    """In bfloat16 merging rounds the weights, which may flip near ties: most responses are equal."""
    run = runs["adapter"]
    export_model(Results(run.root), tmp_path / "out", iteration="1", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    expected, exported = greedy_in_the_run(run, 1), greedy_in_transformers(tmp_path / "out", run)
    assert np.mean([expected[id] == exported[id] for id in expected]) >= 0.75
    export_model(Results(run.root), tmp_path / "float", iteration="1", merge=True, dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "float").dtype == torch.float32


def test_an_adapter_alone_loads_in_peft(runs: dict[str, RunDir], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    run = runs["adapter"]
    export_model(Results(run.root), tmp_path / "out", iteration="0")
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    row = read_rendered(run.data / "held_out.parquet")[0]
    ids = torch.from_numpy(row.prompt_ids.astype(np.int64))[None]
    whole = torch.ones_like(ids)  # else transformers hides the letters that the tokenizer does not know: they are pads
    output = model.generate(
        input_ids=ids, attention_mask=whole, max_new_tokens=12, do_sample=False, eos_token_id=[3], pad_token_id=0
    )
    assert output[0, ids.shape[1] :].tolist() == greedy_in_the_run(run, 0)[row.id]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_exported_template_makes_the_run_s_prompts(
    runs: dict[str, RunDir], tiny: Path, tmp_path: Path, kind: str
) -> None:
    """Token by token, from the user's rows; a text template has become a chat template."""
    run = runs[kind]
    export_model(Results(run.root), tmp_path / "out", iteration="0", merge=kind == "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = {row.row: row for row in read_rendered(run.data / "train.parquet")}
    seen = 0
    for number, row in read_rows(str(tiny / "rows.jsonl")):
        assert isinstance(row, dict)
        for example in examples(row, number, detect_format(row, {}, None, ""), "last"):
            if number in rendered:
                turns = [dict(m) for m in example.messages]
                ids = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
                assert ids == rendered[number].prompt_ids.tolist()
                whole = tokenizer.apply_chat_template(turns, return_dict=False)
                assert whole[: len(ids) + len(rendered[number].real_ids)] == [*ids, *rendered[number].real_ids.tolist()]
                seen += 1
    assert seen == len(rendered)


def test_a_text_template_with_everything_in_it() -> None:
    import jinja2

    template = text_as_jinja('<"{system}" \\n {{x}\n\n{prompt}é:  ', "<s>", "</s>")
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "{prompt}"}]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(template).render(messages=turns) == '<s><"S" \\n {{x}\n\n{prompt}é:'
    turns.append({"role": "assistant", "content": "A"})
    assert environment.from_string(template).render(messages=turns) == '<s><"S" \\n {{x}\n\n{prompt}é:  A</s>'


def test_the_card_has_data_method_numbers_and_command(runs: dict[str, RunDir], tiny: Path, tmp_path: Path) -> None:
    results = Results(runs["whole"].root)
    export_model(results, tmp_path / "out", iteration="1")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["sparring", "self-play", "spin"] and card.data.library_name == "transformers"
    for metrics in results.evaluations().values():
        assert f"{metrics['held_out_nll']:.4g}" in card.text
    for words in ("2401.01335", "52 rows of rows.jsonl", "sparring run recipe.yaml", "learning_rate: 0.003"):
        assert words in card.text, words
    assert str(tiny) not in card.content, "no folder of this machine"
    assert "held-out prompts" in card.text and "compared to" in card.text, "the headline is the report's"


def test_the_card_names_what_the_exported_iteration_was_trained_with(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("spin", iterations=4, per_iteration={0: {"method": "sft"}, 3: {"method": "space"}})
    assert describe_training(recipe, 0) == "supervised fine-tuning"
    spin, space = (f"([arXiv {paper}](https://arxiv.org/abs/{paper}))" for paper in ("2401.01335", "2512.07175"))
    assert describe_training(recipe, 3) == (
        f"supervised fine-tuning in iteration 0, then self-play fine-tuning with spin {spin} in iterations 1 to 2, "
        f"then self-play fine-tuning with space {space} in iteration 3"
    )
    assert describe_training(make_recipe("dpo"), 1) == "preference optimization with dpo"
    assert describe_training(make_recipe("tspin"), 1).startswith("self-play fine-tuning with tspin (")
    assert name_methods(recipe) == "sft, then spin, then space"


@pytest.mark.slow
def test_the_card_of_an_sft_phase(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """It trained on the rows that self-play has not, and no game was played."""
    recipe = make_recipe(
        "spin", per_iteration={0: {"method": "sft"}}, data={"self_play_rows": 16}, train={"epochs": 1}, evaluate={}
    )
    results = play(recipe, tmp_path / "run")
    assert "sft, then spin completed 2 of 2 iterations" in summary(results)
    export_model(results, tmp_path / "sft", iteration="0")
    export_model(results, tmp_path / "spin", iteration="1")
    sft, spin = (ModelCard.load(tmp_path / name / "README.md") for name in ("sft", "spin"))
    assert sft.data.tags == ["sparring", "sft"] and spin.data.tags == ["sparring", "self-play", "sft", "spin"]
    assert "Iteration 0 of 2: supervised fine-tuning, from model" in sft.text and "on 32 rows of" in sft.text
    assert "self-play" not in sft.text.partition("## Reproduce")[0] and "on 48 rows of" in spin.text


def test_the_best_iteration_and_what_is_refused(runs: dict[str, RunDir], tmp_path: Path) -> None:
    results = Results(runs["whole"].root)
    best = results.best()
    assert best is not None and best >= 0
    assert export_model(results, tmp_path / "best") == best
    cases = {
        "exists already": {"out": tmp_path / "best"},
        "not a trained iteration. Use 'best' or one of 0, 1": {"iteration": "2"},
        "--iteration last: not a trained iteration": {"iteration": "last"},
        "is a full model, not an adapter": {"merge": True},
        "Use float32, bfloat16 or float16": {"dtype": "int8"},
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message):
            export_model(results, **{"out": tmp_path / "new", **options})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="an adapter is exported in float32"):
        export_model(Results(runs["adapter"].root), tmp_path / "new", iteration="0", dtype="float16")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*tmp*")), "no partial export"


def test_a_base_that_has_changed_is_refused(runs: dict[str, RunDir], tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(runs["adapter"].root, tmp_path / "run"))
    with (Path(json.loads((run.model(0) / "base.json").read_text())["folder"]) / "config.json").open("a") as file:
        file.write(" ")
    try:
        with pytest.raises(UserError, match="has changed since the adapter was trained on it"):
            export_model(Results(run.root), tmp_path / "out", iteration="0")
    finally:
        path = Path(json.loads((run.model(0) / "base.json").read_text())["folder"]) / "config.json"
        path.write_text(path.read_text().rstrip(" "))


def pairs_of(run: RunDir, folder: Path, index: int) -> tuple[Any, dict[str, Rendered], dict[str, Generation], int]:
    """(the pairs of an iteration, its rows, its responses, how many texts of the run are inexact by the card)."""
    count = export_pairs(Results(run.root), folder / "pairs")
    data = load_dataset(str(folder / "pairs"), cache_dir=str(folder / "cache"))
    assert list(data) == ["iteration_00", "iteration_01"] and sum(len(split) for split in data.values()) == count
    iteration = Iteration(run, Results(run.root).recipe, index)
    rows = {row.id: row for row in iteration.train_rows()}
    generated = {answer.id: answer for answer in read_iteration(iteration, index)}
    counted = int(re.findall(r"(\d+) of \d+ texts give different", (folder / "pairs" / "README.md").read_text())[0])
    return data[f"iteration_{index:02d}"], rows, generated, counted


def test_pairs_of_a_text_template_are_texts(runs: dict[str, RunDir], tmp_path: Path) -> None:
    """They tokenize to the run's tokens again."""
    run = runs["adapter"]
    pairs, rows, generated, counted = pairs_of(run, tmp_path, 1)
    tokenizer, end = load_tokenizer(run.model(1)), 3
    inexact = 0
    for pair in pairs:
        row, response = rows[pair["id"]], generated[pair["id"]]

        def again(text: str, finish: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"] + ([end] if finish == "stop" else [])

        assert tokenizer(pair["prompt"])["input_ids"] == row.prompt_ids.tolist()
        assert again(pair["chosen"], pair["chosen_finish"]) == row.real_ids.tolist()
        inexact += again(pair["rejected"], pair["rejected_finish"]) != response.token_ids.tolist()
    assert inexact < len(rows) / 2, "a tiny model may generate text that tokenizes differently"
    assert inexact <= counted <= inexact + len(rows), "the card counts them, over both iterations"


def test_pairs_of_a_chat_template_are_messages(runs: dict[str, RunDir], tiny: Path, tmp_path: Path) -> None:
    """The user's, and rendered by TRL they are the run's tokens."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed; it is in the dev group")
    run = runs["whole"]
    pairs, rows, generated, counted = pairs_of(run, tmp_path, 1)
    tokenizer = load_tokenizer(run.model(1))
    user = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    inexact = 0
    for pair in pairs:
        row, response = rows[pair["id"]], generated[pair["id"]]
        assert data_utils.is_conversational(pair)
        assert pair["prompt"] == [{"role": "user", "content": user[row.row - 1]["question"]}]
        if row.real_finish == "stop":
            assert pair["chosen"] == [{"role": "assistant", "content": user[row.row - 1]["answer"]}]
        texts = data_utils.apply_chat_template({n: pair[n] for n in ("prompt", "chosen", "rejected")}, tokenizer)
        ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
        assert ids["prompt"] == row.prompt_ids.tolist()
        assert ids["chosen"][: len(row.real_ids)] == row.real_ids.tolist()
        inexact += ids["rejected"][: len(response.token_ids)] != response.token_ids.tolist()
    assert inexact < len(rows) / 2 and inexact <= counted <= inexact + len(rows)


def test_pairs_keep_tools_calls_and_thoughts(tiny: Path, tmp_path: Path) -> None:
    """A turn has the keys of the user's turn, and none of other turns as null."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3", "reasoning_content": "So 3."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    plain = {"messages": [turns[0], {"role": "assistant", "content": "3"}]}
    settings = Data(train="rows.jsonl")
    renderer = Renderer(
        load_tokenizer(tiny / "model"), template=None, end_token=None, max_length=100, max_response=None
    )
    pairs = []
    for user in (plain, {"messages": turns, "tools": tools}):
        (example,) = examples(user, 1, detect_format(user, {}, None, ""), "last")
        ids = np.array([5, 6], dtype=np.int32)
        row = Rendered(example.id, 1, ids, ids, "stop", "", "", source=json.dumps(user))
        pairs.append(chat_pair(renderer, settings, row, Generation(example.id, 0, ids, "length"))[0])
        with pytest.raises(CorruptedError, match="row 1: no example of its source has the id other"):
            chat_pair(renderer, settings, replace(row, id="other"), Generation("other", 0, ids, "length"))
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
    rest = {key: [None, None] for key in ("id", "sample", "chosen_finish", "rejected_finish")}
    write_table(tmp_path / "pairs.parquet", schema(TURNS), columns | rest)
    first, second = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    assert (first["prompt"], first["chosen"], first["tools"]) == (plain["messages"][:1], plain["messages"][1:], None)
    assert second["prompt"] == turns[:-1] and second["chosen"] == turns[-1:] and json.loads(second["tools"]) == tools


def test_push_takes_exports_without_local_folders(runs: dict[str, RunDir], tmp_path: Path) -> None:
    export_model(Results(runs["whole"].root), tmp_path / "out", iteration="0")
    with pytest.raises(UserError, match="not a repository name"):
        push_folder(tmp_path / "out", "model")
    with pytest.raises(UserError, match="was not made by 'sparring export'"):
        push_folder(runs["whole"].model(0), "me/model")
    export_model(Results(runs["adapter"].root), tmp_path / "adapter", iteration="0")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"].startswith("/")
    with pytest.raises(UserError, match="Nothing was uploaded:\n.*the base model is a local folder"):
        push_folder(tmp_path / "adapter", "me/model")


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "a" * 34, "sk-proj-" + "b" * 24, "AKIA" + "A1" * 8, "ghp_" + "c" * 36, "-----BEGIN RSA PRIVATE KEY-----"],
)
def test_secrets_are_found_in_cards_and_in_rows(
    runs: dict[str, RunDir], tiny: Path, tmp_path: Path, secret: str
) -> None:
    from sparring.commands.export.push import find_problems

    (tmp_path / "README.md").write_text(f"fine\nkey: {secret}\n")
    assert [p.partition(":")[0] for p in find_problems(tmp_path / "README.md")] == ["README.md, line 2"]
    (tmp_path / "README.md").write_text("an answer about hf_hub, sk-learn and AKIA\n")
    assert not list(find_problems(tmp_path / "README.md"))


@contextmanager
def asking(command: str, folder: Path) -> Iterator[Callable[[str, dict[str, object]], dict[str, Any]]]:
    """A real server on an exported folder: (path, body) -> answer."""
    with started_server(command, folder, "float32") as (url, token):

        def ask(path: str, body: dict[str, object]) -> dict[str, Any]:
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
            assert response.status == 200, text
            return json.loads(text)

        yield ask


@needs_vllm
@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_vllm_gives_the_same_greedy_tokens(runs: dict[str, RunDir], tiny: Path, tmp_path: Path, kind: str) -> None:
    """Token ids in, token ids out: an export's weights, alone, as an adapter beside its base, and merged."""
    raw = Results(runs["adapter"].root).recipe.model_dump(by_alias=True, mode="json")
    raw["train"]["dtype"] = "float32"  # bfloat16, as in `runs`, differs in rounding
    run = runs["whole"] if kind == "whole" else play(Recipe.model_validate(raw), tmp_path / "run").run
    export_model(Results(run.root), tmp_path / "out", iteration="1", merge=kind == "merged")
    expected = greedy_in_the_run(run, 1)
    if kind != "adapter":
        assert greedy_in_transformers(tmp_path / "out", run) == expected
    assert greedy_in_the_run(run, 0) != expected, "control: another iteration responds differently"
    recipe, data = Results(run.root).recipe, Iteration(run, Results(run.root).recipe, 1).data
    engine = VllmBackend(
        tmp_path / "out",
        end_ids=data.end_ids,
        max_length=data.max_length,
        dtype=recipe.train.dtype,
        python=VLLM_PYTHON,
    )
    try:
        iteration = Iteration(run, recipe, 1)
        found = answer(iteration, engine, iteration.held_out_rows(), greedy=True)
    finally:
        engine.close()
    assert {a.id: a.token_ids.tolist() for a in found} == expected


@needs_vllm
def test_vllm_serves_an_export_as_it_is(runs: dict[str, RunDir], tiny: Path, tmp_path: Path) -> None:
    """Its own tokenizer, chat template and generation config: messages in, and out the words of the run."""
    run = runs["whole"]
    export_model(Results(run.root), tmp_path / "out", iteration="1")
    expected, tokenizer = greedy_in_the_run(run, 1), load_tokenizer(run.model(1))
    serve = (
        f"{VLLM_PYTHON} -m vllm.entrypoints.openai.api_server --model {{model}} --host 127.0.0.1 --port {{port}} "
        "--api-key {token} --dtype {dtype} --enforce-eager"
    )
    rows = dict(enumerate(json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()))
    with asking(serve, tmp_path / "out") as ask:
        for row in read_rendered(run.data / "held_out.parquet"):
            messages = [{"role": "user", "content": rows[row.row - 1]["question"]}]
            body = {"model": str(tmp_path / "out"), "messages": messages, "temperature": 0, "max_tokens": 12}
            reply = ask("/v1/chat/completions", body)
            assert reply["usage"]["prompt_tokens"] == len(row.prompt_ids)
            ids = expected[row.id]
            assert reply["choices"][0]["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert reply["choices"][0]["finish_reason"] == ("stop" if ids[-1] == 3 else "length")
