"""Draws the figure of docs/results.md from benchmarks/results/claims.json.

python benchmarks/results_figure.py
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from results_page import ROOT, name, reported

FIGURE = ROOT / "docs" / "claims.svg"
COLOURS = {"sft": "#555555", "spin 0.1": "#D55E00", "tspin 1": "#009E73", "space 1": "#0072B2"}


def draw() -> None:
    """The curves of claim (a) as SVG; the same software gives the same bytes."""
    panels = (
        ("problems", "nll", "held-out NLL"),
        ("problems", "greedy", "greedy accuracy"),
        ("stories", "nll", "held-out NLL"),
    )
    style = {
        "svg.hashsalt": "sparring",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        canvas = Figure(figsize=(9, 2.9), layout="constrained")
        FigureCanvasSVG(canvas)
        for number, (task, metric, title) in enumerate(panels, start=1):
            axes = canvas.add_subplot(1, 3, number)
            for arm, colour in COLOURS.items():
                values = np.array([p["metrics"][metric] for p in reported(task, arm).values()])
                if not values.size:
                    continue
                for one in values:
                    axes.plot(range(-1, len(one) - 1), one, color=colour, linewidth=0.6, alpha=0.35)
                axes.plot(
                    range(-1, values.shape[1] - 1),
                    values.mean(axis=0),
                    color=colour,
                    marker="o",
                    markersize=3,
                    linewidth=1.4,
                    label=name(arm),
                )
            axes.set_title(f"{task}: {title}", fontsize=9)
            axes.set_xlabel("iteration; -1 is the start")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        canvas.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    draw()
