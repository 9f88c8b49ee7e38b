"""The figure `gradients` of figures.py: what methods do to each class's gradient, on balanced and on long-tailed data."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from experiments import shared
from perturbjax.analysis.gradient_view import Variations, gradient_plot, gradient_variations
from perturbjax.training import fit
from perturbjax.training.step import pixels


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Relative variation of each class's gradient under each method (LPG's Figure 1)."""

    methods: str = "sam, clip(bound=1.0), noise(eta=1e-5), pcgrad, lpg(bound=0.02), lpg(bound=0.02, split=frequency)"
    """As for compare.py; a row each."""
    data: str = "digits"
    """As for train.py."""
    views: tuple[str, ...] = ("none", "longtail(50)")
    """What is made of the data, as for train.py; a column each."""
    model: str = "mlp"
    """As for train.py."""
    epochs: int = 2
    """Passes of plain training before the gradients are looked at."""
    batch_size: int = 64
    """Of the training and of the look."""
    batches: int = 50
    """At most so many batches are looked at."""
    seed: int = 0
    """Of views, training and draws."""
    out: str = "gradients.svg"
    """File to write."""


def draw_gradients(settings: Gradients) -> str:
    """Trains a plain net per view and perturbs its gradients by every method."""
    return gradient_plot(class_panels(settings, gradient_variations))


def class_panels(settings: Gradients, look: Callable[..., Variations]) -> dict[str, tuple[np.ndarray, dict[str, Variations]]]:
    """{view: (training samples of each class, {method: what `look` sees of it in a plain net trained on the view})}."""
    methods, panels = shared.parse_methods(settings.methods), {}
    for view in settings.views:
        own = shared.Settings(
            data=settings.data, view=view, model=settings.model, epochs=settings.epochs, batch_size=settings.batch_size,
            warmup_epochs=min(1.0, settings.epochs),
        )  # fmt: skip
        dataset = shared.load_view(own, settings.seed)
        [(plain, numbers)] = shared.parse_methods("ce").values()
        recipe = shared.make_recipe(own, dataset, plain)
        state = fit(recipe, dataset, shared.make_numbers(own, numbers), settings.seed).state
        images = pixels(jnp.asarray(dataset.train_images))
        found = {
            typed: look(
                method(values), recipe.model, state.params, images, dataset.train_labels, num_classes=dataset.num_classes,
                stats=state.stats, batch_size=settings.batch_size, batches=settings.batches, replays=method.replays,
                seed=settings.seed,
            )
            for typed, (method, values) in methods.items()
        }  # fmt: skip
        panels["balanced" if view == "none" else view] = (dataset.class_counts, found)
    return panels
