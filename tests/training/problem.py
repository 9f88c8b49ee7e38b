"""A data set that is learnable in a few steps, and recipes for it: what the tests of training share."""

import functools

import numpy as np

from perturbjax.data import Dataset, check
from perturbjax.models import create
from perturbjax.training import Recipe

NUMBERS = {"method": (), "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@functools.cache
def dataset(size=6, classes=3, count=48):
    """Blurred class patterns: learnable in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    patterns = rng.uniform(0.2, 0.8, (classes, size, size, 3))
    images = np.clip(patterns[labels] + rng.normal(0, 0.1, (count, size, size, 3)), 0, 1)
    images = (255 * images).astype(np.uint8)
    return check(Dataset("patterns", images, labels, images[::2].copy() // 2 * 2 + 1, labels[::2]))


def plain(numbers):
    return ()


def recipe(build=plain, *, model="mlp", batch_size=16, epochs=2, **options):
    d = dataset()
    mean, std = d.channel_stats()
    width = 8 if model == "mlp" else 2
    net = create(model, num_classes=3, mean=mean, std=std, width=width)
    return Recipe(net, build, 3, len(d.train_labels), batch_size=batch_size, epochs=epochs, **options)
