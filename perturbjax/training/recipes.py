"""The training protocols of the long-tail literature by name, as flags of the experiment scripts.

A recipe is everything but data, model and method. The same loss differs by several points between the two, so they are never mixed
in one column.

| | ldam | strong |
| --- | --- | --- |
| epochs, batch | 200, 128 | 400, 128 |
| learning rate | 0.1, ×0.01 after epoch 160, ×0.0001 after 180 | 0.1, cosine to zero |
| warm-up | linear, 5 epochs | linear, 5 epochs |
| momentum, weight decay | 0.9, 2e-4 | 0.9, 5e-4 |
| images | zero-pad 4 and crop, flip | the same, RandAugment (N = 2, M = 9), Cutout 16 |
| classifier | linear | cosine |

`ldam` is the official code of LDAM-DRW (Cao et al., NeurIPS 2019), whose margin loss alone takes a cosine classifier there:
`head="cosine"` beside it. Its warm-up rises once an epoch, ours at every step.
`strong` is no single paper's: it is what the recent papers' code shares, and our choice where they differ. PaCo (Cui et al., ICCV
2021) and NCL (Li et al., CVPR 2022) train ResNet-32 for 400 epochs on padded crops, flips, AutoAugment's CIFAR-10 policy and Cutout
16 (black; ours is grey): learning rates 0.05 and 0.1, weight decays 5e-4 and 2e-4, without and with Nesterov, warm-up of 10 and 5
epochs, ÷10 at 320 and 360. BCL (Zhu et al., CVPR 2022; its ImageNet-LT code) has RandAugment with N = 2, the cosine schedule and the
normalised classifier, with 0.1, 5e-4 and no Nesterov. M = 9 is the usual setting. No Nesterov, as in two of the three: then both
recipes share their optimiser.
"""

from collections.abc import Callable
from typing import Any

from perturbjax.checks import check_choice, check_number


def ldam(epochs: int | None = None, *, size: int = 32) -> dict[str, Any]:
    """LDAM-DRW's recipe as flags; another number of epochs scales warm-up and milestones, another image size the crop."""
    scale = _scale("ldam", epochs, 200)
    return _SHARED | {
        "epochs": epochs or 200,
        "weight_decay": 2e-4,
        "schedule": "step",
        "warmup_epochs": 5 * scale,
        "milestones": (160 * scale, 180 * scale),
        "decay": (1e-2, 1e-4),
        "pad": _of_edge(size, 8),
    }


def strong(epochs: int | None = None, *, size: int = 32) -> dict[str, Any]:
    """The recent papers' recipe as flags; another number of epochs scales the warm-up, another image size crop and Cutout."""
    return _SHARED | {
        "epochs": epochs or 400,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup_epochs": 5 * _scale("strong", epochs, 400),
        "head": "cosine",
        "pad": _of_edge(size, 8),
        "cutout": _of_edge(size, 2),
        "randaugment": 2,
    }


RECIPES: dict[str, Callable[..., dict[str, Any]]] = {"ldam": ldam, "strong": strong}
"""Name -> function (epochs or None, *, size=32) -> flags; every recipe sets the same flags."""


def recipe_flags(name: str, epochs: int | None = None, *, size: int = 32) -> dict[str, Any]:
    """The flags of the recipe of that name.

    >>> recipe_flags("ldam", 20)["milestones"]
    (16.0, 18.0)
    """
    check_choice("recipe_flags", "name", name, RECIPES)
    return RECIPES[name](epochs, size=size)


_SHARED: dict[str, Any] = {
    "batch_size": 128, "learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "milestones": (), "decay": 0.1,
    "head": "linear", "flip": True, "cutout": 0, "randaugment": 0, "magnitude": 9.0,
}  # fmt: skip


def _scale(name, epochs, usual):
    if epochs is None:
        return 1.0
    check_number(name, low=1, epochs=epochs)
    return epochs / usual


def _of_edge(size, part):
    return max(1, size // part)
