"""Writes the tables and the figure of README.md and docs/ from benchmarks/results/*.json.

    python benchmarks/page.py

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, and is replaced there. A test keeps the pages
equal to the numbers. The sentences around the tables are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from scipy import stats

from sparring.run.estimate import DIFFERENCE, estimate

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FIGURE = ROOT / "docs" / "claims.svg"
MARK = re.compile(r"(<!-- results: ([^>]+?) -->)\n.*?<!-- end -->", re.DOTALL)

CAPABILITIES = (80, 86, 89, 90, 100)

Table = list[list[str]]
"""Rows of cells, the header first."""


@cache
def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def filled(page: str) -> str:
    """The page with each marked table replaced by the table of that name."""
    return MARK.sub(lambda match: f"{match[1]}\n{markdown(TABLES[match[2]]())}\n<!-- end -->", page)


def interval(values: np.ndarray) -> dict[str, object]:
    """Mean and 95 % interval over seeds, Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return {
        "mean": round(float(values.mean()), 4),
        "half_width_95": round(float(half), 4),
        "seeds": values.round(4).tolist(),
    }


def markdown(table: Table) -> str:
    rule = ["---"] + ["--:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (table[0], rule, *table[1:]))


# The demo over six seeds: README.md, docs/results.md.


def demo() -> Table:
    arms = results("demo_seeds")["arms"]

    def values(method: str, metric: str, *iterations: str) -> str:
        found = arms[f"{method}, 0.0003"]["by_iteration"][metric]
        return ", ".join(f"{found[i]['mean']:.3f}" for i in iterations)

    rows = [["", "held-out NLL: start, iterations 0-2", "greedy accuracy: start, last"]]
    labels = {"sft": "continued SFT", "space": "SPACE", "tspin": "T-SPIN", "spin": "SPIN, lambda 0.1"}
    for method, label in labels.items():
        nll = values(method, "held_out_nll", "start", "0", "1", "2")
        rows.append([label, nll, values(method, "greedy_accuracy", "start", "2")])
    return rows


# One training step and one epoch: docs/performance.md.

STEP_ARMS = {
    "plain": "plain loop",
    "two-models": "two models",
    "trl": "TRL default",
    "trl-cached": "TRL cached",
    "trl-tuned": "TRL tuned",
    "trl-cpo": "TRL CPO twice",
    "padded": "padded rows",
    "shared-pair": "pair",
}
DTYPES = ("fp32", "bf16")
PAIRS = tuple(f"{profile} pair {dtype}" for profile in ("chat", "long-prompt", "long-answer") for dtype in DTYPES)
SHAPES = ("256/64 pair", "128/128 pair", "64/192 pair")
STEP_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # other arms, and cases
    "headline": (("plain", "trl", "trl-tuned"), PAIRS),
    "pairs": (("two-models", "plain", "trl", "trl-cached", "trl-tuned", "padded"), PAIRS),
    "triplets": (
        ("plain", "trl-cpo", "padded", "shared-pair"),
        tuple(case.replace("pair", "triplet") for case in PAIRS),
    ),
    "shapes": (
        ("plain", "trl-tuned"),
        (
            *(f"{shape} {dtype}" for shape in SHAPES for dtype in DTYPES),
            *(f"chat pair {dtype} {size}" for size in ("150k", "160m") for dtype in DTYPES),
        ),
    ),
    "answers": (("plain",), tuple(f"chat k={k} {dtype}" for dtype in DTYPES for k in (1, 3, 7))),
    "rows": (("padded",), tuple(f"row-{k}k {dtype}" for dtype in DTYPES for k in (2, 4, 8))),
}


def step(name: str) -> Table:
    """Our median seconds, and the other arms' as multiples of ours."""
    arms, cases = STEP_CASES[name]
    details = [] if name == "headline" else ["range", "of peak"]
    rows = [["", "sparring, s", *details, *(STEP_ARMS[arm] for arm in arms)]]
    for case in measured(cases):
        found = results("step")["results"][case]["summary"]["arms"]
        ours = found["shared"]
        seconds = ours["seconds"]
        cells = [f"{seconds['min']:.2f}-{seconds['max']:.2f}", f"{ours['share_of_matrix_peak']:.0%}"]
        times = [f"{found[arm]['times_ours']:.2f}x" if arm in found else "" for arm in arms]
        rows.append([short(case), f"{seconds['median']:.2f}", *(cells if details else []), *times])
    return rows


