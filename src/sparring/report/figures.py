"""The curves that the papers plot, as SVG: the same run gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from sparring.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {"real": "#0072B2", "generated": "#D55E00", "proto": "#009E73", "other": "#777777"}

THEMED = {"#000000": "currentColor", "#ffffff": "none", "#eeeeee": "var(--line)", "#bbbbbb": "var(--soft)"}
"""What follows the page, light or dark: ink, paper, grid, the lines between iterations."""


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
    ("Training loss", "Of each optimizer step, before its update.", (Curve("loss", "loss", "other"),)),
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
        "Nats per token of the real answers, with the standard error.",
        (Curve("held_out_nll", "NLL", "real"),),
    ),
    (
        "Held-out accuracy",
        "Of checked answers, with the standard error.",
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
)


def draw(results: Results) -> list[Figure]:
    """Every figure for which the run has something to show."""
    figures = []
    evaluations = results.evaluations()
    for title, caption, curves in HELD_OUT:
        shown = [c for c in curves if any(c.metric in metrics for metrics in evaluations.values())]
        if shown and len(evaluations) > 1:
            figures.append(Figure(title, caption, _held_out(evaluations, shown)))
    lines = [(index, results.training(index)) for index in (i.index for i in results.iterations if i.index >= 0)]
    for title, caption, curves in TRAINING:
        shown = [c for c in curves if any(c.metric in line for _, ls in lines for line in ls)]
        if shown:
            figures.append(Figure(title, caption, _training(lines, shown)))
    return figures


def _held_out(evaluations: dict[int, dict[str, float]], curves: Sequence[Curve]) -> Markup:
    def plot(axes: Axes) -> None:
        for curve in curves:
            points = [
                (i, m[curve.metric], m.get(f"{curve.metric}_stderr"))
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
                marker="o",
                markersize=4,
                capsize=3,
                label=curve.label,
            )
        axes.set_xticks(list(evaluations), ["start" if i < 0 else str(i) for i in evaluations])
        axes.set_xlabel("iteration")

    return svg(plot, has_legend=len(curves) > 1)


def _training(lines: list[tuple[int, list[dict[str, float]]]], curves: Sequence[Curve]) -> Markup:
    def plot(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            offset, labelled = 0, False
            for index, steps in lines:
                points = [(offset + s["step"], s[curve.metric]) for s in steps if curve.metric in s]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(
                        x,
                        y,
                        color=COLOURS[curve.colour],
                        linestyle="--" if curve.is_dashed else "-",
                        linewidth=1,
                        label=None if labelled else curve.label,
                    )
                    labelled = True
                if steps and number == 0 and index > 0:
                    axes.axvline(offset + 0.5, color="#bbbbbb", linewidth=0.8)
                offset += len(steps)
        axes.set_xlabel("optimizer step; a line where an iteration begins")

    return svg(plot, has_legend=len(curves) > 1)


def svg(plot: Callable[[Axes], None], *, has_legend: bool) -> Markup:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(
        {
            "svg.hashsalt": "sparring",
            "svg.fonttype": "path",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        canvas = Canvas(figsize=(4.6, 2.7), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        plot(axes)
        axes.grid(visible=True, color="#eeeeee")
        axes.set_axisbelow(True)
        if has_legend:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # safe: drawn by matplotlib from numbers and our own words; no text of a model or a user is in it
    for fixed, themed in THEMED.items():
        text = text.replace(fixed, themed)
    return Markup(text[text.index("<svg") :])  # noqa: S704
