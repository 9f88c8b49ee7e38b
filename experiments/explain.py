"""What did each method learn to look at, and how does it arrange the classes? Grad-CAM and t-SNE of trained nets, side by side.

    python experiments/explain.py                                            # trains ce and la on the digits, then looks
    python experiments/explain.py --runs runs/compare-digits-longtail-50 --images 8
    python experiments/explain.py --runs DIR DIR --data CIFAR10.npz --site stage2 --explain prediction

Of the test images. Writes tsne.svg (features before the head, head and tail classes marked), cam.svg (Grad-CAM at a site: of rare and of
frequent classes in turn), each as .png too, and explain.json to --out; prints a table. t-SNE bends distances, so the table has the
silhouettes of the classes in the features themselves: how much nearer a sample is to its own class than to the next one, −1 to 1. Runs
are trained as compare.py does, in --out/runs; nets without maps (mlp, texts) get no Grad-CAM.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.metrics import silhouette_samples

from experiments import landscape, shared
from experiments.landscape import Net
from experiments.shared import many
from perturbjax.analysis.explain import cam_figure, grad_cam, penultimate, tsne, tsne_figure
from perturbjax.analysis.metrics import Groups, groups_by_frequency
from perturbjax.checks import check_choice, check_number
from perturbjax.data import Dataset
from perturbjax.line import line
from perturbjax.training import predict


@dataclasses.dataclass(frozen=True)
class ExplainSettings(many.TrainingSettings):
    """Flags of explain.py."""

    model: str = "cnn"
    """As in compare.py; not with --runs."""
    methods: str = "ce, la"
    """What is trained, as in compare.py; not with --runs."""
    seeds: int = 1
    """n: seeds 0 to n-1 of every method."""
    runs: tuple[str, ...] = ()
    """Folders of compare.py, train.py or landscape.py: all finished runs in them. --data says where the data is, if it isn't known by
    name."""
    out: str | None = None
    """Folder for what is written; the first of --runs, or runs/explain-DATA-VIEW, if not given."""
    samples: int = 1000
    """At most so many test samples in the t-SNE, drawn with seed 0; 0: all."""
    perplexity: float = 30.0
    """Of the t-SNE: about how many neighbours a sample has."""
    images: int = 6
    """Images for Grad-CAM; 0: none."""
    site: str = "last_stage"
    """Where Grad-CAM looks: a stage, or stem."""
    explain: str = "label"
    """Whose logit: label or prediction."""


def main(argv: list[str]) -> None:
    """Trains what is missing, looks, writes."""
    settings = shared.first_flags(argv, ExplainSettings, __doc__, one_process=True)
    check(settings)
    site = lambda model: line(model).site(settings.site) if settings.images else None
    landscape.with_nets(argv, settings, "explain", look, check_model=site)


def check(settings: ExplainSettings) -> None:
    """Raises ValueError for flags that can't be."""
    check_choice("--explain", "explain", settings.explain, ("label", "prediction"))
    for name, low in dict(seeds=1, samples=0, images=0).items():
        check_number(f"--{name}", low=low, **{name: getattr(settings, name)})
    check_number("--perplexity", low=0, open_low=True, perplexity=settings.perplexity)


def check_together(nets: list[Net]) -> None:
    """Raises ValueError for nets whose test samples are not the same: their pictures can't stand side by side."""
    first = nets[0].dataset
    for net in nets[1:]:
        data = net.dataset
        if not (np.array_equal(data.test_labels, first.test_labels) and np.array_equal(data.test_images, first.test_images)):
            raise ValueError(
                f"explain.py needs runs with the same test samples, got others in {net.folder} than in {nets[0].folder}. "
                "Give runs of one data set, view and seed."
            )