def step_memory() -> Table:
    """MiB over the weights at the peak of a step."""
    arms = ("plain", "trl", "trl-tuned", "padded")
    rows = [["", "sparring", *(STEP_ARMS[arm] for arm in arms)]]
    for case in measured(PAIRS):
        found = results("step")["results"][case]["summary"]["arms"]
        rows.append([short(case), *(f"{found[arm]['mib_over_weights']:,}" for arm in ("shared", *arms))])
    return rows


def measured(cases: Sequence[str]) -> list[str]:
    return [case for case in cases if case in results("step")["results"]]


def short(case: str) -> str:
    return case.replace(" pair", "").replace(" triplet", "")


def epoch() -> Table:
    labels = {
        "epoch": "SPIN",
        "epoch_triplets": "T-SPIN",
        "epoch_smollm2": "SPIN, SmolLM2-135M",
    }
    rows = [["", "rounds", "sparring, s", "plain loop", "TRL", "peak MiB: sparring, plain loop, TRL"]]
    for name, label in labels.items():
        arms = results(name)["arms"]
        order = [arms["sparring"], arms["plain"], arms.get("trl") or arms["trl-cpo"]]
        seconds = order[0]["cpu_seconds"]
        times = [f"{arm['times_the_first_arm']:.1f}x" for arm in order[1:]]
        peaks = ", ".join(f"{arm['peak_mib']:,}" for arm in order)
        rows.append([label, str(len(seconds)), f"{np.median(seconds):.1f}", *times, peaks])
    return rows


# Engines, scale, first commands, memory of an adapter: docs/engines.md, clusters.md, performance.md, adapters.md.


ENGINES = {
    "bare vllm": "vLLM alone",
    "vllm": "`vllm`",
    "vllm, no log-probs": "`vllm`, without the 64 checked log-probs",
    "hf": "`hf`",
    "hf, eager attention": "`hf`, eager attention",
}


def engines() -> Table:
    found = results("generate")
    rows = [["", "tokens/s", "over vLLM alone"]]
    for arm, label in ENGINES.items():
        if arm in found["tokens_per_second"]:
            over = found["overhead_over_bare_vllm"].get(arm)
            speed = around(found["tokens_per_second"][arm], 1, ",.0f")
            rows.append([label, speed, percent(over["wall"]) if over else ""])
    return rows


def engines_of_a_real_model() -> Table:
    found = results("generate_smollm2")
    rows = [["", "tokens per CPU second", "CPU seconds of each round"]]
    for arm, label in ENGINES.items():
        seconds = found["cpu_seconds"][arm]
        rounds = ", ".join(f"{value:.1f}" for value in seconds["seeds"])
        rows.append([label, f"{found['tokens'] / seconds['mean']:.0f}", rounds])
    return rows


def around(found: dict, scale: float, form: str) -> str:
    return f"{scale * found['mean']:{form}} ± {scale * found['half_width_95']:{form}}"


def percent(found: dict) -> str:
    return around(found, 100, ".1f") + " %"


def scale() -> Table:
    rows = [["nodes", "generate", "engines busy", "score", "train, batch 64", "train, batch 1,024"]]
    for row in results("scale")["failures_every_1000_hours_of_a_node"]:
        if row["nodes"] in (1, 2, 8, 16, 32, 64, 512):
            hours = [row["generate_hours"], row["score_hours"], row["train_hours_batch_64"]]
            generate, score, train = (f"{value:.2f}" for value in hours)
            busy, large = f"{row['engines_busy']:.0%}", f"{row['train_hours_batch_1024']:.1f}"
            rows.append([f"{row['nodes']:.0f}", generate, busy, score, train, large])
    return rows


def attention_kernels() -> Table:
    """FlexAttention's kernels: KB of shared memory, forward and backward, and which blocks need it."""
    rows = [["heads of", "dtype", *(f"sm_{capability}" for capability in CAPABILITIES)]]
    cells: dict[tuple[int, str, int], dict[str, list[int]]] = {}
    for row in results("ahead_of_time")["kernels"]:
        if "width" in row and row["fits"]:
            blocks = cells.setdefault((row["width"], row["dtype"], row["capability"]), {})
            blocks.setdefault(row["blocks"], []).append(round(row["shared"] / 1024))
    for width, dtype in sorted({key[:2] for key in cells}):
        found = [next(t for t in cells[width, dtype, c].items() if len(t[1]) == 2) for c in CAPABILITIES]
        shown = [" / ".join(map(str, kib)) + (" (small)" if blocks == "small" else "") for blocks, kib in found]
        rows.append([str(width), dtype, *shown])
    return rows


