"""Benchmarks of lm-evaluation-harness in a process of their own, with local data, and what becomes of their results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import decode_answers, load_model, load_tokenizer
from sparring.recipe.benchmarks import SUITES, parse_tasks
from sparring.recipe.load import differences
from sparring.recipe.schema import Recipe
from sparring.report import render
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.results import Results
from sparring.stages.evaluate.harness import run_in_subprocess
from sparring.stages.generate.hf import HfBackend
from sparring.types import Prompt

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'sparring[lm-eval]'"
)

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "<|user|>{{{{question}}}}<|end|><|assistant|>"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["#"], do_sample: false, max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def task(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tasks") / "sums.yaml"
    file.write_text(TASK.format(rows=tiny / "rows.jsonl"), encoding="utf-8")
    return file


def test_every_iteration_is_measured(make_recipe: MakeRecipe, task: Path, tiny: Path, tmp_path: Path) -> None:
    """Asked of a run that exists: nothing is trained again. The answers are those of the policy of each iteration."""
    plain = make_recipe("sft", iterations=1, data={"held_out": 0, "limit": 48})
    run = play(plain, tmp_path / "run").run
    trained = (run.stage(0, "train") / "MANIFEST.json").read_bytes()
    harness = {"tasks": [f"{task}:0"], "limit": 6}
    recipe = make_recipe("sft", iterations=1, data={"held_out": 0, "limit": 48}, evaluate={"harness": harness})
    assert not differences(plain, recipe)
    play(recipe, tmp_path / "run")
    assert (run.stage(0, "train") / "MANIFEST.json").read_bytes() == trained

    results = Results(run.root)
    values = results.benchmarks()[("sums-0shot-first6", "exact_match")]
    assert sorted(values) == [-1, 0] and all(spread.startswith("± ") for _, spread in values.values())
    said = {}
    for index in (-1, 0):
        iteration = Iteration(run, recipe, index)
        folder = iteration.stage("benchmarks/sums-0shot-first6")
        assert read_manifest(folder).input_digests.keys() >= run.input_digests(iteration.policy).keys()
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        said[index] = [sample["answers"][0] for sample in samples]
        rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()][:6]
        tokenizer = load_tokenizer(iteration.policy)
        prompts = []
        for number, row in enumerate(rows):
            ids = tokenizer(f"<|user|>{row['question']}<|end|><|assistant|>", return_tensors="np")["input_ids"][0]
            prompts.append(Prompt(str(number), 0, ids.astype("int32"), 12, 0))
        model = load_model(iteration.policy, dtype=torch.float32, device=torch.device("cpu"))
        engine = HfBackend(model, end_ids=iteration.data.end_ids, batch_size=1)
        ours = decode_answers(tokenizer, list(engine.generate(prompts, greedy=True)))
        assert said[index] == [text.partition("#")[0] for text in ours]
    assert said[-1] != said[0], "two policies, two answers: nothing of the start is used again"
    page = render(run)
    assert "<h2>Benchmarks</h2>" in page and "sums-0shot" in page
    assert [s.state for s in results.stages() if s.stage == "benchmarks/sums-0shot-first6"] == ["done", "done"]


def test_what_the_harness_refuses_is_one_message(make_recipe: MakeRecipe, task: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(task.read_text().replace("test_split: test", "test_split: nowhere"))
    harness = {"tasks": [str(broken)], "limit": 2}
    recipe = make_recipe("sft", iterations=1, data={"held_out": 0, "limit": 48}, evaluate={"harness": harness})
    with pytest.raises(UserError, match=r"(?s)evaluate\.harness: .*broken\.yaml of .*nowhere"):
        play(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="there is no file .*other.yaml"):
        play(make_recipe("sft", evaluate={"harness": {"tasks": [str(tmp_path / "other.yaml")]}}), tmp_path / "run2")


def test_names_shots_and_suites() -> None:
    found = parse_tasks(["a/b/mine.yaml:3", "arc_challenge", "gsm8k:8"])
    assert [(t.name, t.num_shots, t.label) for t in found] == [
        ("a/b/mine.yaml", 3, "mine-3shot"),
        ("arc_challenge", None, "arc_challenge"),
        ("gsm8k", 8, "gsm8k-8shot"),
    ]
    assert [task.num_shots for task in parse_tasks(["tspin"])] == [5, 4, 0, 5, 5, 0, 10, 5, 3, 0]
    assert [task.num_shots for task in parse_tasks(["spin"])] == [25, 0, 5, 5, 10, 5]


def test_a_task_is_named_once(make_recipe: MakeRecipe) -> None:
    for tasks in (["gsm8k:5", "gsm8k:5"], ["tspin", "mmlu:5"], ["../gsm8k"], []):
        with pytest.raises(ValueError, match="listed twice, or is not a task name|at least 1 item"):
            make_recipe(evaluate={"harness": {"tasks": tasks}})


def test_the_harness_knows_every_task_of_the_suites() -> None:
    folder = Path(lm_eval.__file__).parent / "tasks"
    files = [
        f
        for word in ("gsm8k", "leaderboard", "mmlu", "hellaswag", "winogrande", "ifeval", "arc", "truthfulqa")
        for f in (folder / word).rglob("*.yaml")
    ]
    named = {name for f in files for name in re.findall(r"^(?:task|group):\s*(\S+)", f.read_text(), re.MULTILINE)}
    assert {task.name for suite in SUITES for task in parse_tasks([suite])} <= named


def request(shared: Path, file: Path, **changes: object) -> dict[str, object]:
    return {
        "model": str(shared / "models" / "stories260K"),
        "task": str(file),
        "num_shots": None,
        "limit": 4,
        "batch_size": 2,
        "dtype": "float32",
        "in_4bit": False,
        "end_ids": [1, 2],
        "chat_template": None,
        "threads": 1,
        **changes,
    }


def test_gsm8k_offline(shared: Path, tmp_path: Path) -> None:
    """The harness's own task, with the rows from a folder in place of the hub; two of its shots, on a model that
    knows stories only."""
    stock = (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8")
    data = shared / "data" / "gsm8k"
    local = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {data}/train.jsonl, test: {data}/test.jsonl}}}}\n"
    )
    text = stock.replace("dataset_path: openai/gsm8k\ndataset_name: main\n", local)
    assert text != stock
    (tmp_path / "gsm8k_here.yaml").write_text(text.replace("do_sample: false", "max_gen_toks: 24\n  do_sample: false"))
    found = run_in_subprocess(request(shared, tmp_path / "gsm8k_here.yaml", num_shots=2))
    assert found["metrics"].keys() >= {"exact_match/strict-match", "exact_match/strict-match_stderr"}
    assert found["shots"] == {"gsm8k": 2} and found["num_rows"]["gsm8k"] == {"original": 1319, "effective": 4}
    assert all("#### " in sample["target"] for sample in found["samples"])


def test_ifeval_offline(shared: Path, tmp_path: Path) -> None:
    """With the harness's own checkers. A story has no comma in 48 tokens by chance only; it is lower case never."""
    rows = [json.loads(line) for line in (shared / "data" / "ifeval" / "input_data.jsonl").read_text().splitlines()]
    kinds = {"punctuation:no_comma", "length_constraints:number_words", "change_case:english_lowercase"}
    chosen = [row for row in rows if set(row["instruction_id_list"]) <= kinds][:6]
    assert len(chosen) == 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    stock = (Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml").read_text(encoding="utf-8")
    local = f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {tmp_path}/rows.jsonl}}}}\n"
    text = stock.replace("dataset_path: google/IFEval\ndataset_name: null\n", local).replace("1280", "48")
    assert "json" in text
    (tmp_path / "ifeval_here.yaml").write_text(text)
    (tmp_path / "utils.py").write_text("from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results\n")
    found = run_in_subprocess(request(shared, tmp_path / "ifeval_here.yaml", limit=None))
    assert found["num_rows"]["ifeval"]["effective"] == 6
    for row, sample in zip(chosen, found["samples"], strict=True):
        followed = [
            is_followed(kind, more, sample["answers"][0])
            for kind, more in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        ]
        assert sample["inst_level_strict_acc"] == followed, sample["answers"]
    assert (
        0 <= found["metrics"]["prompt_level_strict_acc"] <= 1 and "prompt_level_strict_acc_stderr" in found["metrics"]
    )


def is_followed(kind: str, more: dict[str, object], answer: str) -> bool:
    """Three checks of IFEval, written again."""
    if not answer.strip():
        return False
    match kind:
        case "punctuation:no_comma":
            return "," not in answer
        case "change_case:english_lowercase":
            return answer == answer.lower()
        case _:
            enough = len(re.findall(r"\w+", answer)) >= int(str(more["num_words"]))
            return enough == (more["relation"] == "at least")
