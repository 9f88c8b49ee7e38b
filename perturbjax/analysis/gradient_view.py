r"""The unified view of gradient perturbation: what any method does to each class's gradient, δ_c = g̃_c − g_c.

    g_c = (1/n_c) Σ_{i: y_i = c} ∇ℓ_i          the class's mean gradient in the batch, by the plain loss
    relative variation ‖δ_c‖/‖g_c‖,    gain ‖g̃_c‖/‖g_c‖ − 1 (more than zero: amplified, less: dampened)

What g̃_c is, by kind of method:

    perturbation of the loss (LPG, LPL, ...)       the class's mean gradient by the perturbed loss: (1/n_c) Σ J_iᵀ h̃_i for LPG
    link that asks for gradients (SAM, DP-SGD)     its answer for the class's part of the loss; SAM: g_c at w + ρ g/‖g‖, g of the whole batch
    link on the gradient alone (clipping, noise)   its answer to g_c: g_c · min(1, τ/‖g_c‖); g_c + N(0, σ²)
    PCGrad, GradDrop                               g_c after surgery, the classes being the groups

Links act with their initial state; those whose answer mixes two gradients (PUGD, GSAM) put the whole batch's one into every class's.
A penalty of the loss (center loss) is no class's own and left out.
Source: "Learning to Perturb Gradients" (LPG), section 3.2 and Figure 1.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jax.typing import ArrayLike
from matplotlib.ticker import MaxNLocator

from perturbjax.analysis.plots import LOOK, class_bins, edge_labels, shorten, style, svg_text
from perturbjax.chains import split_methods
from perturbjax.classes import wide
from perturbjax.core import Batch, objective
from perturbjax.data import epoch_order
from perturbjax.gradient.graddrop import GradDropState
from perturbjax.gradient.groups import added, group_members, weighted_gradients
from perturbjax.gradient.pcgrad import PCGradState


class GradientView(NamedTuple):
    """What a method does to the gradient of each class of a batch."""

    present: jax.Array  # [C] bool, whether the class is in the batch; norm, relative and gain are zero where it isn't
    norm: jax.Array  # [C], ‖g_c‖
    relative: jax.Array  # [C], ‖δ_c‖/‖g_c‖; 0 where g_c is 0
    gain: jax.Array  # [C], ‖g̃_c‖/‖g_c‖ − 1; 0 where g_c is 0
    gradients: Any  # leaves [C, ...], g_c
    delta: Any  # leaves [C, ...], g̃_c − g_c


def gradient_perturbation(
    methods: Any,
    model: Any,
    params: Any,
    batch: Batch,
    *,
    num_classes: int,
    states: tuple | None = None,
    stats: Any = None,
    class_counts: ArrayLike | None = None,
    num_examples: int | None = None,
    replays: int = 1,
    key: jax.Array | None = None,
    step: ArrayLike | None = None,
    progress: ArrayLike | None = None,
    epoch: ArrayLike | None = None,
) -> GradientView:
    """δ_c = g̃_c − g_c of one method, or of several that act together, for every class of a batch. Jits.

    Args:
      methods: a perturbation, an optax link, or a sequence of both in their order.
      model, params, stats: as for `pj.objective`; BatchNorm is in training mode, by the whole batch's statistics.
      states: of the perturbations; None: initial ones (a split by accuracy then leaves all classes alone).
      class_counts, num_examples, replays: as for `pj.objective`. key, step, progress, epoch: as for its call. At the first step of an epoch,
        step 0 too, an LPA with several sites compares them and perturbs none: for what it does, give states in which they have been
        compared and a later step.

    >>> import perturbjax as pj
    >>> x, y = jnp.eye(3), jnp.arange(3)
    >>> view = gradient_perturbation(pj.gradient_clipping(bound=0.4), lambda w, x: x @ w, jnp.zeros([3, 3]), pj.batch(x, y), num_classes=3)
    >>> print(view.norm.round(2), view.relative.round(2), view.gain.round(2))
    [0.82 0.82 0.82] [0.51 0.51 0.51] [-0.51 -0.51 -0.51]
    """
    links, transforms = split_methods(methods)
    settings = dict(num_classes=num_classes, class_counts=class_counts, num_examples=num_examples, replays=replays)
    key = jax.random.key(0) if key is None else key
    place = dict(key=key, step=step, progress=progress, epoch=epoch, stats=stats)
    labels = jnp.asarray(batch.labels)

    def grad_fn_of(links: tuple, states: tuple):
        made = objective(model, links, **settings)
        return lambda p, *, weights=None: jax.grad(made, has_aux=True)(p, states, batch, weights=weights, **place)[0]

    if states is None:
        states = objective(model, links, **settings).init(params, jnp.asarray(batch.inputs), stats=stats)
    members = group_members("gradient_perturbation", "classes", {"labels": labels, "num_classes": num_classes})
    count, size = members.sum(1), members.shape[1]
    means = lambda parts: jax.tree.map(lambda g: wide(g) * size / jnp.maximum(_column(count, g), 1), parts)

    plain, _ = weighted_gradients(grad_fn_of((), ()), params, members)
    grad_fn, made = grad_fn_of(links, states), objective(model, links, **settings)
    losses = lambda p: made(p, states, batch, **place)[1].losses
    now, penalty = weighted_gradients(grad_fn, params, members) if links else (plain, None)
    whole = jax.tree.map(lambda g: g.sum(0), now)
    whole = whole if penalty is None else added(whole, penalty)
    given = dict(
        key=key, step=step, progress=progress, labels=labels, num_classes=num_classes, side=batch.side, axis_name=None,
        num_domains=None, loss_fn=losses, losses=losses(params), value=losses(params).mean(), rate=jnp.ones([]),
    )  # fmt: skip
    for link in transforms:
        now, whole = _through(optax.with_extra_args_support(link), now, whole, grad_fn, params, members, given)
    gradients = means(plain)
    delta = means(jax.tree.map(lambda a, b: wide(a) - b, now, plain))
    norm, moved = _norms(gradients), _norms(delta)
    divisor = jnp.where(norm > 0, norm, 1)
    after = _norms(jax.tree.map(jnp.add, gradients, delta))
    ratio = lambda a: jnp.where(norm > 0, a / divisor, 0)
    return GradientView(count > 0, norm, ratio(moved), ratio(after - norm), gradients, delta)


def _through(link, parts: Any, whole: Any, grad_fn, params: Any, members: jax.Array, given: dict) -> tuple[Any, Any]:
    """One link: what becomes of the classes' parts of the batch's gradient (leaves [C, ...], adding up to it) and of the whole."""
    state, count, size = link.init(params), members.sum(1), members.shape[1]
    given = dict(given, grad_fn=grad_fn)
    answer = lambda g, **more: link.update(g, state, params, **{**given, "local_grads": g, **more})[0]

    def of_class(member):
        """The link asks for gradients: it is given the whole gradient, and answers for the class's part of the loss."""
        chosen = lambda p, weights: grad_fn(p, weights=member if weights is None else member * weights)
        penalty = lambda p: grad_fn(p, weights=0 * member)
        return answer(whole, grad_fn=lambda p, *, weights=None: jax.tree.map(jnp.subtract, chosen(p, weights), penalty(p)))

    if isinstance(state, PCGradState | GradDropState):
        changes = answer(whole, each=True)
        if (groups := jax.tree.leaves(changes)[0].shape[0]) != len(members):
            raise ValueError(
                f"gradient_perturbation needs pcgrad and graddrop with groups='classes', got {groups} groups. Write pcgrad()."
            )
        after = added(parts, changes)
    elif optax.tree_utils.tree_get_all_with_path(state, "evaluations"):
        after = jax.vmap(of_class)(members)
    else:
        means = jax.tree.map(lambda g: g * size / jnp.maximum(_column(count, g), 1), parts)
        after = jax.tree.map(lambda g: g * _column(count, g) / size, jax.vmap(answer)(means))
    return after, answer(whole)