def first_commands() -> Table:
    labels = {
        "--help": "`sparring --help`",
        "run --help": "`sparring run --help`",
        "a misspelt key": "`doctor`, a misspelled key",
        "init, the demo's rows": "`init`, 1,000 rows",
        "doctor, the demo's rows": "`doctor`, 1,000 rows",
        "doctor, 7B, 2,000 chats": "`doctor`, a 7B model's config, 2,000 chats",
        "doctor, stories": "`doctor`, a pretrained model, real stories",
        "preview, the demo's rows": "`preview`, 1,000 rows",
    }
    found = results("front_door")["commands"]
    rows = [["command", "median, s", "slowest, s"]]
    for what, label in labels.items():
        digits = 2 if found[what]["wall_seconds"] < 1 else 1
        rows.append([label, *(f"{found[what][key]:.{digits}f}" for key in ("wall_seconds", "slowest"))])
    return rows


def adapter_memory() -> Table:
    rows = [["`micro_batch_tokens`", "with gradient checkpointing", "without"]]
    by_tokens: dict[int, list[str]] = {}
    for found in results("front_door")["adapter_7b"]:  # with checkpointing first
        gib = f"{found['peak_gib']:.1f} GiB"
        by_tokens.setdefault(found["micro_batch_tokens"], []).append(gib)
    return [*rows, *([f"{tokens:,}", *gib] for tokens, gib in by_tokens.items())]


# The forecast of memory: docs/performance.md.


def forecast_of_memory() -> Table:
    rows = [["", "forecast, GiB", "every layer traced", "rule of thumb before"]]
    traced = results("forecast")["traced"]
    keys = ("forecast_gib", "every_layer_gib", "rule_gib")
    return rows + [[name, *(f"{found[key]:.2f}" for key in keys)] for name, found in traced.items()]


def measured_memory() -> Table:
    rows = [["`train.optimizer`", "forecast, GiB", "measured", "difference"]]
    for name, found in results("forecast")["measured"].items():
        expected, measured = found["forecast_gib"], found["measured_gib"]
        rows.append([f"`{name}`", f"{expected:.2f}", f"{measured:.2f}", f"{expected / measured - 1:+.0%}"])
    return rows


# The claims of the papers: docs/results.md.

ARM_NAMES = {
    "sft": "SFT",
    "spin 0.1": "SPIN, lambda 0.1",
    "spin 1": "SPIN, lambda 1",
    "tspin 1": "T-SPIN, alpha 1",
    "tspin 0.1": "T-SPIN, alpha 0.1",
    "tspin 1, beta 0": "T-SPIN, alpha 1, beta 0",
    "space 1": "SPACE, mu 1",
    "space 3": "SPACE, mu 3",
    "space 7": "SPACE, mu 7",
}
TITLES = {"nll": ("NLL", 4), "greedy": ("greedy accuracy", 3), "sampled": ("sampled accuracy", 3)}
COLORS = {"sft": "#555555", "spin 0.1": "#D55E00", "tspin 1": "#009E73", "space 1": "#0072B2"}


def tasks() -> dict[str, dict]:
    return results("claims")["tasks"]


def arms_of(task: str) -> list[str]:
    return [arm["label"] for arm in tasks()[task]["arms"]]


def chosen_rate(task: str, arm: str) -> float:
    return next(a["chosen_rate"] for a in tasks()[task]["arms"] if a["label"] == arm)


def reported(task: str, arm: str) -> dict[int, dict]:
    """The plays of an arm by seed, without those of the sweep that chose its learning rate."""
    rate, sweep_seed = chosen_rate(task, arm), results("claims")["sweep_seed"]
    plays = (p for p in results("claims")["plays"] if p["seed"] != sweep_seed)
    return {p["seed"]: p for p in plays if (p["task"], p["arm"], p["rate"]) == (task, arm, rate)}


def metrics_of(task: str) -> list[str]:
    return ["nll"] if task == "stories" else ["nll", "greedy", "sampled"]


