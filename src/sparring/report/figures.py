"""The curves that the papers plot, as SVG: the same run gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from sparring.run.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Z95 = 1.96

# Drawn in these, shown in the page's own: each is a variable of style.css, which light and dark set. The series are
# told apart by colour-blind people too, and where a figure has several, by dashes.
COLOURS = {
    "real": "#0072b2",
    "generated": "#d55e00",
    "proto": "#009e73",
    "fifth": "#8a3ffc",
    "other": "#777777",
}
INK, SOFT, LINE = "#000000", "#bbbbbb", "#eeeeee"
THEMED = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    "#ffffff": "none",
    **{colour: f"var(--{name})" for name, colour in COLOURS.items()},
}
WIDTH, HEIGHT, FONT = 4.7, 2.75, 11  # inches and points; a card on a screen or a phone is about as wide


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Curve:
    metric: str
    label: str
    colour: str
    is_dashed: bool = False


TRAINING = (
    ("Training loss", "Of each optimizer step, before its update.", (Curve("loss", "loss", "real"),)),
    (
        "Rewards in training",
        "Mean reward of real and generated answers. Both falling together is likelihood displacement.",
        (Curve("rewards/real", "real", "real"), Curve("rewards/generated", "generated", "generated")),
    ),
    (
        "Log-likelihood in training",
        "log p of whole answers under the policy, nats.",
        (
            Curve("logps/real", "real", "real"),
            Curve("logps/generated", "generated", "generated"),
            Curve("logps/proto", "proto", "proto"),
        ),
    ),
    (
        "Advantages in training",
        "Current: reward of real minus generated. Historical: reward of generated minus proto.",
        (
            Curve("rewards/margins", "current", "real"),
            Curve("advantages/history", "historical", "proto", is_dashed=True),
        ),
    ),
    (
        "Reward accuracy in training",
        "Share of examples whose real answer has the higher reward; alignment: share in which reward and "
        "likelihood order the two answers alike.",
        (
            Curve("rewards/accuracies", "accuracy", "real"),
            Curve("alignment", "alignment", "other", is_dashed=True),
        ),
    ),
)

HELD_OUT = (
    (
        "Held-out NLL",
        "Nats per token of the real answers; lower is better. Bars: 95 % intervals over rows.",
        (Curve("held_out_nll", "NLL", "real"),),
    ),
    (
        "Held-out accuracy",
        "Share of right answers, as the checker sees it. Bars: 95 % intervals over rows.",
        (
            Curve("greedy_accuracy", "greedy", "real"),
            Curve("sampled_accuracy", "sampled", "generated", is_dashed=True),
        ),
    ),
    (
        "The game on held-out rows",
        "Rows won against the opponent, and ties: at equilibrium as many are won as lost. Alignment: share in "
        "which reward and likelihood order the two answers alike.",
        (
            Curve("rewards/accuracies", "won", "real"),
            Curve("rewards/ties", "tied", "proto", is_dashed=True),
            Curve("alignment", "alignment", "other", is_dashed=True),
        ),
    ),
    (
        "Current and historical advantage",
        "Nats per answer. Current: log p(real) minus log p(opponent's answer). Historical: log p(opponent's answer) "
        "minus log p(first model's), what has been gained since the start.",
        (
            Curve("advantages/current", "current", "real"),
            Curve("advantages/history_logps", "historical", "proto", is_dashed=True),
        ),
    ),
    (
        "Length",
        "Tokens of a fresh answer, over those of the real one: mean of all rows over mean of all rows. 1 is level.",
        (Curve("length_ratio", "length / real", "generated"),),
    ),
    (
        "Repetition, endings, copies",
        "Share of 4-grams that an answer repeats; of answers that end; of answers that are the real one.",
        (
            Curve("repetition", "repeated", "generated"),
            Curve("end_rate", "ended", "real", is_dashed=True),
            Curve("copy_rate", "copies", "other", is_dashed=True),
        ),
    ),
)


def draw_held_out(results: Results) -> list[Figure]:
    """What the evaluations show, by iteration."""
    evaluations, figures = results.evaluations(), []
    for title, caption, curves in HELD_OUT:
        shown = [c for c in curves if any(c.metric in metrics for metrics in evaluations.values())]
        if shown and len(evaluations) > 1:
            figures.append(Figure(title, caption, _held_out(evaluations, shown, title)))
    return figures


def draw_training(results: Results) -> list[Figure]:
    """What the optimizer steps show."""
    figures = []
    lines = [(index, results.training(index)) for index in (i.index for i in results.iterations if i.index >= 0)]
    for title, caption, curves in TRAINING:
        shown = [c for c in curves if any(c.metric in line for _, ls in lines for line in ls)]
        if shown:
            figures.append(Figure(title, caption, _training(lines, shown, title)))
    return figures


def _held_out(evaluations: dict[int, dict[str, float]], curves: Sequence[Curve], title: str) -> Markup:
    def plot(axes: Axes) -> None:
        for curve in curves:
            points = [
                (i, m[curve.metric], Z95 * m.get(f"{curve.metric}_stderr", 0.0))
                for i, m in evaluations.items()
                if curve.metric in m
            ]
            x, y, errors = zip(*points, strict=True)
            axes.errorbar(
                x,
                y,
                yerr=errors if any(errors) else None,
                color=COLOURS[curve.colour],
                linestyle="--" if curve.is_dashed else "-",
                linewidth=1.8,
                marker="o",
                markersize=4.5,
                elinewidth=1.1,
                capsize=2.5,
                label=curve.label,
            )
        axes.set_xticks(list(evaluations), ["start" if i < 0 else str(i) for i in evaluations])
        axes.margins(x=0.08)
        if any(curve.metric == "length_ratio" for curve in curves):
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.8), max(high, 1.2))  # or a change of a hundredth would look like a collapse
        axes.set_xlabel("iteration")

    return svg(plot, title, has_legend=len(curves) > 1)


def _training(lines: list[tuple[int, list[dict[str, float]]]], curves: Sequence[Curve], title: str) -> Markup:
    """Each step, faint, and a running mean over a twelfth of an iteration."""

    def plot(axes: Axes) -> None:
        offset, middles = 0, []
        for index, steps in lines:
            for curve in curves:
                points = [(offset + s["step"], s[curve.metric]) for s in steps if curve.metric in s]
                if not points:
                    continue
                x, y = (np.array(values) for values in zip(*points, strict=True))
                colour, style = COLOURS[curve.colour], "--" if curve.is_dashed else "-"
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                is_first = curve.label not in axes.get_legend_handles_labels()[1]
                label = curve.label if is_first else None
                axes.plot(x, running_mean(y, len(y) // 12), color=colour, linewidth=1.6, linestyle=style, label=label)
            if steps:
                middles.append((offset + (len(steps) + 1) / 2, str(index)))
                if offset:
                    axes.axvline(offset + 0.5, color=SOFT, linewidth=0.7, linestyle=":")
            offset += len(steps)
        axes.set_xticks([middle for middle, _ in middles], [label for _, label in middles])
        axes.margins(x=0.02)
        axes.set_xlabel(f"iteration; {offset:,} optimizer steps in all")

    return svg(plot, title, has_legend=len(curves) > 1)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values up to `width` steps away on each side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = (np.clip(np.arange(len(values)) + d, 0, len(values)) for d in (-width, width + 1))
    return (sums[high] - sums[low]) / (high - low)


def svg(plot: Callable[[Axes], None], title: str, *, has_legend: bool) -> Markup:
    """One plot with the page's own font and colours. Its words are text, for search, selection and screen readers."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, object] = {
        "svg.hashsalt": "sparring",
        "svg.fonttype": "none",
        "font.size": FONT,
        "axes.labelsize": FONT,
        "xtick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": SOFT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        axes.grid(visible=True, axis="y", color=LINE)
        plot(axes)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if has_legend:
            handles, labels = axes.get_legend_handles_labels()
            canvas.legend(
                handles,
                labels,
                loc="outside upper left",
                frameon=False,
                fontsize=FONT,
                ncols=4,
                handlelength=1.4,
                columnspacing=1.4,
                borderaxespad=0.0,
                borderpad=0.0,
            )
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # safe: matplotlib escapes the words, which are our own and the labels of methods; no text of a model is in it
    text = re.sub(r"#[0-9a-f]{6}\b", lambda colour: THEMED.get(colour[0], colour[0]), text)
    return Markup('<svg role="img" aria-label="{}"').format(title) + Markup(text[text.index("<svg") + 4 :])  # noqa: S704
