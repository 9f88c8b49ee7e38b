"""Confusion matrices of report.html: a picture for each method, and the pairs of classes that are confused most."""

from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm

from perturbjax.analysis import plots
from perturbjax.analysis.ranking import ordered

IN_NUMBERS = 12  # up to so many classes each cell has its number
CELLS = 100  # more classes are drawn as so many groups of neighbours
MOST = 12  # methods with a picture


class Pair(NamedTuple):
    """Samples of one class that are predicted as another."""

    true: int
    predicted: int
    count: int
    share: float
    """Of the class's test samples."""


@mpl.rc_context(plots.LOOK)
def confusion_plot(results: dict, width: float) -> str:
    """A square for each method: row = true class, column = predicted class, colour = share of the row; frequent classes first."""
    counts, methods, shown = np.asarray(results["data"]["class_counts"]), results["methods"], with_confusion(results)[:MOST]
    bins = plots.class_bins(counts, CELLS)
    place = np.empty(len(counts), int)  # class -> cell
    for cell, classes in enumerate(bins):
        place[classes] = cell
    few, n = len(bins) <= IN_NUMBERS, len(bins)
    columns = 1 if width < 5 else 3 if few else 2
    names = [plots.shorten(str(results["data"]["class_names"][own[0]]), 12) for own in bins]
    titles = [plots.shorten(name, int(width / columns * 12) - 8, 2) for name in shown]
    named = plots.CHARACTER * max(map(len, names)) + 0.1  # inches for the names of classes
    gap, above, below, scale = 0.2, 0.16 + 0.14 * max(t.count("\n") + 1 for t in titles), named + 0.1, 0.75
    side = (width - 0.4 - gap * (columns - 1)) / columns - named
    rows = -(-len(shown) // columns)
    height = rows * (above + side + below) + scale
    fig = mpl.figure.Figure(figsize=(width, height))
    norm, colours = PowerNorm(0.5, 0, 100), mpl.colormaps["Blues"].with_extremes(bad="#dddddd")
    step = max(1, int(np.ceil(0.14 * n / side)))  # so that the names don't touch
    for i, name in enumerate(shown):
        row, column = divmod(i, columns)
        left = 0.3 + named + column * (named + side + gap)
        bottom = height - (row + 1) * (above + side) - row * below
        ax = fig.add_axes((left / width, bottom / height, side / width, side / height))
        shares = row_shares(methods[name], place, n)
        image = ax.imshow(shares, cmap=colours, norm=norm, interpolation="none", aspect="equal")
        ax.set_title(titles[i], fontsize=plots.FONT, loc="left", pad=4)
        ax.set_xticks(range(0, n, step), names[::step], rotation=90)
        ax.set_yticks(range(0, n, step), names[::step])
        ax.tick_params(length=2, pad=2)
        for spine in ax.spines.values():
            spine.set_visible(True)
        for r, c in np.argwhere(np.nan_to_num(shares) >= 0.5) if few else ():
            dark = norm(shares[r, c]) > 0.55
            ax.text(c, r, f"{shares[r, c]:.0f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "#222222")
    bar = fig.add_axes((0.3 / width, 0.4 / height, min(2.2, width - 2) / width, 0.1 / height))
    fig.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_xlabel("% of the true class's test samples", fontsize=plots.FONT, loc="left")
    bar.tick_params(length=2, labelsize=7)
    fig.text(0.06 / width, 1 - (above + side / 2) / height, "true class", rotation=90, va="center", fontsize=plots.FONT)
    fig.text(1 - 0.05 / width, 0.3 / height, "columns: predicted class", ha="right", fontsize=plots.FONT)
    return plots.svg_text(fig, f"confusion-{width:g}", "Confusion matrix of each method")


def with_confusion(results: dict) -> list[str]:
    """The methods that have a confusion matrix, in the tables' order; the first `MOST` get a picture."""
    return [name for name in ordered(results) if results["methods"][name].get("confusion")]


def row_shares(method: dict, place: np.ndarray, cells: int) -> np.ndarray:
    """[cells, cells], percent of the samples of each row of the method's confusion matrix; nan in rows without samples.

    place: [C], the cell of each class.
    """
    entries = method["confusion"]
    matrix, whole = np.zeros([cells, cells]), np.zeros([cells, 1])
    np.add.at(matrix, (place[entries["true"]], place[entries["predicted"]]), entries["count"])
    np.add.at(whole, (place, 0), method["support"])
    return np.where(whole > 0, 100 * matrix / np.maximum(whole, 1), np.nan)


def most_confused(method: dict, most: int = 5) -> list[Pair]:
    """The pairs of classes with most wrong predictions by their share of the true class's samples, then by their number."""
    entries, support = method["confusion"], method["support"]
    pairs = [
        Pair(t, p, n, n / support[t])
        for t, p, n in zip(entries["true"], entries["predicted"], entries["count"], strict=True)
        if t != p
    ]
    return sorted(pairs, key=lambda pair: (-pair.share, -pair.count, pair.true, pair.predicted))[:most]