def arm_name(arm: str) -> str:
    whole, comma, _ = arm.partition(", 25")
    return ARM_NAMES[whole] + (", 25 %" if comma else "")


def chosen(play: dict, metric: str) -> float:
    """The metric on one half of the held-out rows, at the evaluation that is best on the other half."""
    values = play["metrics"][f"{metric}_dev"]
    best = int(np.argmin(values) if metric == "nll" else np.argmax(values))
    return play["metrics"][f"{metric}_test"][best]


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Mean and 95 % interval over seeds."""
    found = interval(np.array(values))
    return f"{found['mean']:+.{digits}f} ± {found['half_width_95']:.{digits}f}"


def tokens(plays: Sequence[dict]) -> str:
    """Tokens through the optimizer, per iteration."""
    counts = [p["budget"]["optimizer_tokens"] / (len(p["metrics"]["nll"]) - 1) for p in plays]
    return f"{np.mean(counts) / 1000:.0f}k"


def sweep(task: str) -> Table:
    """NLL at each rate on the seed of the sweep, with the greedy accuracy; the chosen rate in bold."""
    sweep_seed = results("claims")["sweep_seed"]
    plays = [p for p in results("claims")["plays"] if (p["task"], p["seed"]) == (task, sweep_seed)]
    found = {(p["arm"], p["rate"]): p["metrics"] for p in plays}
    rates = sorted({rate for _, rate in found})
    rows = [["", *(f"{rate:g}" for rate in rates)]]
    for arm in arms_of(task):
        cells = []
        for rate in rates:
            if metrics := found.get((arm, rate)):
                text = f"{metrics['nll'][-1]:.4f}"
                text = f"**{text}**" if rate == chosen_rate(task, arm) else text
                cells.append(f"{text} ({metrics['greedy'][-1]:.3f})")
            else:
                cells.append("")
        rows.append([arm_name(arm), *cells])
    return rows


def swept(task: str, arm: str) -> dict[int, dict]:
    """The play of the sweep at the rate that it chose."""
    rate, sweep_seed = chosen_rate(task, arm), results("claims")["sweep_seed"]
    plays = (p for p in results("claims")["plays"] if p["seed"] == sweep_seed)
    return {p["seed"]: p for p in plays if (p["task"], p["arm"], p["rate"]) == (task, arm, rate)}


def against_sft(ours: dict[int, dict], theirs: dict[int, dict], metric: str) -> str:
    """The difference from SFT on rows that chose neither iteration, with its 95 % interval over all seeds' prompts."""
    judged = [(ours[seed]["judged"], theirs[seed]["judged"]) for seed in sorted(ours.keys() & theirs.keys())]
    differences = np.concatenate([np.subtract(one[metric], other[metric]) for one, other in judged])
    return with_interval(differences, metric, np.concatenate([one["tokens"] for one, _ in judged]))


def with_interval(differences: np.ndarray, metric: str, tokens: np.ndarray) -> str:
    is_nll = metric == "held_out_nll"
    found = estimate(differences, tokens if is_nll else None, bounds=None if is_nll else DIFFERENCE)
    digits = 4 if is_nll else 3
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def gain(task: str, plays_of: Callable[[str, str], dict[int, dict]]) -> Table:
    """Each arm at its chosen rate and iteration, paired by row with SFT at its own."""
    metrics = {"held_out_nll": "NLL", "greedy_accuracy": "greedy accuracy", "sampled_accuracy": "sampled accuracy"}
    rows = [["", "rate", *(title for name in metrics.values() for title in (name, "against SFT")), "tokens trained on"]]
    for arm in arms_of(task):
        plays, cells = plays_of(task, arm), list[str]()
        for metric in metrics:
            values = np.concatenate([play["judged"][metric] for play in plays.values()])
            weights = np.concatenate([play["judged"]["tokens"] for play in plays.values()])
            is_nll = metric == "held_out_nll"
            cells.append(f"{values.sum() / weights.sum():.4f}" if is_nll else f"{values.mean():.3f}")
            cells.append("" if arm == "sft" else against_sft(plays, plays_of(task, "sft"), metric))
        rows.append([arm_name(arm), f"{chosen_rate(task, arm):g}", *cells, tokens(list(plays.values()))])
    return rows


