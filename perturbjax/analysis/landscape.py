r"""The loss around trained parameters: along a line, over a plane, and the directions to look in.

    L(w + t·d),      L(w + s·d₁ + t·d₂)

gradient: d = ∇L/‖∇L‖, length 1. Random: Gaussian, then scaled filter by filter to the length of the net's own filter, since a net's
loss doesn't change when a layer is scaled and the next one scaled back: so t means the same in every net.
Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018 (filter normalisation).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from perturbjax.analysis.plots import LOOK, edge_labels, shorten, style, svg_text
from perturbjax.analysis.sharpness import DataLoss
from perturbjax.checks import check_choice
from perturbjax.classes import wide
from perturbjax.parameter.ascent import unit_tree


def gradient_direction(loss: DataLoss, params: Any) -> Any:
    """∇L(w)/‖∇L(w)‖, the steepest way up; zeros where the gradient is zero."""
    return unit_tree(loss.gradient(params))


def random_direction(
    params: Any,
    key: jax.Array,
    *,
    normalise: Literal["filter", "layer", "none"] = "filter",
    vectors: Literal["zero", "scale"] = "zero",
) -> Any:
    """A Gaussian direction in the form of the parameters.

    Args:
      normalise: "filter": what leads to one output (the last axis) has the length of the same part of the parameters; "layer": every
        array has the length of its parameters; "none": as drawn.
      vectors: what becomes of parameters with one axis, biases and BatchNorm's scales: "zero" leaves them where they are (the paper's
        way), "scale" gives their direction the length of the whole vector.
    """
    check_choice("random_direction", "normalise", normalise, ("filter", "layer", "none"))
    check_choice("random_direction", "vectors", vectors, ("zero", "scale"))
    leaves, form = jax.tree.flatten(params)

    def drawn(w, k):
        noise = jax.random.normal(k, w.shape, wide(w).dtype)
        if w.ndim < 2 and vectors == "zero":
            return jnp.zeros_like(w)
        if normalise == "none" and w.ndim >= 2:
            return noise.astype(w.dtype)
        axes = tuple(range(w.ndim - 1)) if normalise == "filter" and w.ndim >= 2 else None
        length = lambda x: jnp.sqrt(jnp.sum(wide(x) ** 2, axis=axes, keepdims=True))
        return (noise * (length(w) / length(noise))).astype(w.dtype)

    return jax.tree.unflatten(form, [drawn(w, k) for w, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)])


def line_losses(loss: DataLoss, params: Any, direction: Any, places: Sequence[float]) -> np.ndarray:
    """[K]: L(w + t·d) for every t of places [K]."""
    return loss.along(params, (direction,), np.asarray(places, np.float64)[:, None])


def plane_losses(loss: DataLoss, params: Any, first: Any, second: Any, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """[len(y), len(x)]: L(w + x·d₁ + y·d₂), as matplotlib's contours want it."""
    across, up = np.meshgrid(x, y)
    return loss.along(params, (first, second), np.stack([across.ravel(), up.ravel()], axis=1)).reshape(across.shape)


@mpl.rc_context(LOOK)
def line_figure(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], width: float = 7.2) -> Figure:
    """Losses along lines: {what the line is: {net: (places [K], losses [seeds, K])}}, a panel each; all seeds, thin, and their mean."""
    fig = Figure(figsize=(width, 3.1))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    fig.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, bottom=0.5 / 3.1, top=1 - 0.25 / 3.1, wspace=0.08)
    for ax, (title, nets) in zip(axes, panels.items(), strict=True):
        for i, (name, (places, losses)) in enumerate(nets.items()):
            color, _, dashes = style(i)
            if len(losses) > 1:
                ax.plot(places, np.transpose(losses), color=color, lw=0.6, alpha=0.35)
            ax.plot(places, np.mean(losses, axis=0), color=color, ls=dashes, lw=1.5, label=shorten(name, 30))
        ax.set_title(title, fontsize=mpl.rcParams["font.size"], loc="left", pad=4)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    axes[-1].legend(frameon=False, loc="upper center")
    edge_labels(fig, "distance from the trained parameters", "loss")
    return fig


@mpl.rc_context(LOOK)
def plane_figure(planes: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], width: float = 7.2) -> Figure:
    """Contours of the loss over planes: {net: (x, y, losses [len(y), len(x)])}, a panel each, with the same levels in all."""
    columns = min(len(planes), 3)
    rows = -(-len(planes) // columns)
    side = (width - 0.5) / columns
    height = rows * (side + 0.1) + 0.4
    fig = Figure(figsize=(width, height))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    fig.subplots_adjust(
        left=0.6 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.06, hspace=0.16
    )
    every = np.concatenate([losses[np.isfinite(losses) & (losses > 0)].ravel() for *_, losses in planes.values()])
    low, high = float(every.min()), float(every.max())
    levels = np.geomspace(low, max(high, low * 1.01), 14)
    for ax, (name, (x, y, losses)) in zip(axes, planes.items(), strict=False):
        ax.contourf(
            x, y, np.clip(losses, low, high), levels, cmap="Blues", norm=mpl.colors.LogNorm(low, 5 * levels[-1])
        )  # no darker than its labels
        drawn = ax.contour(x, y, losses, levels[1:-1:2], colors="#444444", linewidths=0.5)
        ax.clabel(drawn, fmt=lambda loss: f"{loss:.2g}", fontsize=6)
        ax.plot(0, 0, "+", color="#D55E00", ms=7, mew=1.4)
        ax.set_title(shorten(name, int(side * 12)), fontsize=mpl.rcParams["font.size"], loc="left", pad=4)
        ax.set_aspect("equal")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[len(planes) :]:
        ax.set_visible(False)
    edge_labels(fig, "first random direction", "second random direction")
    return fig


def as_svg(fig: Figure, name: str, label: str) -> str:
    """The figure as text of an <svg>, like the report's; `name` is in its ids, `label` is for screen readers."""
    with mpl.rc_context(LOOK):
        return svg_text(fig, name, label)
