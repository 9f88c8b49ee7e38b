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
| la_net | the "ResNet-32" of the logit adjustment and LPL codes for the long tail: narrow bottlenecks on 36x36 pixels | 300 762 |
| se_resnet20 | squeeze-and-excitation (Hu et al., CVPR 2018), option B: the form of ISDA's experiments | 274 490 |
| se_resnet110 | same | 1 742 810 |
| wrn16-8 | Zagoruyko and Komodakis, BMVC 2016 | 10 961 370 |
| wrn28-10 | same | 36 479 194 |
| shake26 | Gastaldi, 2017: ResNet-26 2x32d, Shake-Shake | 2 923 162 |
| resnet50 | He et al., table 1, for ImageNet's sizes; `load_resnet` fills in public weights | 23 528 522 |
| resnet101 | same | 42 520 650 |

resnet8 to 110, la_net, se_resnet* and wrn* take `stochastic_depth=0.5` or `shakedrop=0.5`, the rate of the last block; shake26 takes
`shake=False`. resnet8 to 110 take `shortcut="B"`, 1x1 convolutions where option A has zero channels (resnet32: 466 906 parameters).
All take `frozen=("stem", "stage1")`, the parts that are not trained; those with BatchNorm `frozen_batchnorm=True`.

Models of texts take tokens [B, L]; perturbations of the input act at their site `embedding`:

    model = create("bilstm", num_classes=2, vocabulary_size=len(dataset.tokenizer.words))
    model.sites  # ("input", "embedding", "stage1", "features", "logits")

| name | form | parameters (2 classes, 25,000 words; bert-base: its own 30,522) |
| --- | --- | --- |
| bilstm | 300 numbers a word, an LSTM of 100 units each way, attention | 7 861 402 |
| bert-base | Devlin et al., NAACL 2019; `load_bert` fills in public weights | 109 483 778 |
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from perturbjax.models.bert import Bert, bert_fields, load_bert
from perturbjax.models.bilstm import BiLSTM
from perturbjax.models.cnn import CNN
from perturbjax.models.imagenet import ImageNetResNet, load_resnet, resnet_fields
from perturbjax.models.mlp import MLP
from perturbjax.models.net import Net
from perturbjax.models.resnet import LANet, ResNet, SEResNet, ShakeResNet, WideResNet
from perturbjax.models.safetensors import read_safetensors
from perturbjax.models.text import TextNet, with_vectors

_MODELS: dict[str, Callable[..., Net]] = {
    "mlp": MLP,
    "cnn": CNN,
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 20, 32, 44, 56, 110)},
    "la_net": LANet,
    **{f"se_resnet{depth}": partial(SEResNet, depth=depth) for depth in (20, 110)},
    "wrn16-8": partial(WideResNet, depth=16, widen=8),
    "wrn28-10": partial(WideResNet, depth=28, widen=10),
    "shake26": partial(ShakeResNet, depth=26, widen=2),
    "resnet50": partial(ImageNetResNet, blocks=(3, 4, 6, 3)),
    "resnet101": partial(ImageNetResNet, blocks=(3, 4, 23, 3)),
}
NAMES = tuple(_MODELS)
"""Of the models of images."""
_TEXT_MODELS: dict[str, Callable[..., TextNet]] = {"bilstm": BiLSTM, "bert-base": Bert}
TEXT_NAMES = tuple(_TEXT_MODELS)
"""Of the models of texts."""


def create(
    name: str,
    *,
    num_classes: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    vocabulary_size: int | None = None,
    width: int | None = None,
    dtype: Any = jnp.float32,
    head: str = "linear",
    dropout: float | None = None,
    conv: str = "canonical",
    remat: bool = False,
    **options,
) -> Net:
    """The model of that name.

    Args:
      name: one of NAMES or TEXT_NAMES. num_classes: C.
      mean, std: of images: of the pixels in [0, 1], one number per channel. vocabulary_size: of texts: words, with the padding.
      width: channels of the first layer (default 16; resnet50, resnet101: 64); for the mlp the size of the first hidden layer, the
        second has half of it; for the bilstm units each way (100); of bert-base the size of all states (768).
      dtype: of the layers' arithmetic (parameters are float32). head: "linear" or "cosine". dropout: rate inside the stages, the
        bilstm's embedding; None: the model's own (images 0, bilstm 0.5, bert-base 0.1).
      conv: "canonical", or "lax" for forward mode. remat: recompute each block in the backward pass, for memory; mlp and bilstm ignore
        it. options: the model's own fields (`hidden`, `num_stages`, `stochastic_depth`, ...).
    """
    known = NAMES + TEXT_NAMES
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"create needs a model of {known}, got {name!r}. Write create({nearest!r}, ...).")
    options |= {} if dropout is None else {"dropout": dropout}
    if name in TEXT_NAMES:
        if vocabulary_size is None or mean is not None or std is not None:
            got = "none" if vocabulary_size is None else "mean and std beside it"
            raise ValueError(
                f"create needs vocabulary_size for {name!r}, a model of texts, got {got}. For images write create('mlp', ...)."
            )
        of_bert = ({"remat": remat} | ({"embedding": width} if width else {})) if name == "bert-base" else {}
        of_lstm = {"width": width} if width and name == "bilstm" else {}
        options = of_bert | of_lstm | options
        return _TEXT_MODELS[name](num_classes=num_classes, vocabulary_size=vocabulary_size, dtype=dtype, head=head, **options)
    if vocabulary_size is not None or mean is None or std is None:
        got = "vocabulary_size" if vocabulary_size is not None else "none"
        raise ValueError(
            f"create needs mean and std for {name!r}, a model of images, got {got}. For texts write create('bilstm', ...)."
        )
    if name == "mlp":
        options = {"hidden": (width, width // 2)} | options if width else options
    else:
        options |= {"conv": conv, "remat": remat} | ({"width": width} if width else {})
    mean, std = (tuple(float(number) for number in numbers) for numbers in (mean, std))
    return _MODELS[name](num_classes=num_classes, mean=mean, std=std, dtype=dtype, head=head, **options)