def tiny() -> Table:
    """The games against SFT on the tiny models: each at its chosen iteration, paired by seed."""
    rows = [["", "NLL against SFT", "greedy accuracy", "sampled accuracy"]]
    names = {"problems": "overfitted rows", "fresh rows": "250 fresh rows", "stories": "stories"}
    for task, name in names.items():
        few = ", 25 %" if task == "fresh rows" else ""
        theirs = reported(task, f"sft{few}")
        for arm in ("spin 0.1", "tspin 1", "space 1"):
            ours, cells = reported(task, arm + few), []
            for metric in metrics_of(task):
                gap = [chosen(ours[seed], metric) - chosen(theirs[seed], metric) for seed in sorted(ours)]
                cells.append(plus_minus(gap, TITLES[metric][1]))
            rows.append([f"{name}: {ARM_NAMES[arm]}", *cells, *[""] * (3 - len(cells))])
    return rows


# Simulated tunings: docs/tune.md.


def tuning() -> Table:
    rows = [["", "worse than tuned SFT", "better than tuned SFT", "median regret", "95% of regrets below"]]
    labels = {"equal": "equal methods", "different": "different methods"}
    for kind, label in labels.items():
        for arm in ("tune", "grid"):
            found = results("tune_landscapes")[kind][arm]
            shares = [f"{found[key]:.1%}" for key in ("worse_than_tuned_sft", "better_than_tuned_sft")]
            rows.append([f"{label}, {arm}", *shares, *(f"{found['regret'][q]:.4f}" for q in ("median", "95 %"))])
    return rows


# Minutes of an iteration: docs/performance.md. Checkpoints: docs/devices.md.


def iteration() -> Table:
    minutes = results("iteration")["minutes"]
    rows = [[name, f"{value:.1f}"] for name, value in minutes.items()]
    return [["", "minutes, estimated"], *rows, ["sum", f"{sum(minutes.values()):.0f}"]]


def checkpoint() -> Table:
    rows = [["", "training waits, s", "on disk after, s"]]
    labels = {"gathered": "whole tensors, written by the main rank while all wait", "sharded": "as it is"}
    for ranks, where in (("1", "one process"), ("2", "two ranks, FSDP2")):
        for arm, label in labels.items():
            found = results("checkpoint")[ranks][arm]
            seconds = (found[key] for key in ("training_waits_seconds", "committed_after_seconds"))
            rows.append([f"{where}: {label}", *(f"{value:.1f}" for value in seconds)])
    return rows


TABLES: dict[str, Callable[[], Table]] = {
    "demo": demo,
    **{f"step, {name}": partial(step, name) for name in STEP_CASES},
    "step, memory": step_memory,
    "epoch": epoch,
    "checkpoint": checkpoint,
    "engines": engines,
    "engines of a real model": engines_of_a_real_model,
    "scale": scale,
    "iteration": iteration,
    "tuning": tuning,
    "first commands": first_commands,
    "adapter memory": adapter_memory,
    "attention kernels": attention_kernels,
    "forecast of memory": forecast_of_memory,
    "measured memory": measured_memory,
    "tiny": tiny,
    "sweep, SmolLM2": partial(sweep, "SmolLM2"),
    "gain, SmolLM2": partial(gain, "SmolLM2", swept),
}


def draw() -> None:
    """The curves of claim (a) as SVG. The same software gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "sparring", "svg.fonttype": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    panels = (("problems", "nll"), ("problems", "greedy"), ("stories", "nll"))
    with mpl.rc_context(style):
        canvas = Figure(figsize=(9, 2.9), layout="constrained")
        FigureCanvasSVG(canvas)
        for number, (task, metric) in enumerate(panels, start=1):
            axes = canvas.add_subplot(1, 3, number)
            for arm, color in COLORS.items():
                values = np.array([p["metrics"][metric] for p in reported(task, arm).values()])
                x = range(-1, values.shape[1] - 1)
                for one in values:
                    axes.plot(x, one, color=color, linewidth=0.6, alpha=0.35)
                line = {"marker": "o", "markersize": 3, "linewidth": 1.4, "label": arm_name(arm)}
                axes.plot(x, values.mean(axis=0), color=color, **line)
            axes.set_title(f"{task}: {'held-out NLL' if metric == 'nll' else 'greedy accuracy'}", fontsize=9)
            axes.set_xlabel("iteration; -1 is the start")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        canvas.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
    draw()
