"""A multi-layer perceptron: each hidden layer is a stage."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from perturbjax.models.net import Features, Net

HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class MLP(Net, kw_only=True):
    """hidden: sizes of the hidden layers. The features are the last hidden activation."""

    hidden: tuple[int, ...] = (128, 64)

    def __post_init__(self):
        super().__post_init__()
        if not self.hidden:
            raise ValueError(f"MLP needs at least one hidden layer, got hidden={self.hidden}. Write hidden=(64,).")

    def layers(self, train):
        layer = lambda size: partial(Hidden, size, self.dropout, self.dtype, train)
        return {f"stage{i}": layer(size) for i, size in enumerate(self.hidden, start=1)} | {"features": Features}


class Hidden(nn.Module):
    """relu(W x + b) of the flattened input, with dropout."""

    size: int
    dropout: float
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.size, dtype=self.dtype, kernel_init=HE, name="dense")(x.reshape(x.shape[0], -1))
        return nn.Dropout(self.dropout, deterministic=not self.train, name="drop")(nn.relu(x))
