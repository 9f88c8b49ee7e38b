r"""Where a net looks, and how it arranges the samples: Grad-CAM at any site, features, and their t-SNE.

    α_k = (1/hw) Σ_ij ∂u_c/∂A_ijk,    map = relu(Σ_k α_k A_k), enlarged to the image (bilinear)

A [h, w, K] is the activation at the site, u_c the class's logit. A model that can be entered at the site gives ∂u_c/∂A by differentiating
its rest alone: no hooks. Where only the mean over pixels and a linear layer W follow, α_k = W_ck/hw, Zhou et al.'s class activation map.
Sources: Selvaraju et al., "Grad-CAM", ICCV 2017. van der Maaten, Hinton, "Visualizing Data using t-SNE", JMLR 2008 (scikit-learn's).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from perturbjax.analysis.metrics import Groups
from perturbjax.analysis.plots import LOOK, shorten
from perturbjax.checks import check_labels, check_number
from perturbjax.classes import own_entries, wide
from perturbjax.data import evaluation_batches
from perturbjax.line import line

BATCH = 256
THREADED = 5000  # samples from which t-SNE uses several threads
GROUPS = {"head": ("Blues", "o"), "medium": ("Greys", "."), "tail": ("Oranges", "^")}  # colours of the classes, marker


def grad_cam(
    model: Any, variables: Any, images: jax.Array, labels: ArrayLike, *, site: str = "last_stage", stats: Any = None
) -> jax.Array:
    """[B, H, W], at least 0: how much each place of the image speaks for the class. In evaluation mode; jits.

    Args:
      model: whatever `pj.line` takes. variables, stats: as for `pj.objective`.
      images: [B, H, W, channels], pixels in [0, 1]. labels: [B] integers, the classes whose logits are explained.
      site: one with values [B, h, w, K], or "last_stage".

    Raises:
      ValueError: a site whose values are no maps (of an mlp, or behind the pooling); labels of no class.

    >>> net = {"stage1": lambda w, x: x, "logits": lambda w, a: a.mean((1, 2)) @ w}
    >>> images = jnp.zeros([1, 4, 4, 2]).at[0, 1, 2].set(1.0)  # one bright pixel
    >>> map = grad_cam(net, jnp.array([[16.0, -1.0], [0.0, 1.0]]), images, jnp.array([0]))
    >>> print(map.shape, map[0, 1], map.sum())
    (1, 4, 4) [0. 0. 1. 0.] 1.0
    """
    cut, labels = line(model), jnp.asarray(labels)
    site = cut.site(site)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"grad_cam needs images [B, H, W, channels] and labels [B] of integers, got {images.shape} and {labels.shape} of "
            f"{labels.dtype}. Write images[None] for a single one."
        )
    run = lambda value, start, stop: cut.slice(variables, value, start, stop, stats=stats, train=False, key=None)[0]
    value = run(images, "input", site)
    if value.ndim != 4:
        raise ValueError(
            f"grad_cam needs a site with values [B, h, w, K], got {site!r} with {value.shape}. "
            "Name a stage of a convolutional model: the place in the image is lost in dense layers and behind the pooling."
        )

    check_labels("grad_cam", labels, jax.eval_shape(lambda value: run(value, site, "logits"), value).shape[-1])

    def of_class(value):
        logits = wide(run(value, site, "logits"))
        return own_entries(logits, labels).sum()  # each sample has its own term

    weights = wide(jax.grad(of_class)(value)).mean((1, 2))
    maps = jax.nn.relu(jnp.einsum("bhwk,bk->bhw", wide(value), weights, precision="highest"))
    return jax.image.resize(maps, images.shape[:3], "bilinear")


def penultimate(
    model: Any, variables: Any, inputs: np.ndarray, *, stats: Any = None, site: str = "features", batch_size: int = BATCH
) -> np.ndarray:
    """[N, d]: what the head sees of every sample, in evaluation mode; or the values at another site, flattened.

    Args:
      model, variables, stats: as for `grad_cam`. inputs: [N, ...], images (uint8 is divided by 255) or tokens.
      batch_size: samples at a time; the last batch is padded.
    """
    check_number("penultimate", low=1, batch_size=batch_size)
    cut = line(model)
    site = cut.site(site)

    @jax.jit
    def run(variables, stats, inputs):
        side = {} if cut.side is None else {"side": cut.side(inputs)}
        value = cut.slice(variables, inputs, "input", site, stats=stats, train=False, key=None, **side)[0]
        return wide(value).reshape(len(inputs), -1)

    rows, weights = evaluation_batches(len(inputs), min(batch_size, len(inputs)))
    pixels = lambda batch: batch.astype(np.float32) / 255 if batch.dtype == np.uint8 else batch
    found = [run(variables, stats, jnp.asarray(pixels(inputs[index]))) for index in rows]
    return np.concatenate(jax.device_get(found))[np.asarray(weights).reshape(-1).astype(bool)]


def tsne(features: np.ndarray, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """[N, 2]: t-SNE of features [N, d], begun from their principal components. Perplexity is lowered to (N − 1)/3 for few samples."""
    check_number("tsne", low=0, open_low=True, perplexity=perplexity)
    if features.ndim != 2 or len(features) < 4:
        raise ValueError(f"tsne needs features [N, d] of at least 4 samples, got {features.shape}. Give it more of them.")
    lower = min(perplexity, (len(features) - 1) / 3)
    start = "pca" if features.shape[1] > 1 else "random"
    # Threads wait for one another after every little step: of 300 samples they make 20 s out of 1 where the cores have other work.
    with threadpool_limits(1 if len(features) < THREADED else None):
        return TSNE(2, perplexity=lower, init=start, random_state=seed).fit_transform(np.asarray(features, np.float32))


@mpl.rc_context(LOOK)
def tsne_figure(
    panels: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: Groups | None,
    class_names: Sequence[str] = (),
    *,
    width: float = 7.2,
) -> Figure:
    """Points of the same samples, a panel per net: {net: [N, 2]}; labels [N].

    groups: head classes are blue circles, tail classes orange triangles, the darker the more extreme; the others are grey dots. None:
    all classes alike, each in its own colour. Up to ten classes of head and tail (or of all) have their names at their middles.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    side = (width - 0.2) / columns
    height = rows * (side + 0.15) + 0.4
    fig = Figure(figsize=(width, height))
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    fig.subplots_adjust(
        left=0.1 / width, right=1 - 0.1 / width, bottom=0.35 / height, top=1 - 0.25 / height, wspace=0.04, hspace=0.12
    )
    shown = _drawn_classes(int(labels.max()) + 1, groups)
    named = [c for _, classes in shown for c in classes if groups is None or c not in groups.medium]
    for ax, (name, points) in zip(axes, panels.items(), strict=False):
        for kind, classes in shown:
            palette, marker = GROUPS.get(kind, ("turbo", "o"))
            for i, c in enumerate(classes):
                # The most frequent of the head and the rarest of the tail are darkest.
                place = (
                    (i + 0.5) / len(classes) if kind == "all" else 0.45 if kind == "medium" else 0.9 - 0.4 * i / len(classes)
                )
                style = dict(s=9, color=mpl.colormaps[palette](place), marker=marker, linewidths=0, alpha=0.85)
                ax.scatter(*points[labels == c].T, **style, label=kind if i == 0 and kind != "all" else None)
        for c in named if len(named) <= 10 else ():
            if (labels == c).any():
                text = shorten(str(class_names[c]) if len(class_names) else str(c), 12)
                box = dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.8)
                ax.text(*np.median(points[labels == c], axis=0), text, ha="center", va="center", bbox=box, fontsize=7)
        ax.set_title(shorten(name, int(side * 12)), fontsize=mpl.rcParams["font.size"], loc="left", pad=4)
        ax.set(xticks=[], yticks=[])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if groups is not None:
        handles, kinds = axes[0].get_legend_handles_labels()
        fig.legend(handles, kinds, loc="lower center", ncols=3, frameon=False, markerscale=1.8)
    return fig


