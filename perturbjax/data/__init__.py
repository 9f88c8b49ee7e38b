"""Data: names to arrays (`load`), seeded views of them (`VIEWS`), batches, and augmentation on the device."""

from perturbjax.data.augment import Augmentation, augment
from perturbjax.data.batches import balanced_order, epoch_order, evaluation_batches, replayed_order
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.duplicates import Copies, check_duplicates, find_copies, write_copies
from perturbjax.data.opacity import on_background
from perturbjax.data.sources import SOURCES, load
from perturbjax.data.text import Tokenizer, build_words, pack, read_pieces, read_vectors, unpack
from perturbjax.data.views import (
    VIEWS,
    Seed,
    View,
    apply_views,
    drop_duplicates,
    labels,
    leave_out,
    longtail,
    longtail_counts,
    noise,
    shrink,
    thin,
    validation,
)

__all__ = [
    "SOURCES",
    "VIEWS",
    "Augmentation",
    "Copies",
    "Dataset",
    "Seed",
    "Tokenizer",
    "View",
    "apply_views",
    "augment",
    "balanced_order",
    "build_words",
    "check",
    "check_duplicates",
    "drop_duplicates",
    "epoch_order",
    "evaluation_batches",
    "find_copies",
    "labels",
    "leave_out",
    "load",
    "longtail",
    "longtail_counts",
    "noise",
    "on_background",
    "pack",
    "read_pieces",
    "read_vectors",
    "replayed_order",
    "shrink",
    "thin",
    "unpack",
    "validation",
    "write_copies",
]
