"""Flax linen classifiers cut at named sites: any slice of the network runs alone.

    model = create("resnet20", num_classes=10, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    model.sites  # ("input", "stem", "stage1", "stage2", "stage3", "features", "logits")
    variables = model.init(key, images)
    hidden = model.apply(variables, images, stop="stage2")
    logits = model.apply(variables, hidden, start="stage2")  # bit for bit model.apply(variables, images)

| name | form | parameters (10 classes, 32x32x3) |
| --- | --- | --- |
| mlp | two hidden layers, 128 and 64 | 402 250 |
| cnn | three convolutions, 16 to 64 channels | 24 346 |
| resnet8 | the form of He et al. with one block per stage | 75 290 |
| resnet20 | He et al., CVPR 2016, section 4.2, option A | 269 722 |
| resnet32 | same | 464 154 |
| resnet44 | same | 658 586 |
| resnet56 | same | 853 018 |
| resnet110 | same | 1 727 962 |
| wrn16-8 | Zagoruyko and Komodakis, BMVC 2016 | 10 961 370 |
| wrn28-10 | same | 36 479 194 |
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from perturbjax.models.cnn import CNN
from perturbjax.models.mlp import MLP
from perturbjax.models.net import Net
from perturbjax.models.resnet import ResNet, WideResNet

_MODELS: dict[str, Callable[..., Net]] = {
    "mlp": MLP,
    "cnn": CNN,
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 20, 32, 44, 56, 110)},
    "wrn16-8": partial(WideResNet, depth=16, widen=8),
    "wrn28-10": partial(WideResNet, depth=28, widen=10),
}
NAMES = tuple(_MODELS)


def create(
    name: str,
    *,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int | None = None,
    dtype: Any = jnp.float32,
    head: str = "linear",
    dropout: float = 0.0,
    conv: str = "canonical",
    remat: bool = False,
    **options,
) -> Net:
    """The model of that name.

    Args:
      name: one of NAMES. num_classes: C. mean, std: of the pixels in [0, 1], one number per channel.
      width: channels of the first layer (default 16); for the mlp the size of the first hidden layer, the second has half of it.
      dtype: of the layers' arithmetic (parameters are float32). head: "linear" or "cosine". dropout: rate inside the stages.
      conv: "canonical", or "lax" for forward mode. remat: recompute each block in the backward pass, for memory; the mlp ignores
        both. options: the model's own fields (`hidden`, `num_stages`, ...).
    """
    if name not in _MODELS:
        nearest = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"create needs a model of {NAMES}, got {name!r}. Write create({nearest!r}, ...).")
    if name == "mlp":
        options = {"hidden": (width, width // 2)} | options if width else options
    else:
        options |= {"conv": conv, "remat": remat} | ({"width": width} if width else {})
    mean, std = (tuple(float(number) for number in numbers) for numbers in (mean, std))
    return _MODELS[name](num_classes=num_classes, mean=mean, std=std, dtype=dtype, head=head, dropout=dropout, **options)
