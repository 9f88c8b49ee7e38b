"""What all models share: the walk along the sites, the pixels' normalisation, the pooled features and the head.

    input ─► (stem) ─► stage1 ─► … ─► stageN ─► features ─► logits

A site names a value of the forward pass; the module that leads to it has the same name, so that `params["stage2"]` holds what lies
between `stage1` and `stage2`. Every slice of the line runs alone, and slice after slice is the whole pass: bit for bit on a CPU, but for
where XLA fuses across a site under jit (pre-activation blocks from JAX 0.12 on), which rounds the last bit otherwise.
"""

import abc
import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from perturbjax.classes import at_least_float32


class Net(nn.Module, abc.ABC, kw_only=True):
    """A classifier cut at named sites; each family of models says which layers lead from site to site.

    num_classes: C. mean, std: per channel. The input site is pixels in [0, 1], [B, H, W, channels]; they are normalised after it.
    head: "linear", or "cosine": scale · ⟨f/‖f‖, w_c/‖w_c‖⟩, without bias.
    abstain: one more output, for abstention (`pj.dac`): a site "outputs", [B, C + 1], before the logits, which are its first C.
    dropout: rate inside the stages. dtype: of the layers' arithmetic; parameters are float32, features and logits at least float32.
    frozen: parameters that are not trained, by prefixes of their paths from the root, ("stem", "stage1/block0", "logits/bias"); a module
    below such a prefix is frozen as a whole, so that its BatchNorm runs on its running statistics and leaves them. Dropout and the like
    stay. The net only says so: `pj.objective` gives them no gradient, the trainer keeps its optimiser away (perturbjax/frozen.py).
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str = "linear"
    scale: float = 30.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    abstain: bool = False
    frozen: tuple[str, ...] = ()

    smallest = 1  # pixels along an edge

    def __post_init__(self):
        super().__post_init__()
        kind = type(self).__name__
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"{kind} needs one mean and one std per channel, got mean={self.mean} and std={self.std}. "
                "For grey images write mean=(0.5,), std=(0.5,)."
            )
        if self.head not in ("linear", "cosine"):
            raise ValueError(f'{kind} needs head="linear" or head="cosine", got {self.head!r}. Write head="linear".')
        if not isinstance(self.frozen, tuple):
            got = (self.frozen,) if isinstance(self.frozen, str) else tuple(self.frozen)
            raise ValueError(f"{kind} needs a tuple of prefixes for frozen, got {self.frozen!r}. Write frozen={got!r}.")

    @abc.abstractmethod
    def layers(self, train: bool) -> dict[str, Callable[..., nn.Module]]:
        """{site: the module that leads there, still without its name}, in order, from the first layer to `features`."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The names along the forward pass, in order."""
        return ("input", *self.layers(train=False), *(("outputs",) if self.abstain else ()), "logits")

    @nn.compact
    def __call__(self, value: jax.Array, *, train: bool = False, start: str = "input", stop: str = "logits") -> jax.Array:
        """The value at site `stop`, given the value at site `start`; only the modules between are touched.

        train: BatchNorm takes the batch's statistics and updates `batch_stats`, dropout draws from the rng "dropout". A slice returns
        the *whole* collection `batch_stats` with its own part updated: give it to the next slice.
        """
        first, last = self._index(start), self._index(stop)
        if first > last:
            raise ValueError(
                f"{type(self).__name__} needs start before stop along {self.sites}, got start={start!r}, stop={stop!r}. "
                f"Write start={stop!r}, stop={start!r}."
            )
        if first == 0 and last > 0:
            value = self._normalised(value)
        layers = self.layers(train)
        for site in self.sites[first + 1 : last + 1]:
            value = layers[site](name=site)(value) if site in layers else self._head(site, value)
        return value

    def _head(self, site: str, value: jax.Array) -> jax.Array:
        """The logits from the features; with `abstain` both, and the logits from both. The classes' part is the same net either way."""
        if site == "logits" and self.abstain:
            return value[:, : self.num_classes]
        logits = Head(self.num_classes, self.head, self.scale, name="logits")(value)
        if site == "logits":
            return logits
        return jnp.concatenate([logits, Head(1, self.head, self.scale, name="abstention")(value)], axis=1)

    def head_of(self, params) -> tuple[jax.Array, jax.Array]:
        """(W [C, d], b [C]) with logits = features @ W.T + b, from the collection "params"; needs no bound module."""
        if self.head != "linear":
            raise ValueError(
                f"head_of needs the linear head, W and b, got head={self.head!r}, which has no bias and normalises its rows. "
                'Create the model with head="linear".'
            )
        return params["logits"]["kernel"].T, params["logits"]["bias"]

    def _index(self, site: str) -> int:
        if site not in self.sites:
            nearest = difflib.get_close_matches(str(site), self.sites, n=1, cutoff=0.0)[0]
            raise ValueError(f"{type(self).__name__} needs a site of {self.sites}, got {site!r}. Write {nearest!r}.")
        return self.sites.index(site)

    def _normalised(self, pixels: jax.Array) -> jax.Array:
        kind, channels = type(self).__name__, len(self.mean)
        wanted = f"{kind} needs pixels [B, H, W, {channels}], H and W at least {self.smallest}, got {pixels.shape}."
        if pixels.ndim != 4:
            raise ValueError(
                f"{wanted} Write pixels[None] for a single image, pixels[..., None] for grey images without channels."
            )
        if pixels.shape[-1] != channels:
            raise ValueError(f"{wanted} Create the model with {pixels.shape[-1]} numbers in mean and in std.")
        if min(pixels.shape[1:3]) < self.smallest:
            raise ValueError(f'{wanted} Write create("mlp", ...), which takes images of any size.')
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(f"{kind} needs floating-point pixels in [0, 1], got {pixels.dtype}. Write pixels / 255.")
        pixels = pixels.astype(at_least_float32(pixels.dtype))
        mean, std = (jnp.array(numbers, pixels.dtype).reshape(1, 1, 1, -1) for numbers in (self.mean, self.std))
        return (pixels - mean) / std


class Features(nn.Module):
    """[B, ..., d] -> [B, d]: the mean over pixels; for a vector the identity."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return pooled(x)


class Head(nn.Module):
    """Logits [B, C] from features [B, d]."""

    num_classes: int
    kind: str
    scale: float

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        features = features.astype(at_least_float32(features.dtype))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (features.shape[-1], self.num_classes))
        kernel = kernel.astype(features.dtype)
        if self.kind == "cosine":
            return self.scale * (unit(features, axis=1) @ unit(kernel, axis=0))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return features @ kernel + bias.astype(features.dtype)[None]


def pooled(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first and the last, in at least float32."""
    x = x.astype(at_least_float32(x.dtype)).reshape(x.shape[0], -1, x.shape[-1])
    # A product, since XLA fuses a sum with what comes before and adds in another order then: slices would differ in the last bit.
    return jnp.einsum("bpd,p->bd", x, jnp.full(x.shape[1], 1 / x.shape[1], x.dtype), precision="highest")


def unit(x: jax.Array, axis: int) -> jax.Array:
    """x / ‖x‖ along the axis; zero stays zero, with gradient zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-12))
