"""What the models of texts share: tokens, the mask of the places that hold one, and the embedding, which is their input site.

    input ─► embedding ─► … ─► features ─► logits          tokens [B, L] ─► vectors [B, L, d] ─► … ─► [B, d'] ─► [B, C]

Perturbations of the input act at `embedding`: tokens are whole numbers. Token 0 is padding. Where a slice starts after `input` the
tokens are not seen any more, so it is told which places count: model.apply(variables, hidden, start="stage1", **model.side_of(tokens)).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from perturbjax.classes import at_least_float32
from perturbjax.models.net import Net


class TextNet(Net, kw_only=True):
    """vocabulary_size: V, words with the padding. embedding: size of a word's vector. Tokens are not normalised: no mean, no std."""

    vocabulary_size: int
    embedding: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    longest = 2**31  # places of a text
    takes = ("mask",)  # of what `side_of` tells, the arguments of a slice

    def __post_init__(self):
        super().__post_init__()
        if self.vocabulary_size < 2 or self.embedding < 1:
            raise ValueError(
                f"{type(self).__name__} needs vocabulary_size >= 2 and embedding >= 1, got {self.vocabulary_size} and "
                f"{self.embedding}. Write vocabulary_size=len(dataset.tokenizer.words)."
            )

    @nn.compact
    def __call__(
        self,
        value: jax.Array,
        *,
        train: bool = False,
        start: str = "input",
        stop: str = "logits",
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The value at site `stop`, given the value at site `start`; only the modules between are touched.

        train: dropout draws from the rng "dropout". mask: [B, L] bool, the places that count (see `side_of`); None: those of the
        tokens that are no padding where they are given, or else all of them.
        """
        first, last = self._index(start), self._index(stop)
        if first > last:
            raise ValueError(
                f"{type(self).__name__} needs start before stop along {self.sites}, got start={start!r}, stop={stop!r}. "
                f"Write start={stop!r}, stop={start!r}."
            )
        if first == 0 and last > 0:
            self._check(value)
            mask = self.side_of(value)["mask"] if mask is None else mask
        layers = self.layers(train)
        for site in self.sites[first + 1 : last + 1]:
            value = layers[site](name=site)(value, mask) if site in layers else self._head(site, value)
        return value

    @staticmethod
    def side_of(tokens: jax.Array) -> Mapping[str, jax.Array]:
        """What slices after `input` need to know of the tokens [B, L]: {"mask": [B, L] bool}, false at the padding."""
        return {"mask": tokens != 0}

    def _check(self, tokens: jax.Array) -> None:
        kind = type(self).__name__
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2:
            raise ValueError(
                f"{kind} needs tokens [B, L] as integers, got {tokens.dtype} {tokens.shape}. "
                "Write dataset.tokenizer.rows(texts), or start='embedding' for vectors."
            )
        if tokens.shape[1] > self.longest:
            raise ValueError(
                f"{kind} needs texts of at most {self.longest} tokens, got {tokens.shape[1]}. Load them with text_length={self.longest}."
            )


class Embedding(nn.Module):
    """The words' vectors [B, L, d], in at least float32; zero at the padding."""

    vocabulary_size: int
    size: int
    std: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.normal(self.std), (self.vocabulary_size, self.size))
        return masked(table[tokens].astype(at_least_float32(self.dtype)), mask)


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, L, d], zero where the mask [B, L] is false."""
    return x if mask is None else jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax over the last axis, of the places where `mask` (of the same rank) is true; of all, where none is."""
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.asarray(-1e30, scores.dtype))
    return jax.nn.softmax(scores, axis=-1)


def with_vectors(params: Mapping[str, Any], vectors: jax.Array, found: jax.Array) -> dict[str, Any]:
    """The parameters of a model with these vectors [V, d] for the words that are `found` [V]; the others keep their random ones,
    scaled to the size that found vectors have on average, so that no word stands out. See `perturbjax.data.text.read_vectors`."""
    table = params["embedding"]["embedding"]
    if vectors.shape != table.shape:
        raise ValueError(
            f"with_vectors needs vectors of shape {table.shape}, the model's words and their size, got {vectors.shape}. "
            f"Create the model with vocabulary_size={vectors.shape[0]}, embedding={vectors.shape[1]}."
        )
    vectors, found = jnp.asarray(vectors, table.dtype), jnp.asarray(found)[:, None]
    count = jnp.maximum(found.sum() * table.shape[1], 1).astype(table.dtype)
    size = jnp.sqrt(jnp.square(vectors * found.astype(table.dtype)).sum() / count)
    random = table * (size / jnp.maximum(table.std(), 1e-12))
    return {**params, "embedding": {**params["embedding"], "embedding": jnp.where(found, vectors, random)}}
