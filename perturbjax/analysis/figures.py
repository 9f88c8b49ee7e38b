"""Figures of the papers beyond the report's: how far samples had to be perturbed, and how results depend on a setting.

Each is one SVG as text, drawn like the report's.
"""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter

from perturbjax.analysis.plots import LOOK, _figure, _label, _svg, style


@mpl.rc_context(LOOK)
def norm_plot(norms: np.ndarray, wrong: np.ndarray | None = None, width: float = 5.2) -> str:
    """Distribution of ‖v‖₁, the logit perturbation a sample needed on average over training; apart for wrong labels, if known.

    Source: Yao and Wu, "A Taxonomy for Learning with Perturbation and Algorithms", 2022, Figure 7.
    """
    norms = np.asarray(norms, np.float64)
    fig, (ax,) = _figure(width, 2.9)
    bins = np.linspace(0, max(float(norms.max()), 1e-6), 41)
    groups = (
        [("all labels", np.ones(len(norms), bool))] if wrong is None else [("right labels", ~wrong), ("wrong labels", wrong)]
    )
    for i, (name, which) in enumerate(groups):
        color = style(2 * i).color
        ax.hist(norms[which], bins, weights=np.full(which.sum(), 100 / len(norms)), color=color, alpha=0.65, label=name)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    if wrong is not None:
        ax.legend(frameon=False)
    _label(fig, "mean ‖v‖₁ over training (logits)", "samples (%)")
    return _svg(fig, f"norms-{width:g}", "Distribution of the logit perturbations")


@mpl.rc_context(LOOK)
def sensitivity_plot(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    setting: str,
    reference: tuple[str, float] | None = None,
    width: float = 5.2,
) -> str:
    """Test accuracy against a setting: {method: [(value, mean, std)]}, with a level line for a reference (name, accuracy).

    Accuracies are fractions. Source: Figures 9 and 10 of the taxonomy paper.
    """
    fig, (ax,) = _figure(width, 2.9)
    for i, (name, points) in enumerate(curves.items(), start=1):
        value, mean, std = np.array(sorted(points), np.float64).T
        color, marker, dashes = style(i)
        ax.errorbar(value, 100 * mean, 100 * std, color=color, marker=marker, ls=dashes, lw=1.4, ms=4, capsize=2, label=name)
    if reference is not None:
        ax.axhline(100 * reference[1], color=style(0).color, lw=1, ls=(0, (4, 2)), label=reference[0])
    ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    ax.legend(frameon=False)
    _label(fig, setting, "test accuracy (%)")
    return _svg(fig, f"sensitivity-{setting}-{width:g}", f"Accuracy against {setting}")


@mpl.rc_context(LOOK)
def line_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], below: str, beside: str, width: float = 5.2) -> str:
    """Lines {name: (x, y)} in one pair of axes."""
    fig, (ax,) = _figure(width, 2.9)
    for i, (name, (x, y)) in enumerate(curves.items()):
        color, _, dashes = style(i)
        ax.plot(x, y, color=color, ls=dashes, lw=1.4, label=name)
    ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    ax.legend(frameon=False)
    _label(fig, below, beside)
    return _svg(fig, f"lines-{below}-{beside}-{width:g}".replace(" ", "-"), f"{beside} against {below}")
