"""Puts the tables of benchmarks/results/claims.json into docs/results.md.

    python benchmarks/results_page.py

A table stands between `<!-- claims: NAME -->` and `<!-- end -->`; what stands there is replaced. A test holds the page
to the numbers. The verdicts around the tables are written by people. results_figure.py draws the figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from demo_seeds import interval
from page import filled as page_with_tables

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks" / "results" / "claims.json"
COMPARED = ROOT / "benchmarks" / "results" / "compare_demo.json"
SIX_SEEDS = ROOT / "benchmarks" / "results" / "demo_seeds.json"
PAGE = ROOT / "docs" / "results.md"

NAMES = {
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
QUADRANTS = ("sft", "spin 0.1", "tspin 1", "space 1")

Play = dict[str, object]


@cache
def numbers() -> dict:
    return json.loads(NUMBERS.read_text(encoding="utf-8"))


def chosen_rate(task: str, arm: str) -> float:
    return next(a["chosen_rate"] for a in numbers()["tasks"][task]["arms"] if a["label"] == arm)


def arms(task: str) -> list[str]:
    return [arm["label"] for arm in numbers()["tasks"][task]["arms"]]


def reported(task: str, arm: str) -> dict[int, dict]:
    """The plays of an arm by seed, those of the sweep left out."""
    rate = chosen_rate(task, arm)
    return {
        play["seed"]: play
        for play in numbers()["plays"]
        if (play["task"], play["arm"], play["rate"]) == (task, arm, rate) and play["seed"] != numbers()["sweep_seed"]
    }


def swept(task: str, arm: str) -> dict:
    """The play of the sweep at the chosen rate."""
    wanted = (task, arm, chosen_rate(task, arm), numbers()["sweep_seed"])
    return next(p for p in numbers()["plays"] if (p["task"], p["arm"], p["rate"], p["seed"]) == wanted)


def name(arm: str) -> str:
    whole, comma, share = arm.partition(", 25")
    return NAMES[whole] + (", 25 %" if comma and share else "")


def chosen(play: dict, metric: str) -> int:
    """The evaluation that is best on one half of the held-out rows; 0 is the start, and the earlier one of equals."""
    values = play["metrics"][f"{metric}_dev"]
    return int(np.argmin(values) if metric == "nll" else np.argmax(values))


def judged(play: dict, metric: str, index: int) -> float:
    """On the half that chose nothing."""
    return play["metrics"][f"{metric}_test"][index]


def named(task: str, arm: str) -> str:
    """Its name, and on how many seeds it was played where that is fewer than planned."""
    count, planned = len(reported(task, arm)), numbers()["tasks"][task]["planned_seeds"]
    return name(arm) + (f" ({count} of {planned} seeds)" if 0 < count < planned else "")


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row(*(["---"] + ["--:"] * (len(cells) - 1)))]


def mean(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}"


def plus_minus(values: Sequence[float], digits: int, *, signed: bool = True) -> str:
    """Mean and the 95 % interval between seeds."""
    if len(values) < 2:
        return f"{np.mean(values):{'+' if signed else ''}.{digits}f} (one seed)"
    found = interval(np.array(values))
    return f"{found['mean']:{'+' if signed else ''}.{digits}f} ± {found['half_width_95']:.{digits}f}"


def curve(plays: Sequence[dict], metric: str, digits: int) -> str:
    """Means over seeds, the start first, the best one bold."""
    values = np.mean([play["metrics"][metric] for play in plays], axis=0)
    best = values.argmin() if metric == "nll" else values.argmax()
    return ", ".join(f"**{v:.{digits}f}**" if t == best else f"{v:.{digits}f}" for t, v in enumerate(values))


def tokens(plays: Sequence[dict]) -> str:
    """Through the optimizer, per iteration."""
    counts = [p["budget"]["optimizer_tokens"] / (len(p["metrics"]["nll"]) - 1) for p in plays]
    return f"{np.mean(counts) / 1000:.0f}k"


def has_accuracy(task: str) -> bool:
    return "greedy" in numbers()["plays"][0]["metrics"] and task != "stories"


def table_sweep(task: str) -> list[str]:
    """Best and last NLL of each rate, on the sweep's own seed; the chosen rate bold."""
    info = numbers()["tasks"][task]
    found = {
        (p["arm"], p["rate"]): p
        for p in numbers()["plays"]
        if p["task"] == task and p["seed"] == numbers()["sweep_seed"]
    }
    lines = head("", *(f"{rate:g}" for rate in info["rates"]))
    for arm in (*info["arms"], *info["only_swept"]):
        if arm["rate_of"]:
            continue
        cells = []
        for rate in info["rates"]:
            if (arm["label"], rate) not in found:
                cells.append("not played")
                continue
            metrics = found[arm["label"], rate]["metrics"]
            text = f"{min(metrics['nll']):.4f}"
            if arm.get("chosen_rate") == rate:
                text = f"**{text}**"
            if metrics["nll"][-1] != min(metrics["nll"]):
                text += f", then {metrics['nll'][-1]:.4f}"
            if has_accuracy(task):
                text += f" ({max(metrics['greedy']):.3f})"
            cells.append(text)
        lines.append(row(name(arm["label"]), *cells))
    return lines


