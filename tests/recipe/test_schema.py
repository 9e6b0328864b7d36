"""Recipes: strict, with complaints that say where and what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import UserError
from sparring.objectives import OBJECTIVES, Dpo, Space, Spin, Tspin, TspinRef
from sparring.recipe import schema, yaml
from sparring.recipe.load import differences, dump_recipe, known_keys, load_recipe, make_recipe
from sparring.recipe.schema import SECTIONS, Recipe

SMALLEST = "model: m\nmethod: spin\ndata:\n  train: rows.jsonl\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def read(text: str) -> dict[str, Any]:
    raw, _ = yaml.parse(text, "text")
    assert isinstance(raw, dict)
    return raw


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_contract_of_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the README, every key of it, on hardware that multiplies in bfloat16."""
    monkeypatch.setattr(schema, "has_bfloat16_products", lambda: True)
    recipe = load(
        tmp_path,
        """
model: path-or-hub-id
method: {name: tspin, alpha: 1.0, beta: 0.1}
iterations: 4
data: {train: rows.jsonl, held_out: 0.05, columns: {}, template: null, turns: last, limit: null}
generate: {backend: hf, max_new_tokens: 256, temperature: 1.0, top_p: 1.0, samples: 1}
train: {optimizer: rmsprop, learning_rate: 5.0e-7, schedule: linear, warmup_ratio: 0.1, epochs: 2, batch_size: 64,
        micro_batch_tokens: auto, max_length: 2048, dtype: auto, max_grad_norm: 1.0}
evaluate: {checker: null, save_best_by: held_out_nll}
per_iteration: {}
seed: 0
""",
    )
    assert recipe == load(tmp_path, "model: path-or-hub-id\nmethod: tspin\ndata: {train: rows.jsonl}\n"), (
        "these are the defaults"
    )


def test_published_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, SMALLEST).method == Spin(lambda_=0.1, loss="logistic", rounds=2)
    assert make_recipe(read(SMALLEST) | {"method": "space"}).method == Space(mu=1.0)
    tspin = make_recipe(read(SMALLEST) | {"method": "tspin"})
    assert [tspin.at(0).method, tspin.at(1).method] == [Tspin(beta=0.0), Tspin(alpha=1.0, beta=0.1)]


@pytest.mark.parametrize("method", [Tspin, TspinRef])
@pytest.mark.parametrize(
    ("table", "betas"),
    [
        ({}, [0.0, 0.3, 0.3]),
        ({1: {"train.epochs": 1}}, [0.0, 0.3, 0.3]),
        ({0: {"train.epochs": 1}}, [0.0, 0.3, 0.3]),
        ({2: {"method.beta": 0.2}}, [0.0, 0.3, 0.2]),
        ({0: {"method.beta": 0.2}}, [0.2, 0.3, 0.3]),  # what is asked for is not touched
        ({0: {"method": "sft"}}, [None, 0.0, 0.3]),
        ({0: {"method": {"name": "sft"}}, 1: {"method": "spin"}}, [None, None, 0.0]),
    ],
)
def test_beta_is_0_in_the_own_first_round_of_tspin(
    method: type[Tspin | TspinRef], table: dict[int, object], betas: list[float | None]
) -> None:
    """Whatever else changes between iterations, and after a phase of another method."""
    raw = read(SMALLEST) | {"method": {"name": method.name, "beta": 0.3}, "per_iteration": table}
    recipe = make_recipe(raw)
    assert [getattr(recipe.at(t).method, "beta", None) for t in range(3)] == betas
    assert recipe.method == method(beta=0.3), "the recipe says what it plays"
    assert [make_recipe(read(dump_recipe(recipe))).at(t) for t in range(3)] == [recipe.at(t) for t in range(3)]


def test_a_later_phase_of_tspin_begins_with_its_first_round() -> None:
    recipe = make_recipe(read(SMALLEST) | {"per_iteration": {t: {"method": "tspin"} for t in (2, 3)}})
    assert [recipe.at(t).method for t in range(4)] == [Spin(), Spin(), Tspin(beta=0.0), Tspin()]
    given = make_recipe(read(SMALLEST) | {"per_iteration": {2: {"method": {"name": "tspin", "beta": 0.5}}}})
    assert given.at(2).method == Tspin(beta=0.5)


def test_numbers_and_words_are_what_people_mean(tmp_path: Path) -> None:
    text = SMALLEST + "  template: no\ntrain: {learning_rate: 5e-7, warmup_ratio: 0, batch_size: 8}\n"
    recipe = load(tmp_path, text)
    assert (recipe.train.learning_rate, recipe.data.template, recipe.train.warmup_ratio) == (5e-7, "no", 0)
    assert load(tmp_path, SMALLEST + "  held_out: 5e-2\n").data.held_out == 0.05
    assert load(tmp_path, SMALLEST + "  held_out: 100\n").data.held_out == 100
    assert load(tmp_path, SMALLEST + "  held_out: held.jsonl\n").data.held_out == "held.jsonl"


