"""Figures of the papers beyond the report's: how far samples had to be perturbed, how results depend on a setting, and what
self-paced learning makes of a sample's loss.

Each is one SVG as text, drawn like the report's.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax.typing import ArrayLike
from matplotlib.ticker import FuncFormatter

from perturbjax.analysis.plots import LOOK, blank_figure, edge_labels, style, svg_text
from perturbjax.classes import own_entries
from perturbjax.logit.logpert import logpert_delta
from perturbjax.logit.self_paced_logit import self_paced_logit_delta
from perturbjax.loss.self_paced import self_paced_losses


@mpl.rc_context(LOOK)
def norm_plot(norms: np.ndarray, wrong: np.ndarray | None = None, width: float = 5.2) -> str:
    """Distribution of ‖v‖₁, the logit perturbation a sample needed on average over training; apart for wrong labels, if known.

    Source: Yao and Wu, "A Taxonomy for Learning with Perturbation and Algorithms", 2022, Figure 7.
    """
    norms = np.asarray(norms, np.float64)
    fig, (ax,) = blank_figure(width, 2.9)
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
    edge_labels(fig, "mean ‖v‖₁ over training (logits)", "samples (%)")
    return svg_text(fig, f"norms-{width:g}", "Distribution of the logit perturbations")


@mpl.rc_context(LOOK)
def sensitivity_plot(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    setting: str,
    reference: tuple[str, float] | None = None,
    measure: str = "accuracy",
    width: float = 5.2,
) -> str:
    """Test accuracy against a setting: {method: [(value, mean, std)]}, with a level line for a reference (name, accuracy).

    Accuracies are fractions, of the kind that `measure` names ("balanced accuracy"). Source: Figures 9 and 10 of the taxonomy paper.
    """
    fig, (ax,) = blank_figure(width, 2.9)
    for i, (name, points) in enumerate(curves.items(), start=1):
        value, mean, std = np.array(sorted(points), np.float64).T
        color, marker, dashes = style(i)
        ax.errorbar(value, 100 * mean, 100 * std, color=color, marker=marker, ls=dashes, lw=1.4, ms=4, capsize=2, label=name)
    if reference is not None:
        ax.axhline(100 * reference[1], color=style(0).color, lw=1, ls=(0, (4, 2)), label=reference[0])
    ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    ax.legend(frameon=False)
    edge_labels(fig, setting, f"test {measure} (%)")
    return svg_text(fig, f"sensitivity-{setting}-{width:g}", f"{measure.capitalize()} against {setting}")


@mpl.rc_context(LOOK)
def line_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], below: str, beside: str, width: float = 5.2) -> str:
    """Lines {name: (x, y)} in one pair of axes."""
    fig, (ax,) = blank_figure(width, 2.9)
    for i, (name, (x, y)) in enumerate(curves.items()):
        color, _, dashes = style(i)
        ax.plot(x, y, color=color, ls=dashes, lw=1.4, label=name)
    ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    ax.legend(frameon=False)
    edge_labels(fig, below, beside)
    return svg_text(fig, f"lines-{below}-{beside}-{width:g}".replace(" ", "-"), f"{beside} against {below}")


def self_paced_weights(losses: ArrayLike, threshold: ArrayLike, *, weight: ArrayLike = 0.175) -> dict[str, np.ndarray]:
    """What a sample of cross entropy ℓ [n] counts for, {method: weights [n]}: ∂ℓ̃/∂ℓ of self-paced learning at λ_t = `threshold`.

    The logit perturbations beside it count a sample of two classes by how much of its logit gradient they leave,
    ‖softmax(u + v) − ŷ‖/‖softmax(u) − ŷ‖: self-paced logits with τ = `threshold`, LogPert (exact) with λ = `weight`.

    Source: taxonomy paper, eqs. 63–65, Figure 11.
    """
    losses = jnp.asarray(losses, float)
    slope = lambda kind: jax.grad(lambda x: self_paced_losses(x, threshold, kind=kind).sum())(losses)
    # Two classes, the true one first: ℓ = log(1 + e^{−u}).
    logits = jnp.stack([-jnp.log(jnp.expm1(losses)), jnp.zeros_like(losses)], axis=-1)
    labels = jnp.zeros(losses.shape, jnp.int32)
    left = lambda u: 1 - jax.nn.softmax(u)[:, 0]
    share = lambda delta: left(logits + delta) / left(logits)
    curves = {
        "self-paced, hard": slope("hard"),
        "self-paced, linear": slope("linear"),
        "self-paced logits": share(self_paced_logit_delta(logits, labels, tau=threshold)),
        f"LogPert, λ = {weight:g}": share(logpert_delta(logits, labels, weight=weight)),
    }
    return {name: np.asarray(curve) for name, curve in curves.items()}


def loss_ratios(
    logits: ArrayLike, labels: ArrayLike, *, tau: ArrayLike, scale: ArrayLike = 2.5
) -> tuple[np.ndarray, np.ndarray]:
    """(ℓ, ℓ̃/ℓ), each [N], by growing ℓ: what self-paced logit perturbation leaves of the losses of logits u [N, C].

    Source: taxonomy paper, eq. 65, Figure 12.
    """
    u, y = jnp.asarray(logits, float), jnp.asarray(labels)
    loss = lambda u: -own_entries(jax.nn.log_softmax(u), y)
    before = np.asarray(loss(u))
    after = np.asarray(loss(u + self_paced_logit_delta(u, y, tau=tau, scale=scale)))
    order = np.argsort(before, kind="stable")
    ratio = np.where(before > 0, after / np.where(before > 0, before, 1), 1)  # of a loss of 0 nothing is taken away
    return before[order], ratio[order]
