"""perturbjax.training.recipes: the two long-tail protocols number by number, scaled to shorter runs, ready for the objects they feed."""

import numpy as np
import pytest

from perturbjax.data import Augmentation
from perturbjax.models import create
from perturbjax.training.recipes import RECIPES, recipe_flags
from perturbjax.training.schedule import Schedule

pytestmark = pytest.mark.optax_promotes  # schedules

AUGMENTATION = ("pad", "flip", "cutout", "randaugment", "magnitude")
FLAGS = {
    "epochs", "batch_size", "learning_rate", "momentum", "nesterov", "weight_decay", "schedule", "warmup_epochs", "milestones",
    "decay", "head", *AUGMENTATION,
}  # fmt: skip


def schedule_of(flags):
    return Schedule(flags["schedule"], flags["warmup_epochs"], flags["milestones"], flags["decay"])


def test_ldam_is_the_official_code():
    assert recipe_flags("ldam") == dict(
        epochs=200, batch_size=128, learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=2e-4, schedule="step",
        warmup_epochs=5, milestones=(160, 180), decay=(0.01, 0.0001), head="linear", pad=4, flip=True, cutout=0, randaugment=0,
        magnitude=9.0,
    )  # fmt: skip


def test_strong_is_the_documented_choice():
    assert recipe_flags("strong") == dict(
        epochs=400, batch_size=128, learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4, schedule="cosine",
        warmup_epochs=5, milestones=(), decay=0.1, head="cosine", pad=4, flip=True, cutout=16, randaugment=2, magnitude=9.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_sets_the_same_flags(name):
    for flags in (RECIPES[name](), RECIPES[name](20), RECIPES[name](20, size=8)):
        assert set(flags) == FLAGS


@pytest.mark.parametrize("epochs", [1, 7, 20, 200, 1000])
@pytest.mark.parametrize("name", RECIPES)
def test_runs_of_any_length_have_the_same_course(name, epochs):
    usual, other = RECIPES[name](), RECIPES[name](epochs)
    assert other["epochs"] == epochs
    steps = 400  # the same number of steps in both: the same curve
    whole, short = (
        schedule_of(flags).factor(steps / flags["epochs"], steps) for flags in (usual, other)
    )  # steps per epoch may be a fraction here
    np.testing.assert_allclose([whole(t) for t in range(0, steps, 13)], [short(t) for t in range(0, steps, 13)], rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_flags_fit_the_objects_they_are_for(name):
    for size in (8, 16, 32):
        flags = recipe_flags(name, 20, size=size)
        schedule_of(flags).factor(5, 100)
        augmentation = Augmentation(**{key: flags[key] for key in AUGMENTATION})
        assert augmentation.pad == size // 8 and augmentation.cutout == (size // 2 if name == "strong" else 0)
        create("resnet32", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3, head=flags["head"])


def test_errors_say_what_was_given_and_what_to_write():
    with pytest.raises(ValueError, match="got 'lda'. Did you mean 'ldam'"):
        recipe_flags("lda")
    for name in RECIPES:
        with pytest.raises(ValueError, match=f"{name} needs epochs >= 1, got 0"):
            recipe_flags(name, 0)
