r"""BERT, and its public weights.

    stem     s_0 = norm(e + position + type_0)                          e: the word pieces' vectors, the site `embedding`
    stage l  a = norm(s + O · concat_k softmax(q_k k_kᵀ/√d_k) v_k),   s' = norm(a + W₂ gelu(W₁ a))
    features tanh(P s_N[0]), the state at [CLS];   logits: a linear layer on it, after dropout as everywhere in between

Keys at the padding get no weight. norm is layer normalisation with ε = 1e-12, gelu the exact one.
Source: Devlin et al., "BERT", NAACL 2019; names of the weights as in bert-base-uncased's model.safetensors.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.classes import at_least_float32
from perturbjax.models.safetensors import read_safetensors
from perturbjax.models.text import Embedding, TextNet, masked_softmax

NORMAL = nn.initializers.normal(0.02)


class Bert(TextNet, kw_only=True):
    """embedding: size of all states. inner: of the layers' hidden one. positions: places of the longest text. remat: keep only what
    goes from layer to layer for the backward pass, and compute the inside of each layer once more there."""

    embedding: int = 768
    num_layers: int = 12
    num_heads: int = 12
    inner: int = 3072
    positions: int = 512
    dropout: float = 0.1
    remat: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_layers < 1 or self.num_heads < 1 or self.embedding % self.num_heads:
            raise ValueError(
                f"Bert needs num_layers >= 1 and a num_heads that divides embedding={self.embedding}, got {self.num_layers} and "
                f"{self.num_heads}. Write num_heads={max(1, self.embedding // 64)}."
            )

    @property
    def longest(self):
        return self.positions

    def layers(self, train):
        ops = Ops(self.embedding, self.num_heads, self.inner, self.dropout, self.dtype, train)
        kind = _recomputed(Layer) if self.remat else Layer
        stages = {f"stage{n}": partial(kind, ops) for n in range(1, self.num_layers + 1)}
        embedding = partial(Embedding, self.vocabulary_size, self.embedding, 0.02, self.dtype)
        return {"embedding": embedding, "stem": partial(Stem, self.positions, ops), **stages, "features": partial(Pooler, ops)}


_recomputed = functools.cache(nn.remat)  # one class, however often the layers are listed


class Ops(NamedTuple):
    """What the layers share: sizes, and the operations that they are made of; each names the submodule it makes."""

    size: int
    num_heads: int
    inner: int
    dropout: float
    dtype: Any
    train: bool

    def dense(self, name: str, x: jax.Array, features: int | None = None) -> jax.Array:
        return nn.Dense(features or self.size, dtype=self.dtype, kernel_init=NORMAL, name=name)(x.astype(self.dtype))

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return Norm(name=name)(x.astype(at_least_float32(self.dtype))).astype(self.dtype)

    def drop(self, name: str, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=not self.train, name=name)(x)


class Norm(nn.Module):
    """Layer normalisation, (x − mean)/√(variance + 1e-12) · scale + bias over the last axis."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(x.dtype)
        # Flax's takes E[x²] − E[x]² for the variance, which loses digits where the mean is large.
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-12)
        wide = (1,) * (x.ndim - 1) + (-1,)
        return scaled * scale.reshape(wide) + bias.reshape(wide)


class Stem(nn.Module):
    """norm(e + position + type)."""

    positions: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        size = x.shape[-1]
        position = self.param("position", NORMAL, (self.positions, size)).astype(x.dtype)
        kind = self.param("type", NORMAL, (2, size)).astype(x.dtype)
        return self.ops.drop("drop", self.ops.norm("norm", x + position[None, : x.shape[1]] + kind[None, :1]))


class Layer(nn.Module):
    """Attention and two dense layers, both with a shortcut and a norm after it."""

    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        ops, wide = self.ops, at_least_float32(self.ops.dtype)
        x = x.astype(ops.dtype)  # a slice may start from a value of another type
        heads = lambda name: ops.dense(name, x).reshape(*x.shape[:2], ops.num_heads, -1)
        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(wide) / np.sqrt(query.shape[-1]).astype(wide)
        weights = ops.drop("drop_weights", masked_softmax(scores, None if mask is None else mask[:, None, None]))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(ops.dtype), value).reshape(x.shape)
        x = ops.norm("norm", x + ops.drop("drop", ops.dense("out", mixed)))
        inner = jax.nn.gelu(ops.dense("inner", x, ops.inner), approximate=False)
        return ops.norm("norm_inner", x + ops.drop("drop_inner", ops.dense("out_inner", inner)))


class Pooler(nn.Module):
    """[B, L, d] -> [B, d], in at least float32: tanh of a dense layer on the first state."""

    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        first = jnp.tanh(self.ops.dense("dense", x[:, 0]))
        return self.ops.drop("drop", first.astype(at_least_float32(first.dtype)))