def table_curves(task: str) -> list[str]:
    """Claim (a): the curves at the chosen rate, and how far the last iteration is behind the chosen one."""
    with_accuracy = has_accuracy(task)
    columns = ["", "rate", "held-out NLL: start, then iterations", "last - best"]
    columns += ["greedy accuracy", "last - best"] if with_accuracy else []
    lines = head(*columns)
    for arm in arms(task):
        plays = list(reported(task, arm).values())
        if not plays or "25 %" in arm:
            continue
        cells = [named(task, arm), f"{chosen_rate(task, arm):g}", curve(plays, "nll", 3), fall(plays, "nll", 4)]
        if with_accuracy:
            cells += [curve(plays, "greedy", 3), fall(plays, "greedy", 3)]
        lines.append(row(*cells))
    return lines


def table_six_seeds() -> list[str]:
    """Claim (a) at every rate: three iterations of the demo over six seeds, from benchmarks/demo_seeds.py."""
    found = json.loads(SIX_SEEDS.read_text(encoding="utf-8"))["arms"]
    lines = head("", "rate", "held-out NLL: start, then iterations", "last - best", "greedy accuracy", "last - best")
    for method, label in (("sft", "sft"), ("spin", "spin 0.1"), ("tspin", "tspin 1"), ("space", "space 1")):
        for rate in ("3e-05", "0.0001", "0.0003"):
            cells: list[str] = []
            for metric, sign, digits in (("held_out_nll", 1, 4), ("greedy_accuracy", -1, 3)):
                by_iteration = found[f"{method}, {rate}"]["by_iteration"][metric]
                values = np.array([one["seeds"] for one in by_iteration.values()])  # [iteration, seed]
                means = values.mean(axis=1)
                best = int((sign * means).argmin())
                cells.append(", ".join(f"**{m:.3f}**" if t == best else f"{m:.3f}" for t, m in enumerate(means)))
                cells.append(plus_minus((values[-1] - values[best]).tolist(), digits) if best < len(means) - 1 else "0")
            lines.append(row(name(label), rate, *cells))
    return lines


def table_compared(share: float, against: str) -> list[str]:
    """Claims (e) and (f): arms on a share of the rows against SFT, from benchmarks/compare_demo.py."""
    labels = {"sft": "sft", "spin": "spin 0.1", "tspin": "tspin 1", "space": "space 1"}
    metrics = {
        "held_out_nll": ("NLL", 4),
        "greedy_accuracy": ("greedy accuracy", 3),
        "sampled_accuracy": ("sampled accuracy", 3),
    }
    found = json.loads(COMPARED.read_text(encoding="utf-8"))["arms"]
    lines = head("", *(t for title, _ in metrics.values() for t in (title, "to SFT")))
    for arm in found:
        if arm["share"] == share:
            cells = []
            for metric, (_, digits) in metrics.items():
                one = (arm["to_control"]["chosen"] if against == "same rows" else arm[against])[metric]
                cells.append(f"{arm['chosen'][metric]['mean']:.{digits}f}")
                is_control = arm["method"] == "sft" and against == "same rows"
                cells.append("" if is_control else f"{one['mean']:+.{digits}f} ± {one['half_width_95']:.{digits}f}")
            lines.append(row(name(labels[arm["method"]]), *cells))
    return lines


def fall(plays: Sequence[dict], metric: str, digits: int) -> str:
    return plus_minus([judged(p, metric, -1) - judged(p, metric, chosen(p, metric)) for p in plays], digits)


def table_quadrants(task: str) -> list[str]:
    """Claim (b): shares of held-out rows by iteration whose real answer has the higher reward, lower likelihood."""
    lines = head("", "won by reward", "of these with the lower likelihood", "of all rows", "log p(y) - log p(y'), nats")
    for arm in QUADRANTS:
        plays = list(reported(task, arm).values()) or [swept(task, arm)]

        def by_iteration(pick: Callable[[dict], list[float]], digits: int, plays: list[dict] = plays) -> str:
            return ", ".join(f"{v:.{digits}f}" for v in np.mean([pick(p["metrics"])[1:] for p in plays], axis=0))

        def share(metrics: dict) -> list[float]:
            crossed, straight = metrics["higher_reward_lower_likelihood"], metrics["higher_reward_higher_likelihood"]
            return [0.0] + [c / (c + s) if c + s else 0.0 for c, s in zip(crossed[1:], straight[1:], strict=True)]

        lines.append(
            row(
                named(task, arm),
                by_iteration(lambda m: m["reward_accuracy"], 2),
                by_iteration(share, 2),
                by_iteration(lambda m: m["higher_reward_lower_likelihood"], 2),
                by_iteration(lambda m: m["likelihood_gap"], 1),
            )
        )
    return lines


