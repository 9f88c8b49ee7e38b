r"""A bidirectional LSTM with attention over the words.

    i, f, o = σ(z), g = tanh(z)  of  z_t = W x_t + U h_{t−1} + b,     c_t = f c_{t−1} + i g,   h_t = o tanh(c_t)     both ways
    α = softmax_t(⟨v, tanh(A [h→_t, h←_t])⟩),     features = Σ_t α_t [h→_t, h←_t]

x is the embedding after dropout (0.5 in the taxonomy paper's protocol, with 100 units each way). Padding takes no part: states pass
over it unchanged, so that the way back begins at the last word, and its α is zero.
The paper says "BiLSTM with attention" only; the attention is that of Yang et al. without bias.
Sources: Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., 2000. Yang et al., "Hierarchical Attention Networks for
Document Classification", NAACL 2016.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from perturbjax.classes import at_least_float32
from perturbjax.models.text import Embedding, TextNet, masked_softmax


class BiLSTM(TextNet, kw_only=True):
    """width: units each way. dropout: of the embedding. unroll: steps of the recurrence that are compiled in a row: on CPUs 1 is
    as fast as any and compiles soonest."""

    embedding: int = 300
    width: int = 100
    dropout: float = 0.5
    unroll: int = 1

    def layers(self, train):
        return {
            "embedding": partial(Embedding, self.vocabulary_size, self.embedding, 0.1, self.dtype),
            "stage1": partial(BothWays, self.width, self.dropout, self.unroll, self.dtype, train),
            "features": AttentionPooling,
        }


class BothWays(nn.Module):
    """[B, L, d] -> [B, L, 2·width], the states of the two ways side by side."""

    width: int
    dropout: float
    unroll: int
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        size, width = x.shape[-1], self.width
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-(width**-0.5), maxval=width**-0.5)
        kernel = self.param("kernel", uniform, (size, 2, 4 * width)).astype(self.dtype)
        recurrent = self.param("recurrent", uniform, (2, width, 4 * width)).astype(self.dtype)
        bias = self.param("bias", _forget_nothing, (2, 4 * width))
        x = nn.Dropout(self.dropout, deterministic=not self.train, name="drop")(x).astype(self.dtype)
        # What does not wait for the step before is one product; the way back is the way there on the text turned round.
        batch, length = x.shape[:2]
        z = (x.transpose(1, 0, 2).reshape(-1, size) @ kernel.reshape(size, -1)).reshape(length, batch, 2, 4 * width)
        z = jnp.stack([z[:, :, 0], z[::-1, :, 1]], axis=1).astype(at_least_float32(self.dtype))
        on = jnp.ones([length, batch], bool) if mask is None else mask.T
        on = jnp.stack([on, on[::-1]], axis=1)[..., None]
        h = lstm(z + bias.astype(z.dtype)[None, :, None], on, recurrent, unroll=self.unroll)
        return jnp.concatenate([h[:, 0], h[::-1, 1]], axis=-1).transpose(1, 0, 2).astype(self.dtype)


def lstm(z: jax.Array, on: jax.Array, recurrent: jax.Array, *, unroll: int = 1) -> jax.Array:
    """The states h [L, R, B, h] of R recurrences at once, each from its inputs z = W x + b [L, R, B, 4h] (order i, f, g, o).

    on: [L, R, B, 1] bool, false where a state is passed on unchanged. recurrent: U [R, h, 4h], whose type the product is in.
    """
    num, batch, width = z.shape[1], z.shape[2], recurrent.shape[1]
    # σ(x) = (1 + tanh(x/2))/2: on CPUs XLA's tanh is several times as fast as its σ.
    half = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], z.dtype), width, total_repeat_length=4 * width)[None, None]

    def step(state, now):
        (c, h), (z, on) = state, now
        z = z + jnp.einsum("rbh,rhg->rbg", h.astype(recurrent.dtype), recurrent).astype(z.dtype)
        i, f, g, o = jnp.split(jnp.tanh(half * z), 4, axis=-1)
        new_c = (0.5 + 0.5 * f) * c + (0.5 + 0.5 * i) * g
        new_h = (0.5 + 0.5 * o) * jnp.tanh(new_c)
        c, h = jnp.where(on, new_c, c), jnp.where(on, new_h, h)
        return (c, h), h

    zero = jnp.zeros([num, batch, width], z.dtype)
    return lax.scan(step, (zero, zero), (z, on), unroll=unroll)[1]


def _forget_nothing(key, shape):
    """Zero, but one for the forget gates: what is in memory stays there at first."""
    del key
    width = shape[1] // 4
    return jnp.zeros(shape).at[:, width : 2 * width].set(1.0)


class AttentionPooling(nn.Module):
    """[B, L, d] -> [B, d], in at least float32: the mean over the words, weighted by attention."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x.astype(at_least_float32(x.dtype))
        size, xavier = x.shape[-1], nn.initializers.xavier_uniform()
        kernel, vector = self.param("kernel", xavier, (size, size)), self.param("vector", xavier, (size, 1))
        scores = jnp.tanh(x @ kernel.astype(x.dtype)) @ vector.astype(x.dtype)
        weights = masked_softmax(scores[..., 0], mask)
        return jnp.einsum("bl,bld->bd", weights, x)
