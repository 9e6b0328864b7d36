"""Draws the curves that the papers plot, as SVG. The same run gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from sparring.run.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib draws in these colors. `to_svg` replaces each by a variable of style.css, which light and dark mode set.
# The palette is safe for color-blind readers; a figure with several curves also varies the line style.
COLORS = {"real": "#0072b2", "generated": "#d55e00", "proto": "#009e73", "fifth": "#8a3ffc", "other": "#777777"}
INK, SOFT, LINE = "#000000", "#bbbbbb", "#eeeeee"
THEMED = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    "#ffffff": "none",
    **{color: f"var(--{name})" for name, color in COLORS.items()},
}
WIDTH, HEIGHT, FONT = 4.7, 2.75, 11  # inches and points, about the width of a card on a screen or a phone


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    svg: Markup


class Curve(NamedTuple):
    metric: str
    label: str
    color: str
    style: str = "-"


Spec = tuple[str, str, tuple[Curve, ...]]  # title, caption, curves
ALIGNMENT = Curve("alignment", "alignment", "other", "--")

# fmt: off
TRAINING: tuple[Spec, ...] = (
    ("Training loss", "Loss of each optimizer step, before its update.", (Curve("loss", "loss", "real"),)),
    ("Rewards in training",
     "Mean reward of real and generated responses. If both fall together, that is likelihood displacement.",
     (Curve("rewards/real", "real", "real"), Curve("rewards/generated", "generated", "generated"))),
    ("Log-likelihood in training", "log p of full responses under the policy, in nats.",
     (Curve("logps/real", "real", "real"), Curve("logps/generated", "generated", "generated"),
      Curve("logps/proto", "proto", "proto"))),
    ("Advantages in training",
     "Current: reward of real minus generated. Historical: reward of generated minus proto.",
     (Curve("rewards/margins", "current", "real"), Curve("advantages/history", "historical", "proto", "--"))),
    ("Reward accuracy in training",
     "Accuracy: fraction of examples whose real response has the higher reward. Alignment: fraction in which reward "
     "and likelihood order the two responses alike.",
     (Curve("rewards/accuracies", "accuracy", "real"), ALIGNMENT)),
)

HELD_OUT: tuple[Spec, ...] = (
    ("Held-out NLL",
     "Nats per token of the real responses; lower is better. Error bars: 95% intervals over prompts.",
     (Curve("held_out_nll", "NLL", "real"),)),
    ("Held-out accuracy",
     "Fraction of responses that the checker accepts. Error bars: 95% intervals over prompts.",
     (Curve("greedy_accuracy", "greedy", "real"), Curve("sampled_accuracy", "sampled", "generated", "--"))),
    ("The game on held-out rows",
     "Rows won against the opponent, and ties. At equilibrium as many rows are won as lost. Alignment: fraction in "
     "which reward and likelihood order the two responses alike.",
     (Curve("rewards/accuracies", "won", "real"), Curve("rewards/ties", "tied", "proto", "--"), ALIGNMENT)),
    ("Current and historical advantage",
     "Nats per response. Current: log p(real) minus log p(opponent's response). Historical: log p(opponent's "
     "response) minus log p(starting model's response), the progress since the start.",
     (Curve("advantages/current", "current", "real"),
      Curve("advantages/history_logps", "historical", "proto", "--"))),
    ("Length",
     "Mean tokens of a generated response divided by the mean of the real ones. 1 means equal length.",
     (Curve("length_ratio", "length / real", "generated"),)),
    ("Repetition, endings, copies",
     "Fraction of 4-grams that repeat within a response; of responses that end; of responses equal to the real one.",
     (Curve("repetition", "repeated", "generated"), Curve("end_rate", "ended", "real", "--"),
      Curve("copy_rate", "copies", "other", "--"))),
)
# fmt: on


def draw_held_out(results: Results) -> list[Figure]:
    """Evaluation metrics by iteration."""
    evaluations = results.evaluations()
    if len(evaluations) < 2:
        return []
    return draw(HELD_OUT, set().union(*evaluations.values()), lambda curves: plot_evaluations(evaluations, curves))


def draw_training(results: Results) -> list[Figure]:
    """Training metrics by optimizer step."""
    steps = {i.index: results.training(i.index) for i in results.iterations if i.index >= 0}
    metrics = {metric for lines in steps.values() for line in lines for metric in line}
    return draw(TRAINING, metrics, lambda curves: plot_training(steps, curves))


def draw(
    specs: Iterable[Spec], metrics: set[str], plot: Callable[[Sequence[Curve]], Callable[[Axes], None]]
) -> list[Figure]:
    """The figures that have at least one of `metrics`, with the curves that exist."""
    figures = []
    for title, caption, curves in specs:
        if available := [curve for curve in curves if curve.metric in metrics]:
            figures.append(Figure(title, caption, to_svg(plot(available), title, has_legend=len(available) > 1)))
    return figures


def plot_evaluations(evaluations: dict[int, dict[str, float]], curves: Sequence[Curve]) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for curve in curves:
            points = [(i, m[curve.metric], m) for i, m in evaluations.items() if curve.metric in m]
            x, y, metrics = zip(*points, strict=True)
            ends = [[m.get(f"{curve.metric}_{end}") for m in metrics] for end in ("low", "high")]
            line = {"color": COLORS[curve.color], "linestyle": curve.style, "label": curve.label}
            error_bars(axes, x, y, None if None in ends[0] else np.abs(np.array(ends) - y), **line)
        iteration_ticks(axes, list(evaluations))
        if any(curve.metric == "length_ratio" for curve in curves):
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.8), max(high, 1.2))  # else a change of 0.01 would look like a collapse

    return plot


def error_bars(
    axes: Axes, x: Sequence[float], y: Sequence[float], errors: Sequence[float] | np.ndarray | None, **line: str
) -> None:
    axes.errorbar(x, y, errors, linewidth=1.8, marker="o", markersize=4.5, elinewidth=1.1, capsize=2.5, **line)  # type: ignore[arg-type]


def iteration_ticks(axes: Axes, iterations: Sequence[int]) -> None:
    axes.set_xticks(iterations, ["start" if i < 0 else str(i) for i in iterations])
    axes.margins(x=0.08)
    axes.set_xlabel("iteration")


def plot_training(steps: dict[int, list[dict[str, float]]], curves: Sequence[Curve]) -> Callable[[Axes], None]:
    """Each step, faint, and a running mean over a twelfth of an iteration."""

    def plot(axes: Axes) -> None:
        offset, ticks = 0, []
        for index, lines in steps.items():
            for curve in curves:
                points = [(offset + line["step"], line[curve.metric]) for line in lines if curve.metric in line]
                if not points:
                    continue
                x, y = (np.array(values) for values in zip(*points, strict=True))
                color = COLORS[curve.color]
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
                label = None if curve.label in axes.get_legend_handles_labels()[1] else curve.label
                mean = running_mean(y, len(y) // 12)
                axes.plot(x, mean, color=color, linewidth=1.6, linestyle=curve.style, label=label)
            if lines:
                ticks.append((offset + (len(lines) + 1) / 2, str(index)))
                if offset:
                    axes.axvline(offset + 0.5, color=SOFT, linewidth=0.7, linestyle=":")
            offset += len(lines)
        axes.set_xticks([position for position, _ in ticks], [label for _, label in ticks])
        axes.margins(x=0.02)
        axes.set_xlabel(f"iteration ({offset:,} optimizer steps in total)")

    return plot


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values at most `width` steps away on each side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = (np.clip(np.arange(len(values)) + d, 0, len(values)) for d in (-width, width + 1))
    return (sums[high] - sums[low]) / (high - low)


def to_svg(plot: Callable[[Axes], None], title: str, *, has_legend: bool) -> Markup:
    """One plot in the page's font and colors. Its words stay text, for search, selection and screen readers."""
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
        "legend.frameon": False,
        "legend.fontsize": FONT,
        "legend.handlelength": 1.4,
        "legend.columnspacing": 1.4,
        "legend.borderaxespad": 0.0,
        "legend.borderpad": 0.0,
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
            canvas.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    # safe: matplotlib escapes text, and all text here is ours or a method's label; none comes from a model
    text = re.sub(r"#[0-9a-f]{6}\b", lambda color: THEMED.get(color[0], color[0]), buffer.getvalue())
    return Markup('<svg role="img" aria-label="{}"').format(title) + Markup(text[text.index("<svg") + 4 :])  # noqa: S704