def test_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST, "train.learning_rate=1e-5", "method.lambda=5", "data.template=a=b={prompt}")
    assert (recipe.train.learning_rate, recipe.method, recipe.data.template) == (1e-5, Spin(lambda_=5), "a=b={prompt}")
    assert load(tmp_path, SMALLEST, "method=space").method == Space()
    assert load(tmp_path, SMALLEST, "per_iteration={1: {train.epochs: 1}}").at(1).train.epochs == 1
    assert "Write key=value" in refusal(tmp_path, SMALLEST, "train.epochs")
    assert "train.epoch" in refusal(tmp_path, SMALLEST, "train.epoch=3")
    assert "cannot be set, since train is not a mapping" in refusal(tmp_path, SMALLEST, "data.train.x=3")


def test_per_iteration_takes_any_coefficient(tmp_path: Path) -> None:
    table = "per_iteration:\n  2: {train.learning_rate: 1e-7}\n  3: {train.learning_rate: 1e-7, method.lambda: 5.0}\n"
    recipe = load(tmp_path, SMALLEST + table)
    assert [recipe.at(t).train.learning_rate for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [recipe.at(t).method for t in range(4)] == [Spin(), Spin(), Spin(), Spin(lambda_=5.0)]


def test_a_later_phase_may_have_another_method(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST + "per_iteration: {3: {method: {name: dpo, beta: 0.05}, train.epochs: 1}}\n")
    assert [recipe.at(t).method for t in range(4)] == [Spin(), Spin(), Spin(), Dpo(beta=0.05)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{0: {method.beta: 3}}", "per_iteration.0"),
        ("{0: {data.limit: 3}}", "cannot change between iterations"),
        ("{0: {method.name: tspin}}", "cannot change between iterations"),
        ("{0: {method.lambda: -1}}", "greater than 0"),
        ("{x: {method.lambda: 1}}", "per_iteration"),
        ("{1: {generate.max_new_tokens: 512}}", "per_iteration.1: generate.max_new_tokens would be 512, but 256 in"),
        ("{2: {generate: {max_new_tokens: 64}}}", "Use one generate.max_new_tokens, or another run"),
        ("{1: {train.max_length: 512}}", "train.max_length would be 512, but 2048 in other iterations"),
    ],
)
def test_per_iteration_is_strict(tmp_path: Path, table: str, message: str) -> None:
    assert message in refusal(tmp_path, SMALLEST + f"per_iteration: {table}\n")


def test_rows_that_are_not_truncated_leave_the_limit_of_generation_free(tmp_path: Path) -> None:
    text = SMALLEST + "  truncate_real: false\nper_iteration: {1: {generate.max_new_tokens: 512}}\n"
    assert [load(tmp_path, text).at(t).generate.max_new_tokens for t in range(3)] == [256, 512, 256]
    whole = SMALLEST + "per_iteration: {1: {generate: {temperature: 0.5}, train: {epochs: 1}}}\n"
    assert load(tmp_path, whole).at(1).train.epochs == 1, "a whole section has the same limits, those of the defaults"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALLEST + "model: x\n", 'line 5: found duplicate key "model"'),
        (SMALLEST + "train:\n  learning_rat: 1\n", "line 6: there is no setting 'train.learning_rat'; did you mean"),
        (SMALLEST + "learning_rate: 1\n", "line 5: there is no setting 'learning_rate'; did you mean 'train.learning"),
        (SMALLEST.replace("spin", "{name: spin, beta: 1}"), "'method.beta' of spin; it belongs to tspin"),
        (SMALLEST.replace("spin", "{name: spin, lamda: 1}"), "'method.lamda' of spin; did you mean 'method.lambda'?"),
        (SMALLEST.replace("spin", "spinn"), "method.name must be one of sft, dft, rft, sdft, spin, tspin, space"),
        (SMALLEST.replace("model: m\n", ""), "'model' is missing"),
        (SMALLEST + "seed: -1\n", "line 5: seed: input should be greater than or equal to 0, not -1"),
        (SMALLEST + "train: {epochs: 1.5}\n", "train.epochs"),
        (SMALLEST + "evaluate: {checker: numbre}\n", "evaluate.checker"),
        (SMALLEST + "evaluate: {checker: {regex: '('}}\n", "not a regular expression"),
        (SMALLEST + "evaluate: {save_best_by: greedy_accuracy}\n", "needs evaluate.checker"),
        (SMALLEST + "adapter: {lora_dropout: 0.05}\n", "there is no setting 'adapter.lora_dropout'"),
        (SMALLEST + "adapter: {modules_to_save: [x]}\n", "there is no setting 'adapter.modules_to_save'"),
        (SMALLEST + "adapter: {merge: at_the_end}\n", "adapter.merge: input should be 'each_iteration'"),
        (SMALLEST + "adapter: {rank: 8}\n", "there is no setting 'adapter.rank'"),
        (SMALLEST + "train: [1, 2\n", "line"),
        (SMALLEST + "a: &x 1\nb: *x\n", "aliases"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_complaints(tmp_path: Path, text: str, message: str) -> None:
    found = refusal(tmp_path, text)
    assert message in found
    assert str(tmp_path / "recipe.yaml") in found


@pytest.mark.parametrize("added", ["lamda: 1", "gama: 1", "alpa: 1"])
def test_no_coefficient_of_another_method_is_suggested(tmp_path: Path, added: str) -> None:
    """sft has none; neither below `method` nor at the top."""
    for text in (SMALLEST.replace("spin", f"{{name: sft, {added}}}"), SMALLEST.replace("spin", "sft") + added + "\n"):
        assert "did you mean 'method." not in refusal(tmp_path, text)


def test_100_misspelt_or_misplaced_keys_are_all_named(tmp_path: Path) -> None:
    """Every key without its last letter, with two letters swapped, and in another section."""
    sections = {key: key.rpartition(".")[0] for key in known_keys() if "." in key}
    cases = 0
    for key, section in sections.items():
        name = key.rpartition(".")[2]
        if section == "method" or len(name) < 4:
            continue
        swapped = name[:1] + name[2] + name[1] + name[3:]
        for wrong in {name[:-1], swapped, name + "s"} - {k.rpartition(".")[2] for k in sections}:
            message = refusal(tmp_path, SMALLEST, f"{section}.{wrong}=1")
            assert f"'{section}.{wrong}'" in message and f"did you mean '{key}'" in message, message
            cases += 1
        elsewhere = "train" if section != "train" else "generate"
        if f"{elsewhere}.{name}" not in sections:
            message = refusal(tmp_path, SMALLEST, f"{elsewhere}.{name}=1")
            owners = [f"did you mean '{other}'" in message for other in sections if other.endswith(f".{name}")]
            assert f"'{elsewhere}.{name}'" in message and any(owners), message
            cases += 1
    assert cases >= 100


def test_misplaced_and_misspelt_keys_at_the_top_are_named_with_their_line(tmp_path: Path) -> None:
    """The mistakes of a file: a setting that stands outside its section, a section that is misspelt."""
    top = {key for key in known_keys() if "." not in key}
    outside = {key.rpartition(".")[2] for key in known_keys() if "." in key and not key.startswith("method.")} - top
    misspelt = {word for key in top if len(key) > 3 for word in (key[:-1], key[0] + key[2] + key[1] + key[3:])} - top
    for wrong in outside | misspelt:
        message = refusal(tmp_path, SMALLEST + f"{wrong}: 1\n")
        assert f"line 5: there is no setting '{wrong}'; did you mean '" in message, message
    assert len(outside) > 45 and len(misspelt) > 20


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST + "per_iteration: {3: {method.lambda: 5.0}}\n", "train.learning_rate=5e-7")
    again = load(tmp_path, dump_recipe(recipe))
    assert again == recipe
    assert differences(recipe, again) == []


