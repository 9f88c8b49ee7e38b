"""The figure `activations` of figures.py: how far methods move each class's activations, on balanced and on long-tailed data."""

import dataclasses
import functools

from experiments.gradients import Gradients, class_panels
from perturbjax.analysis.activation_view import activation_variations
from perturbjax.analysis.gradient_view import gradient_plot


@dataclasses.dataclass(frozen=True)
class Activations(Gradients):
    """Relative variation of each class's activations under each method (LPA's Figure 1)."""

    methods: str = (
        "dropout(rate=0.3, site=last_stage), manifold_mixup(sites=[last_stage]), "
        "at(site=last_stage, norm=l2, step=unit, bound=0.14, step_size=0.09, num_steps=3, random_starts=false), "
        "lpa, lpa(bound=varied), lpa(split=frequency, bound=varied)"
    )
    """As for compare.py; a row each. LPA's default bound of 0.2 is one of 0.14 at the last stage."""
    site: str = "last_stage"
    """Where the activations are looked at, behind the methods' own links there."""
    out: str = "activations.svg"
    """File to write."""


def draw_activations(settings: Activations) -> str:
    """Trains a plain net per view and perturbs its activations by every method."""
    panels = class_panels(settings, functools.partial(activation_variations, site=settings.site))
    return gradient_plot(panels, what="activation", symbol="a")