def _drawn_classes(num_classes: int, groups: Groups | None) -> list[tuple[str, list[int]]]:
    """[(group, its classes)] in the order of drawing: the tail lies on top."""
    if groups is None:
        return [("all", list(range(num_classes)))]
    return [("medium", groups.medium.tolist()), ("head", groups.head.tolist()), ("tail", groups.tail[::-1].tolist())]


@mpl.rc_context(LOOK)
def cam_figure(
    images: np.ndarray, titles: Sequence[str], maps: Mapping[str, tuple[np.ndarray, Sequence[str]]], *, width: float = 7.2
) -> Figure:
    """Images, a row each, and beside them what each net looks at: {net: (maps [B, H, W], what it says of each image)}.

    images: [B, H, W, channels] in [0, 1], grey unless there are three channels. Every map is drawn relative to its own largest value.
    """
    columns = 1 + len(maps)
    side = min((width - 0.1) / columns, 1.6)
    width, height = columns * side + 0.1, len(images) * (side + 0.2) + 0.25
    fig = Figure(figsize=(width, height))
    axes = fig.subplots(len(images), columns, squeeze=False)
    fig.subplots_adjust(
        left=0.05 / width, right=1 - 0.05 / width, bottom=0.05 / height, top=1 - 0.4 / height, wspace=0.05, hspace=0.2 / side
    )
    font, letters = dict(fontsize=7, loc="left", pad=2), int(side * 14)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        shown = image if image.shape[-1] == 3 else image.mean(-1)
        for ax, (found, said) in zip(axes[row], [(None, titles), *maps.values()], strict=True):
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if found is not None:
                peak = float(found[row].max())
                ax.imshow(found[row] / (peak or 1.0), cmap="inferno", vmin=0, vmax=1, alpha=0.55, interpolation="nearest")
            ax.set_title(shorten(said[row] if found is not None else title, letters), **font)
            ax.set_axis_off()
    for ax, name in zip(axes[0], ["image", *maps], strict=True):
        at = ax.get_position().x0
        fig.text(at, 1 - 0.05 / height, shorten(name, letters), fontsize=8, fontweight="bold", va="top")
    return fig