def test_differences_tell_what_changes_results(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST)
    assert differences(recipe, load(tmp_path, SMALLEST, "train.learning_rate=1e-6")) == [
        "train.learning_rate is 1e-06, but the run was started with 5e-07"
    ]
    neutral = ("iterations=9", "train.checkpoint_minutes=5.5")
    assert differences(recipe, load(tmp_path, SMALLEST, *neutral)) == []


def test_every_coefficient_of_every_objective_is_a_key() -> None:
    for objective in OBJECTIVES.values():
        for field in dataclasses.fields(objective):
            assert f"method.{field.name.rstrip('_')}" in known_keys()
    assert set(SECTIONS) < set(known_keys())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        value, _ = yaml.parse(text, "text")
        make_recipe(value)
    except UserError:
        pass


@pytest.mark.parametrize("is_fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_follows_the_processor_and_a_run_keeps_it(
    monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: str
) -> None:
    monkeypatch.setattr("sparring.recipe.schema.has_bfloat16_products", lambda: is_fast)
    raw: dict[str, object] = {"model": "m", "method": "spin", "data": {"train": "rows.jsonl"}, "train": {"epochs": 1}}
    recipe = Recipe.model_validate(raw)
    assert recipe.train.dtype == dtype
    monkeypatch.setattr("sparring.recipe.schema.has_bfloat16_products", lambda: not is_fast)
    assert Recipe.model_validate(recipe.model_dump(by_alias=True)).train.dtype == dtype
    assert recipe.at(1).train.dtype == dtype
    for change in ({"train.dtype": "auto"}, {"train": {"epochs": 2}}, {"train": {"dtype": "auto"}}):
        assert Recipe.model_validate({**raw, "per_iteration": {1: change}}).at(1).train.dtype != dtype
        kept = Recipe.model_validate({**recipe.model_dump(by_alias=True), "per_iteration": {1: change}})
        assert kept.at(1).train.dtype == dtype, "auto is the run's dtype in every iteration"
    asked = Recipe.model_validate({**raw, "train": {"dtype": "float32"}})
    assert asked.train.dtype == "float32", "what is asked for is not touched"


def test_characters_beyond_16_bits_as_json_writes_them(tmp_path: Path) -> None:
    text = SMALLEST.replace("rows.jsonl", r'"\ud83d\ude00.jsonl"')
    assert text != SMALLEST and load(tmp_path, text).data.train == "😀.jsonl"
    assert "half of a character" in refusal(tmp_path, SMALLEST.replace("rows.jsonl", r'"\ud83d.jsonl"'))
