r"""Residual networks for large images, and their public weights.

    stem     max over 3x3 at every second pixel of relu(norm(conv7x7(x) at every second pixel))
    block    y = relu(norm(conv1x1(drop(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))))) + S x)
    logits   a linear layer on the mean over pixels

A block's last convolution has four times the channels of the others; its 3x3 one has the stride; S x = x, or norm(conv1x1(x)) where the
shape changes. Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; the place of the stride
and the names of the weights as in torchvision.
"""

import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.models.blocks import ConvNet, Ops, Stage
from perturbjax.models.net import Features
from perturbjax.models.safetensors import read_safetensors

EXPANSION = 4


class ImageNetResNet(ConvNet, kw_only=True):
    """blocks: of each stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101. Stage i has 4 · width · 2ⁱ⁻¹ channels."""

    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    smallest, fan = 4, "fan_out"

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(
                f"ImageNetResNet needs blocks, one number >= 1 for each stage, got {self.blocks}. Write blocks=(3, 4, 6, 3)."
            )

    def layers(self, train):
        ops, block = self.ops(train), self.block(Bottleneck)
        stages = {
            f"stage{i + 1}": partial(Stage, block, number, self.width * 2**i, 1 + (i > 0), ops)
            for i, number in enumerate(self.blocks)
        }
        return {"stem": partial(self.block(PooledStem), self.width, ops)} | stages | {"features": Features}


class PooledStem(nn.Module):
    """A quarter of the image's edge: a 7x7 convolution with stride 2, then the maximum over 3x3 with stride 2."""

    features: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.ops.norm("norm", self.ops.conv("conv", x, self.features, 2, size=7)))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Bottleneck(nn.Module):
    """features: of the first two convolutions."""

    features: int
    stride: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops, wide = self.ops, EXPANSION * self.features
        y = nn.relu(ops.norm("norm1", ops.conv("conv1", x, self.features, size=1)))
        y = nn.relu(ops.norm("norm2", ops.conv("conv2", y, self.features, self.stride)))
        y = ops.norm("norm3", ops.conv("conv3", ops.drop("drop", y), wide, size=1))
        if x.shape[-1] != wide or self.stride != 1:
            x = ops.norm("shortcut_norm", ops.conv("shortcut", x, wide, self.stride, size=1))
        return nn.relu(y + x)


def resnet_fields(file: str | pathlib.Path) -> dict[str, Any]:
    """The fields `width` and `blocks` of the `ImageNetResNet` that these weights belong to."""
    weights = _weights(file, "resnet_fields")
    stages = {int(name.split(".")[0].removeprefix("layer")) for name in weights if name.startswith("layer")}
    number = lambda i: len({name.split(".")[1] for name in weights if name.startswith(f"layer{i}.")})
    return dict(width=len(weights["conv1.weight"]), blocks=tuple(number(i) for i in sorted(stages)))


def load_resnet(file: str | pathlib.Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of an `ImageNetResNet` with the weights and running statistics of a .safetensors file (or of model.safetensors in
    a folder) in their places.

    The file's classifier is taken if it has the model's shape; otherwise the head stays as it is in `variables`. The weights expect
    the pixels' normalisation that they were trained with, usually mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225).

    Raises:
      ValueError: weights of another kind of net, one that is missing or has another shape, another number of blocks, or one that
        this net has no place for (those of an SE-ResNet).
    """
    weights, params, stats = _weights(file, "load_resnet"), variables["params"], variables["batch_stats"]
    ours = tuple(len(params[site]) for site in sorted(params) if site.startswith("stage"))
    if (blocks := resnet_fields(file)["blocks"]) != ours:
        raise ValueError(
            f"load_resnet needs weights with {ours} blocks, got {blocks} in {str(file)!r}. Create the model with blocks={blocks}."
        )
    taken: set[str] = set()

    def take(name: str, like: jax.Array) -> jax.Array:
        taken.add(name)
        found = np.asarray(weights[_required(weights, name, file, "load_resnet")])
        found = found.transpose(2, 3, 1, 0) if found.ndim == 4 else found.T
        if found.shape != like.shape:
            images = f" for images of {found.shape[-2]} channels" if name == "conv1.weight" else ""
            raise ValueError(
                f"load_resnet needs {name} of shape {like.shape}, got {found.shape} in {str(file)!r}. "
                f"Create the model{images} with **resnet_fields({str(file)!r})."
            )
        return jnp.asarray(found.astype(like.dtype))

    def filled(names: Mapping[str, str], params: Mapping[str, Any], stats: Mapping[str, Any]) -> tuple[dict, dict]:
        """(params, stats) of a module. names: of its parts in the file."""
        new, running = {}, {}
        for part, at in params.items():
            name = names[part]
            if part in stats:
                new[part] = {"scale": take(f"{name}.weight", at["scale"]), "bias": take(f"{name}.bias", at["bias"])}
                running[part] = {key: take(f"{name}.running_{key}", like) for key, like in stats[part].items()}
            else:
                new[part] = {"kernel": take(f"{name}.weight", at["kernel"])}
        return new, running

    out, out_stats = dict(params), dict(stats)
    out["stem"], out_stats["stem"] = filled({"conv": "conv1", "norm": "bn1"}, params["stem"], stats["stem"])
    for site in (site for site in params if site.startswith("stage")):
        out[site], out_stats[site] = {}, {}
        for block in params[site]:
            at = f"layer{site.removeprefix('stage')}.{block.removeprefix('block')}."
            names = {ours: at + theirs for ours, theirs in BLOCK.items()}
            out[site][block], out_stats[site][block] = filled(names, params[site][block], stats[site][block])
    head, classifier = params["logits"], weights.get("fc.weight")
    if classifier is not None and "bias" in head and classifier.shape == head["kernel"].shape[::-1]:
        out["logits"] = {"kernel": take("fc.weight", head["kernel"]), "bias": take("fc.bias", head["bias"])}
    unused = lambda name: name.startswith("fc.") or name.endswith(".num_batches_tracked")
    if left := sorted(name for name in weights if name not in taken and not unused(name)):
        raise ValueError(
            f"load_resnet needs the weights of a plain ResNet, got {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} too "
            f"({len(left)} arrays without a place) in {str(file)!r}. Give those of a resnet50, 101 or 152."
        )
    return {**variables, "params": out, "batch_stats": out_stats}


BLOCK = {f"{ours}{i}": f"{theirs}{i}" for ours, theirs in (("conv", "conv"), ("norm", "bn")) for i in (1, 2, 3)}
BLOCK |= {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}


def _weights(file: str | pathlib.Path, function: str) -> dict[str, np.ndarray]:
    path = pathlib.Path(file).expanduser()
    found = read_safetensors(path / "model.safetensors" if path.is_dir() else path)
    for name in ("conv1.weight", "layer1.0.conv3.weight"):
        _required(found, name, file, function)
    return found


def _required(weights: Mapping[str, np.ndarray], name: str, file: str | pathlib.Path, function: str) -> str:
    if name not in weights:
        raise ValueError(
            f"{function} needs the weights of a ResNet of bottleneck blocks in torchvision's names, {name} among them, got "
            f"{', '.join(sorted(weights)[:3])}, ... ({len(weights)} arrays) in {str(file)!r}. Give those of a resnet50, 101 or 152."
        )
    return name