def bert_fields(file: str | pathlib.Path, *, num_heads: int | None = None) -> dict[str, int]:
    """The fields of the `Bert` that these weights belong to. num_heads: not to be seen from them; None: as the config.json beside the
    file says, or else 64 units each, as usual."""
    weights = _weights(file)
    shape = lambda name: weights[_required(weights, name, file)].shape
    words, size = shape("embeddings.word_embeddings.weight")
    num_heads = num_heads or _configured(file).get("num_attention_heads") or max(1, size // 64)
    return dict(
        vocabulary_size=words, embedding=size, num_layers=_num_layers(weights), num_heads=num_heads,
        inner=shape("encoder.layer.0.intermediate.dense.weight")[0], positions=shape("embeddings.position_embeddings.weight")[0],
    )  # fmt: skip


def load_bert(file: str | pathlib.Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a `Bert` with the weights of a .safetensors file (or of model.safetensors in a folder) in their places.

    The file may hold more: heads for other tasks are left out. Its own classifier is taken if it has the model's shape; otherwise
    the head stays as it is in `params`. ValueError if a weight is missing or has another shape, or if its embeddings or its encoder
    hold one that a BERT has not (adapters, relative positions).
    """
    weights, taken = _weights(file), set[str]()

    def take(name: str, like: jax.Array, turned: bool = False) -> jax.Array:
        taken.add(name)
        found = np.asarray(weights[_required(weights, name, file)])
        found = found.T if turned else found
        if name.endswith("position_embeddings.weight") and len(found) > len(like):
            found = found[: len(like)]
        if found.shape != like.shape:
            raise ValueError(
                f"load_bert needs {name} of shape {like.shape}, got {found.shape} in {str(file)!r}. Create the model with "
                f"**bert_fields({str(file)!r})."
            )
        return jnp.asarray(found.astype(like.dtype))

    dense = lambda name, at: {
        "kernel": take(f"{name}.weight", at["kernel"], turned=True),
        "bias": take(f"{name}.bias", at["bias"]),
    }
    norm = lambda name, at: {"scale": take(f"{name}.weight", at["scale"]), "bias": take(f"{name}.bias", at["bias"])}
    stem, out = params["stem"], dict(params)
    out["embedding"] = {"embedding": take("embeddings.word_embeddings.weight", params["embedding"]["embedding"])}
    out["stem"] = {
        "position": take("embeddings.position_embeddings.weight", stem["position"]),
        "type": take("embeddings.token_type_embeddings.weight", stem["type"]),
        "norm": norm("embeddings.LayerNorm", stem["norm"]),
    }
    stages = [site for site in params if site.startswith("stage")]
    if len(stages) != (layers := _num_layers(weights)):
        raise ValueError(
            f"load_bert needs weights of {len(stages)} layers, got {layers} in {str(file)!r}. Create the model with num_layers={layers}."
        )
    for site in stages:
        name = f"encoder.layer.{int(site.removeprefix('stage')) - 1}."
        take_in = lambda ours: norm if "norm" in ours else dense
        out[site] = {ours: take_in(ours)(name + theirs, params[site][ours]) for ours, theirs in LAYER.items()}
    out["features"] = {"dense": dense("pooler.dense", params["features"]["dense"])}
    head, classifier = params["logits"], weights.get("classifier.weight")
    if classifier is not None and "bias" in head and classifier.shape == head["kernel"].shape[::-1]:
        out["logits"] = dense("classifier", head)
    buffers = ("embeddings.position_ids", "embeddings.token_type_ids")  # of no net: 0, 1, 2, ...
    inside = lambda name: name.startswith(("embeddings.", "encoder.")) and name not in buffers
    if left := sorted(name for name in weights if name not in taken and inside(name)):
        raise ValueError(
            f"load_bert needs the weights of a plain BERT, got {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} too "
            f"({len(left)} arrays without a place) in {str(file)!r}. Give bert-base-uncased's model.safetensors, or another BERT's."
        )
    return out


LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "out": "attention.output.dense", "norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense", "out_inner": "output.dense", "norm_inner": "output.LayerNorm",
}  # fmt: skip


def _place(file: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(file).expanduser()
    return path / "model.safetensors" if path.is_dir() else path


def _configured(file: str | pathlib.Path) -> dict[str, Any]:
    """What the config.json beside the weights says; nothing where there is none."""
    config = _place(file).with_name("config.json")
    return json.loads(config.read_text()) if config.is_file() else {}


def _weights(file: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays under the names that they have in a bare BertModel; old files call a norm's weight gamma and its bias beta."""
    found = read_safetensors(_place(file))
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    named = {}
    for name, array in found.items():
        for before, after in old.items():
            name = name.replace(before, after)
        named[name.removeprefix("bert.")] = array
    return named


def _num_layers(weights: Mapping[str, np.ndarray]) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})


def _required(weights: Mapping[str, np.ndarray], name: str, file: str | pathlib.Path) -> str:
    if name not in weights:
        raise ValueError(
            f"load_bert needs the weights of a BERT, {name} among them, got {', '.join(sorted(weights)[:3])}, ... "
            f"({len(weights)} arrays) in {str(file)!r}. Give bert-base-uncased's model.safetensors, or another BERT's."
        )
    return name
