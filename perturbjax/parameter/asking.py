"""How a link of the optimiser asks for gradients elsewhere: which parameters are its own, what `grad_fn` is given, what it may answer.

- `grad_fn` is given **all** parameters. A link that acts on some of them (`mask=`, or `optax.masked` and `optax.partition` with
  `unmasked`) climbs along its own, by their norms alone; the others stay where they are.
- Half-precision parameters (bfloat16, float16) are given in float32: the step up is mostly smaller than what they can tell apart.
  Gradients may come back in any type; updates have the type of the gradients that the link was given.
- It answers with the gradient alone, leaf for leaf that of the parameters, in any container: those of `flax.nnx` have several.
- Where a gradient, or the point it was asked at, is not finite, the update is nan as a whole, for the trainer to see: a net of ReLUs
  has finite gradients at parameters that are nan.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from perturbjax.classes import wide
from perturbjax.parameter.ascent import require

Mask = Mapping[str, Any] | Callable[[Any], Any] | None
"""Which parameters a link acts on, as in `optax.masked`: a tree of bools like the parameters (or a prefix of it), a function that makes
one of them, or None for all."""


def unmasked(function: Callable, params: Any) -> Callable:
    """`function` of all parameters (a `grad_fn`, a `loss_fn`) as one of those that `optax.masked` or `optax.partition` leaves to a link.

    The masked ones are filled in from `params` (those in half precision as float32, where the others come as float32), and gradients lose
    them again; other answers, such as the losses [B] of a `loss_fn`, pass as they are. A tree without masked parameters passes, too.

        tx = optax.partition({"body": pj.sam(), "head": optax.identity()}, labels)
        tx.update(grads, state, params, grad_fn=pj.unmasked(grad_fn, params))
    """

    @functools.wraps(function)
    def of_some(some: Any, *args: Any, **options: Any) -> Any:
        wider = lambda own, w: not _is_masked(own) and jnp.result_type(own) != jnp.result_type(w)
        widened = any(jax.tree.leaves(jax.tree.map(wider, some, params, is_leaf=_is_masked)))
        as_own = _not_half if widened else lambda w: w
        fill = lambda own, all_of_it: jax.tree.map(as_own, all_of_it) if _is_masked(own) else own
        found = function(jax.tree.map(fill, some, params, is_leaf=_is_masked), *args, **options)
        leaves = jax.tree.leaves(found)
        if _shapes(found) != _shapes(params) or _names(found) != _names(params):
            return found
        flag = lambda own, all_of_it: jax.tree.map(lambda _: not _is_masked(own), all_of_it)
        kept = jax.tree.leaves(jax.tree.map(flag, some, params, is_leaf=_is_masked))
        return jax.tree.unflatten(jax.tree.structure(some), [g for g, k in zip(leaves, kept, strict=True) if k])

    made: Any = of_some
    made.fills = True
    return made


def asking(name: str, init: Callable, step: Callable, *, mask: Mask = None) -> optax.GradientTransformationExtraArgs:
    """The optax link made of `init(params) -> state` and `step(updates, state, params, *, grad_fn, **extra) -> (updates, state)`.

    The step gets the gradients in the parameters' own container and a `grad_fn` that keeps what is promised above; its updates go out in
    the container and the types that the gradients came in.

    Raises ValueError, naming the line to write, for an update without `params` or `grad_fn`, for gradients (or an answer of `grad_fn`)
    that are not like the parameters, and for masked parameters where nobody fills in the others.
    """

    def own(updates, state, params=None, *, grad_fn=None, local_grads=None, **extra_args):
        _require_all(name, params, grad_fn)

        @functools.wraps(grad_fn)
        def ask(point, **weights):
            return whole_or_nan(_like(name, "grad_fn to return", params, grad_fn(point, **weights)), point)

        out, state = step(updates, state, params, grad_fn=ask, local_grads=_only(params, local_grads), **extra_args)
        return whole_or_nan(out, updates), state

    link = optax.GradientTransformationExtraArgs(init, own)
    link = link if mask is None else optax.masked(link, mask)

    def update(updates, state, params=None, *, grad_fn=None, local_grads=None, each=False, **extra_args):
        require(name, params, grad_fn)
        given = _like(name, "to be given", params, updates)
        if local_grads is not None:
            extra_args["local_grads"] = _like(name, "local_grads to be", params, _only(params, local_grads))
        if mask is not None:
            grad_fn = unmasked(grad_fn, params)
            if extra_args.get("loss_fn") is not None:
                extra_args["loss_fn"] = unmasked(extra_args["loss_fn"], params)
        if each:  # the masked ones have one row of zeros for all groups
            extra_args["each"], given = True, jax.tree.map(lambda g: jnp.zeros_like(g)[None], given)
        out, state = link.update(given, state, params, grad_fn=grad_fn, **extra_args)
        out = [u.astype(g.dtype) for u, g in zip(jax.tree.leaves(out), jax.tree.leaves(updates), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(updates), out), state

    return optax.GradientTransformationExtraArgs(init if mask is None else link.init, update)


def whole_or_nan(tree: Any, *others: Any) -> Any:
    """The tree, or nan in each of its leaves unless all leaves of it and of the others are finite."""
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((tree, others))]
    fine = functools.reduce(jnp.logical_and, finite, jnp.bool_(True))
    return jax.tree.map(lambda x: jnp.where(fine, x, jnp.nan), tree)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _not_half(w: Any) -> Any:
    return wide(w) if jnp.issubdtype(jnp.result_type(w), jnp.floating) else w


def _only(params: Any, tree: Any) -> Any:
    """The tree without what is masked in the parameters, if anything is."""
    if tree is None or not any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        return tree
    return jax.tree.map(lambda w, g: w if _is_masked(w) else g, params, tree, is_leaf=_is_masked)


def _require_all(name: str, params: Any, grad_fn: Callable) -> None:
    masked = sum(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    if masked and not getattr(grad_fn, "fills", False):
        raise ValueError(
            f"{name} needs all parameters for grad_fn, got {masked} that optax.masked or optax.partition has masked. Write "
            f"pj.{name}(mask=...) instead of optax.masked, or grad_fn=pj.unmasked(grad_fn, params) in tx.update."
        )


def _like(name: str, what: str, params: Any, tree: Any) -> Any:
    """Gradients in the parameters' container. Raises ValueError unless they have its names and shapes."""
    form: Any = jax.tree.structure(params)
    if form != jax.tree.structure(tree):
        if _names(tree) != _names(params):
            raise ValueError(_unlike(name, what, params, tree))
        tree = jax.tree.unflatten(form, jax.tree.leaves(tree))
    if _shapes(tree) != _shapes(params):
        raise ValueError(_unlike(name, what, params, tree))
    return tree


def _unlike(name: str, what: str, params: Any, tree: Any) -> str:
    shown = lambda t: f"{len(jax.tree.leaves(t))} arrays {', '.join(map(str, _shapes(t)[:4]))}{' …' * (len(_shapes(t)) > 4)}"
    got = f"a tuple of {len(tree)}, " if isinstance(tree, tuple) and not hasattr(tree, "_fields") else ""
    return (
        f"{name} needs {what} the gradients alone, like the parameters ({shown(params)}), got {got}{shown(tree)}. Write grad_fn="
        "lambda p: jax.grad(loss)(p, batch); of jax.value_and_grad's answer take [1], with has_aux=True of jax.grad's [0]."
    )


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _names(tree: Any) -> list[tuple[str, ...]]:
    """The leaves' paths, whatever the containers are; the `value` of a variable of flax.nnx is the variable."""
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
    is_value = lambda key: isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"
    return [tuple(name(k) for k in path if not is_value(k)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
