"""Data: names to arrays (`load`), seeded views of them (`VIEWS`), batches, and augmentation on the device."""

from perturbjax.data.batches import augment, epoch_order, evaluation_batches
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.sources import SOURCES, load
from perturbjax.data.views import VIEWS, Seed, View, apply_views, longtail, longtail_counts, noise, shrink, thin, validation

__all__ = [
    "SOURCES",
    "VIEWS",
    "Dataset",
    "Seed",
    "View",
    "apply_views",
    "augment",
    "check",
    "epoch_order",
    "evaluation_batches",
    "load",
    "longtail",
    "longtail_counts",
    "noise",
    "shrink",
    "thin",
    "validation",
]