def _column(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape((-1,) + (1,) * (like.ndim - 1)).astype(wide(like).dtype)


def _norms(tree: Any) -> jax.Array:
    """[C] norms over all leaves [C, ...]."""
    return jnp.sqrt(sum(jnp.sum(wide(g) ** 2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(tree)))


class Variations(NamedTuple):
    """Over the batches that hold the class; nan for a class that none holds.

    Ratios of means: the mean of ratios would be that of the few batches where a class is learnt perfectly and ‖g_c‖ is next to zero.
    """

    relative: np.ndarray  # [C], mean ‖δ_c‖ / mean ‖g_c‖
    gain: np.ndarray  # [C], mean ‖g̃_c‖ / mean ‖g_c‖ − 1
    norm: np.ndarray  # [C], mean ‖g_c‖


def gradient_variations(
    methods: Any,
    model: Any,
    params: Any,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    stats: Any = None,
    batch_size: int = 64,
    batches: int | None = None,
    replays: int = 1,
    seed: int = 0,
) -> Variations:
    """What a method does to the classes' gradients over a data set, at fixed parameters.

    The perturbations' statistics (accuracy by class) are gathered in a first pass over the data, an epoch in which nothing is learnt.
    The second pass is looked at, each batch at its own step: an LPA with several sites compares them on the first one, which it leaves
    alone.
    inputs: floats, as the model takes them. batches: at most so many are looked at; None: all full ones of an epoch.
    replays: how often each comes in a row, all of which count.
    """
    look = functools.partial(gradient_perturbation, methods, model, params)
    place = dict(num_classes=num_classes, stats=stats, batch_size=batch_size, batches=batches, replays=replays, seed=seed)
    return over_batches(look, methods, model, params, inputs, labels, **place)


def over_batches(
    look: Callable[..., Any],
    methods: Any,
    model: Any,
    params: Any,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    stats: Any,
    batch_size: int,
    batches: int | None,
    replays: int,
    seed: int,
) -> Variations:
    """`look(batch, states=, ...)` over the batches of an epoch, after one in which the methods gather their statistics.

    look: returns an object with `present`, `norm`, `relative` and `gain` [C], such as a GradientView; it is given the places that
    `gradient_perturbation` is. The rest: see `gradient_variations`.
    """
    links, _ = split_methods(methods)
    labels = np.asarray(labels, np.int32)
    counts = np.bincount(labels, minlength=num_classes)
    settings = dict(num_classes=num_classes, class_counts=counts, num_examples=len(labels), replays=replays)
    made = objective(model, links, **settings)
    orders = [
        epoch_order(len(labels), min(batch_size, len(labels)), seed, epoch)[:most] for epoch, most in ((0, None), (1, batches))
    ]
    orders = [order.repeat(replays, axis=0) for order in orders]
    batch = lambda rows: Batch(jnp.asarray(inputs[rows]), jnp.asarray(labels[rows]), index=jnp.asarray(rows))
    key = jax.random.key(seed)

    @jax.jit
    def settle(states, data, key, step):
        return made(params, states, data, key=key, stats=stats, step=step, progress=0.0, epoch=0)[1].states

    @jax.jit
    def view(states, data, key, step):
        place = dict(key=key, stats=stats, step=step, progress=0.5, epoch=1)
        found = look(data, states=states, **settings, **place)
        lengths = (found.norm, found.norm * found.relative, found.norm * (1 + found.gain))
        return made(params, states, data, **place)[1].states, (found.present, *lengths)

    states = made.init(params, jnp.asarray(inputs[:1]).repeat(len(orders[0][0]), axis=0), stats=stats)
    if links:
        for number, rows in enumerate(orders[0]):
            states = settle(states, batch(rows), jax.random.fold_in(key, number), jnp.int32(number))
    seen = []
    for step, rows in enumerate(orders[1], start=len(orders[0])):
        states, found = view(states, batch(rows), jax.random.fold_in(key, step), jnp.int32(step))
        seen.append(jax.device_get(found))
    present, *lengths = (np.array(column, np.float64).sum(0) for column in zip(*seen, strict=True))
    norm, moved, after = (length / np.where(present > 0, present, np.nan) for length in lengths)  # absent classes add zeros
    divisor = np.where(norm > 0, norm, np.nan)
    return Variations(moved / divisor, after / divisor - 1, norm)


@mpl.rc_context(LOOK)
def gradient_plot(
    panels: Mapping[str, tuple[np.ndarray, Mapping[str, Variations]]],
    width: float = 7.2,
    *,
    what: str = "gradient",
    symbol: str = "g",
) -> str:
    """Relative variation by class: {data: (training samples of each class, {method: Variations})}; a row a method, a column a data set.

    Classes are sorted by frequency, which the grey bars show. A full bar is a gradient that grows, a hollow one a gradient that shrinks.
    what, symbol: what the methods change, for the labels.
    """
    methods = list(dict.fromkeys(name for _, found in panels.values() for name in found))
    height = 1.15 * len(methods) + 0.9
    fig = mpl.figure.Figure(figsize=(width, height))
    axes = fig.subplots(len(methods), len(panels), sharex="col", sharey="row", squeeze=False)
    fig.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.42 / height, wspace=0.06, hspace=0.34
    )
    for j, (title, (counts, found)) in enumerate(panels.items()):
        counts = np.asarray(counts)
        bins = class_bins(counts)
        x = np.arange(1, len(bins) + 1)
        for i, name in enumerate(methods):
            ax, color = axes[i, j], style(i + 1).color
            if counts.max() > 1.5 * counts.min():
                sizes = [counts[b].mean() / counts.max() for b in bins]
                ax.bar(x, sizes, 0.98, color="#efefef", transform=ax.get_xaxis_transform(), zorder=0)
            if name in found:
                relative, grows = 100 * _binned(found[name].relative, bins), _binned(found[name].gain, bins) >= 0
                fill = [color if up else "white" for up in grows]
                ax.bar(x, relative, 0.6, color=fill, edgecolor=color, lw=1.1, zorder=2)
            ax.set_title(shorten(name, 40), fontsize=mpl.rcParams["font.size"], loc="left", pad=3, color=color)
            ax.yaxis.set_major_locator(MaxNLocator(3))
            ax.set_xticks([])
        axes[0, j].annotate(
            title,
            (0.5, 1),
            (0, 17),
            "axes fraction",
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            annotation_clip=False,
        )
    for ax in axes[:, 0]:
        ax.set_ylim(bottom=0)  # once all of the row is drawn
    below = f"classes, most frequent in training first (full: the {what} grows, hollow: it shrinks)"
    edge_labels(fig, below, f"change of the class's {what}, ‖δ‖/‖{symbol}‖ (%)")
    return svg_text(fig, f"{what}s-{width:g}", f"Relative variation of the {what} by class")


def _binned(values: np.ndarray, bins: list[np.ndarray]) -> np.ndarray:
    """Means over the classes of each bin, without those that no batch held; nan where that leaves none."""
    return np.array([np.nanmean(values[b]) if np.isfinite(values[b]).any() else np.nan for b in bins])