def look(nets: list[Net], settings: ExplainSettings, out: pathlib.Path, console: Console) -> None:
    """Draws and measures every net; writes and prints the results."""
    check_together(nets)
    data = nets[0].dataset
    groups, titles = groups_by_frequency(data.class_counts), titles_of(nets)
    rows = np.random.default_rng(0).permutation(len(data.test_labels))[: settings.samples or None]
    labels = data.test_labels[rows]
    entries, points = [], {}
    for title, net in zip(titles, nets, strict=True):
        features = penultimate(net.model, net.params, data.test_images[rows], stats=net.stats)
        points[title] = tsne(features, perplexity=settings.perplexity)
        entries.append(measured(net, features, labels, groups))
    landscape.write(
        out / "tsne", tsne_figure(points, labels, groups, data.class_names), "t-SNE of the features of the trained nets"
    )
    files, why = ["explain.json", "tsne.svg and .png"], None
    if settings.images and (why := no_maps(nets, settings.site)) is None:
        chosen = choose(data, groups, settings.images)
        images = pixels(data.test_images[chosen])
        said = {title: explained(net, images, data, chosen, settings) for title, net in zip(titles, nets, strict=True)}
        names = [f"{data.class_names[c]}{mark(c, groups)}" for c in data.test_labels[chosen]]
        landscape.write(out / "cam", cam_figure(images, names, said), "Grad-CAM of the trained nets")
        files.append("cam.svg and .png")
    report = {
        "command": shared.command_line(),
        "versions": shared.versions(),
        "settings": dataclasses.asdict(settings),
        "samples": len(labels),
        "nets": entries,
    }
    (out / "explain.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(shown(titles, entries))
    if why is not None:
        console.print(f"note: no Grad-CAM: {why}", highlight=False, soft_wrap=True)
    console.print(f"Wrote {', '.join(files)} to {out}", highlight=False, soft_wrap=True)


def titles_of(nets: list[Net]) -> list[str]:
    """A net's method; with its seed, or its folder, where that is needed to tell them apart."""
    kinds: tuple[Callable[[Net], str], ...] = (
        lambda net: net.method,
        lambda net: f"{net.method}, seed {net.seed}",
        lambda net: f"{net.method}, {net.folder}",
    )
    tried = [[kind(net) for net in nets] for kind in kinds]
    return next((titles for titles in tried if len(set(titles)) == len(nets)), tried[-1])


def measured(net: Net, features: np.ndarray, labels: np.ndarray, groups: Groups | None) -> dict[str, Any]:
    """A net's numbers, as explain.json has them: accuracy and silhouette by group, means over the samples of its classes."""
    data = net.dataset
    right = predict(net.model, net.params, net.stats, data.test_images).argmax(1) == data.test_labels
    several = 2 <= len(np.unique(labels)) < len(labels)
    inside = silhouette_samples(features, labels) if several else np.full(len(labels), np.nan)
    classes = {"all": np.arange(data.num_classes)} | ({} if groups is None else groups._asdict())

    def mean(values: np.ndarray, of: np.ndarray) -> dict[str, float | None]:
        chosen = {name: values[np.isin(of, own)] for name, own in classes.items()}
        return {name: float(own.mean()) if own.size and np.isfinite(own).all() else None for name, own in chosen.items()}

    found = {"method": net.method, "seed": net.seed, "folder": str(net.folder)}
    return found | {"accuracy": mean(right.astype(np.float64), data.test_labels), "silhouette": mean(inside, labels)}


def no_maps(nets: list[Net], site: str) -> str | None:
    """Why there is no Grad-CAM: the site's values are no maps; None if they are."""
    for net in nets:
        if net.dataset.tokenizer is not None:
            return "these are texts."
        cut = line(net.model)
        like = jax.ShapeDtypeStruct((1, *net.dataset.image_shape), jnp.float32)
        value = jax.eval_shape(functools.partial(at_site, cut, cut.site(site)), net.params, net.stats, like)
        if value.ndim != 4:
            return f"{type(net.model).__name__} has values {value.shape} at {cut.site(site)}, which have no place in the image."
    return None


def at_site(cut, site, params, stats, images):
    """The value there."""
    return cut.slice(params, images, "input", site, stats=stats, train=False, key=None)[0]


def choose(data: Dataset, groups: Groups | None, number: int) -> np.ndarray:
    """[number] test samples drawn with seed 0: of the rarest class, the most frequent, the second rarest, ...; again from the start
    if there are more images than classes."""
    order = np.arange(data.num_classes) if groups is None else np.concatenate(groups)  # most frequent first
    turns = [c for pair in zip(order[::-1], order, strict=True) for c in pair] if groups is not None else list(order)
    turns = list(dict.fromkeys(turns))
    shuffled = np.random.default_rng(0).permutation(len(data.test_labels))
    of_class = {c: shuffled[data.test_labels[shuffled] == c] for c in turns}
    rounds = max(len(own) for own in of_class.values())
    return np.array([of_class[c][i] for i in range(rounds) for c in turns if i < len(of_class[c])][:number])


def mark(c: int, groups: Groups | None) -> str:
    """Behind the class's name: whether it is of the head or of the tail."""
    if groups is None:
        return ""
    return " (head)" if c in groups.head else " (tail)" if c in groups.tail else ""


def pixels(images: np.ndarray) -> np.ndarray:
    """As float32 in [0, 1]."""
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images


def explained(
    net: Net, images: np.ndarray, data: Dataset, chosen: np.ndarray, settings: ExplainSettings
) -> tuple[np.ndarray, list[str]]:
    """(maps [B, H, W], what the net says of each image)."""
    logits = predict(net.model, net.params, net.stats, data.test_images[chosen])
    said, labels = logits.argmax(1), data.test_labels[chosen]
    of = labels if settings.explain == "label" else said
    maps = compiled_cam(net.model, settings.site)(net.params, net.stats, jnp.asarray(images), jnp.asarray(of))
    words = ["" if s == y else "✗ " for s, y in zip(said, labels, strict=True)]
    return np.asarray(maps), [f"{word}{data.class_names[s]}" for word, s in zip(words, said, strict=True)]


@functools.cache
def compiled_cam(model: Any, site: str) -> Callable:
    """One program for all nets of a model."""
    return jax.jit(lambda params, stats, images, labels: grad_cam(model, params, images, labels, site=site, stats=stats))


def shown(titles: list[str], entries: list[dict]) -> Table:
    """The table on the terminal."""
    groups = list(entries[0]["accuracy"])
    caption = "test accuracy in % / silhouette of the features"
    table = Table("net", *groups, box=None, caption=caption, caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    cell = lambda value, form, scale=1: "–" if value is None else format(scale * value, form)
    for title, entry in zip(titles, entries, strict=True):
        both = [(entry["accuracy"][name], entry["silhouette"][name]) for name in groups]
        table.add_row(Text(title), *(f"{cell(right, '.1f', 100)} / {cell(inside, '.2f')}" for right, inside in both))
    return table


if __name__ == "__main__":
    shared.start(main)