def table_history(task: str) -> list[str]:
    """Claim (c): T-SPIN with and without its historical term, at the rate of the former."""
    lines = head("", "mean step of the NLL", "last NLL", "with the term - without", "KL from start", "entropy")
    ours, theirs = (reported(task, arm) for arm in ("tspin 1", "tspin 1, beta 0"))
    gap = [ours[s]["metrics"]["nll"][-1] - theirs[s]["metrics"]["nll"][-1] for s in sorted(ours.keys() & theirs.keys())]
    for arm in ("tspin 1", "tspin 1, beta 0"):
        plays = list(reported(task, arm).values())
        if not plays:
            continue
        swing = [float(np.abs(np.diff(p["metrics"]["nll"][1:])).mean()) for p in plays]
        lines.append(
            row(
                f"{named(task, arm)}, {chosen_rate(task, arm):g}",
                plus_minus(swing, 4, signed=False),
                mean([p["metrics"]["nll"][-1] for p in plays], 4),
                plus_minus(gap, 4) if arm == "tspin 1" else "",
                mean([p["metrics"]["kl_from_start"][-1] for p in plays], 2),
                mean([p["metrics"]["entropy"][-1] for p in plays], 3),
            )
        )
    return lines


def difference(task: str, arm: str, against: str, metric: str) -> list[float]:
    """Each at its chosen iteration, on the rows that did not choose it, paired by seed."""
    ours, theirs = reported(task, arm), reported(task, against)
    return [
        judged(ours[seed], metric, chosen(ours[seed], metric))
        - judged(theirs[seed], metric, chosen(theirs[seed], metric))
        for seed in sorted(ours.keys() & theirs.keys())
    ]


def table_against(task: str, against: str, compared: Sequence[str]) -> list[str]:
    """Each arm at its chosen iteration against another one, with what it cost."""
    metrics = ["nll", "greedy", "sampled"] if has_accuracy(task) else ["nll"]
    titles = {"nll": "NLL", "greedy": "greedy accuracy", "sampled": "sampled accuracy"}
    lines = head(
        "", *(t for m in metrics for t in (titles[m], f"against {name(against)}")), "tokens trained on, per iteration"
    )
    for arm in (against, *(a for a in compared if a != against)):
        plays = list(reported(task, arm).values())
        if not plays:
            continue
        cells: list[str] = []
        for metric in metrics:
            digits = 4 if metric == "nll" else 3
            cells.append(mean([judged(p, metric, chosen(p, metric)) for p in plays], digits))
            cells.append("" if arm == against else plus_minus(difference(task, arm, against, metric), digits))
        lines.append(row(named(task, arm), *cells, tokens(plays)))
    return lines


def table_mu(task: str) -> list[str]:
    """Claim (d): as many answers per prompt as mu, against mu 1 after as many iterations, paired by seed."""
    metrics = ["nll", "greedy"] if has_accuracy(task) else ["nll"]
    titles = {"nll": "NLL after iterations", "greedy": "greedy accuracy after iterations"}
    lines = head(
        "", *(t for m in metrics for t in (titles[m], "last, against mu 1")), "tokens trained on, per iteration"
    )
    first = reported(task, "space 1")
    for arm in ("space 1", *(arm for arm in MU if arm in arms(task))):
        plays = reported(task, arm)
        seeds = sorted(plays.keys() & first.keys())
        if not seeds:
            continue
        cells: list[str] = []
        for metric in metrics:
            digits = 4 if metric == "nll" else 3
            values = [plays[seed]["metrics"][metric][1:3] for seed in seeds]
            cells.append(", ".join(f"{v:.{digits}f}" for v in np.mean(values, axis=0)))
            against = [plays[seed]["metrics"][metric][2] - first[seed]["metrics"][metric][2] for seed in seeds]
            cells.append("" if arm == "space 1" else plus_minus(against, digits))
        lines.append(row(named(task, arm), *cells, tokens([plays[seed] for seed in seeds])))
    return lines


def wholes(task: str) -> list[str]:
    return [arm for arm in arms(task) if "25 %" not in arm and arm not in ("space 3", "space 7")]


MU = ("space 3", "space 7")
TABLES: dict[str, Callable[[], list[str]]] = {
    "six seeds": table_six_seeds,
    "quarter, fresh rows": lambda: table_against("fresh rows", "sft", arms("fresh rows")),
    "quarter against quarter, fresh rows": lambda: table_against("fresh rows", "sft, 25 %", arms("fresh rows")[1:]),
    "a quarter against all rows": lambda: table_compared(0.25, "to_control_on_all_rows"),
    "a quarter against a quarter": lambda: table_compared(0.25, "same rows"),
    **{f"sweep, {task}": lambda task=task: table_sweep(task) for task in numbers()["tasks"]},
    **{f"curves, {task}": lambda task=task: table_curves(task) for task in numbers()["tasks"]},
    **{f"quadrants, {task}": lambda task=task: table_quadrants(task) for task in numbers()["tasks"]},
    **{f"history, {task}": lambda task=task: table_history(task) for task in numbers()["tasks"]},
    **{f"mu, {task}": lambda task=task: table_mu(task) for task in numbers()["tasks"]},
    **{f"gain, {task}": lambda task=task: table_against(task, "sft", wholes(task)) for task in numbers()["tasks"]},
}


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return page_with_tables(page, "claims", lambda name: TABLES[name]())


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
