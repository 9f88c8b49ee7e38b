r"""LPG as an optax link: logit gradients in, parameter gradients out.

    update(h, ...) = pullback(h̃),    h̃ = h + δ as `lpg` finds it

The same numbers as the link of the loss, to rounding: that one adds δ to the cotangent of the logits on its way, here the way from the
logits to the parameters is an argument. For loops that hold h, and for people who think in optax. Source: LPG, section 3.7.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_labels, check_number
from perturbjax.classes import AxisName, wide
from perturbjax.gradient.lpg import lpg
from perturbjax.link import Context, Flow, Rest, Where
from perturbjax.optimizer_link import named


def lpg_updates(
    *, num_classes: int, class_counts: ArrayLike | None = None, bias: bool = True, axis_name: AxisName = None, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """An optax link whose `update` takes the logit gradients h [B, C] as updates and returns gradients of the parameters.

        tx = optax.chain(pj.lpg_updates(num_classes=10, split="all", bound=0.1), optax.sgd(0.1))
        logits, pull = jax.vjp(lambda params: model(params, x), params)
        h = jax.nn.softmax(logits) - jax.nn.one_hot(y, 10)        # per example, before any 1/B
        pullback = lambda v: pull(v / len(y))[0]                  # the 1/B of a mean loss belongs here
        updates, state = tx.update(h, state, params, labels=y, pullback=pullback)

    `update` takes, beside h, state and params:
      labels: [B] integers. pullback: cotangents [B, C] -> gradients of the parameters; what a function from jax.vjp returns is fine.
      logits: [B, C], what the split's statistics are taken of; None: recovered from h, as if the loss were plain cross entropy.
      targets: [B, C], what the loss compares with; None: one-hot labels.
      features: [B, d], for inference="pgd" with jacobian="head".
      epoch: for splits that keep statistics. step: for a bound that is a schedule; progress: for `linear(...)` and `cosine(...)`.

    The state is the split's.

    Args:
      num_classes: C.
      class_counts: [C] training samples of each class, for split="frequency" and bounds by frequency.
      bias: whether the last layer has a bias (counted by jacobian="head").
      axis_name: mapped axis of per-device code; the pullback is then of this device's samples.
      settings: all those of `lpg`.

    Raises:
      ValueError: an extra argument is missing, or h isn't [B, C] with one row per label.
    """
    link = lpg(**settings)
    check_number("lpg_updates", low=2, num_classes=num_classes)
    if class_counts is None and "class_counts" in link.needs:
        raise ValueError(
            "lpg_updates needs class_counts for its split or bound, got none. "
            "Pass class_counts=numpy.bincount(labels, minlength=num_classes)."
        )
    if class_counts is not None and np.shape(class_counts) != (num_classes,):
        raise ValueError(
            f"lpg_updates needs class_counts of shape ({num_classes},), got {np.shape(class_counts)}. Pass one each."
        )
    context = Context(num_classes, None if class_counts is None else jnp.asarray(class_counts), axis_name=axis_name)

    def init(params):
        del params  # the state is about classes
        return link.init(context)

    def update(
        updates, state, params=None, *, labels=None, pullback=None, logits=None, targets=None, features=None, step=None,
        progress=None, epoch=None, **extra_args,
    ):  # fmt: skip
        del extra_args  # meant for other links of the chain
        _check_given("labels", labels, "labels=labels, pullback=pullback")
        _check_given("pullback", pullback, "pullback=lambda v: jax.vjp(f, params)[1](v / B)[0]")
        labels = jnp.asarray(labels)
        h = _checked(updates, labels, num_classes)
        if "features" in link.needs:
            _check_given("features", features, 'features=features, [B, d], or build it with jacobian="full"')
        grads = lambda v: _parameters(pullback(v.astype(h.dtype)), params)
        if targets is None:
            targets = jax.nn.one_hot(labels, num_classes, dtype=wide(h).dtype)
        trace = {"logits": _logits_of(h, targets) if logits is None else logits}
        trace |= {} if features is None else {"features": features}
        flow = Flow(
            value=wide(h), labels=labels, targets=targets, weights=None, index=None, side={}, trace=trace, extra={},
            penalty=None, stats=None,
        )  # fmt: skip
        now = context._replace(
            name="lpg_updates", where=Where(step, progress, epoch), pullback=lambda: grads,
            head=lambda: (None, jnp.zeros([num_classes]) if bias else None),
        )  # fmt: skip
        flow, state, _ = link.apply(flow, _NO_REST, state, now)
        return grads(flow.value), state

    return named(optax.GradientTransformationExtraArgs(init, update), "lpg_updates", "replaces")


_NO_REST = Rest(lambda value, key, other: (None, None))  # the losses don't depend on their own gradient


def _check_given(name: str, value: Any, how: str) -> None:
    if value is None:
        raise ValueError(f"lpg_updates needs `{name}`, got none. Call tx.update(h, state, params, ..., {how}).")


def _checked(h: Any, labels: jax.Array, num_classes: int) -> jax.Array:
    """h, if it is floats [B, C] with B labels."""
    leaves = jax.tree.leaves(h)
    if len(leaves) != 1 or leaves[0] is not h:
        raise ValueError(
            f"lpg_updates needs logit gradients [B, C] as updates, got a tree of {len(leaves)} arrays. "
            "Gradients of the parameters are what it returns: put it first in optax.chain."
        )
    if np.shape(h) != (*np.shape(labels), num_classes) or np.ndim(h) != 2:
        raise ValueError(
            f"lpg_updates needs h [B, {num_classes}] and labels [B], got {np.shape(h)} and {np.shape(labels)}. "
            "Pass softmax(logits) - one_hot(labels), one row per sample; flatten sequences first."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"lpg_updates needs integer labels, got {labels.dtype}. Cast them: labels.astype(jnp.int32).")
    check_labels("lpg_updates", labels, num_classes)
    return jnp.asarray(h)


def _logits_of(h: jax.Array, targets: jax.Array) -> jax.Array:
    """log p with p = h + y: logits up to a constant per sample, for a plain cross entropy."""
    p = wide(h) + targets.astype(wide(h).dtype)
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def _parameters(grads: Any, params: Any) -> Any:
    """What the pullback returned, without the tuple that jax.vjp's functions put round it."""
    if type(grads) is not tuple or len(grads) != 1:
        return grads
    params_are_one = type(params) is tuple and len(params) == 1
    return grads if params_are_one else grads[0]
