"""check_optimizer: whether the links of an optimiser leave each other's work alone. For loops of one's own; the trainer checks by itself.

A link sees neither its neighbours nor the transformation around it. So one update is traced with a gradient whose arrays are known: what
a link that replaces the gradient is given must be those very arrays. What a trace can't tell (weights that are not trained, a guard
against nan that looks at the first gradient only) is found by running one update on numbers.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.optimizer_link import Visit, undone, watched
from perturbjax.parameter.asking import unmasked

_BATCH, _CLASSES = 2, 2  # of the batch that the links are told of while they are looked at
_PLACES = (0.0, 0.999)  # shares of a run at which one update is run: links with a timing act at one of them at least
_UPDATES = 32  # at most, until a weight's update is no longer zero: a warm-up starts with 0, MultiSteps waits for its batches


def check_optimizer(
    optimizer: optax.GradientTransformation, params: optax.Params, *, updates: Any = None, **extra_args: Any
) -> None:
    """Raises ValueError where a link of the optimiser would undo another's work without a word. Call it once, before training.

        optimizer = optax.chain(pj.sam(radius=0.05), optax.sgd(0.1))
        opt_state = optimizer.init(params)
        pj.check_optimizer(optimizer, params)

    It finds
      - a link that changes the gradient (clipping, noise, weight decay, DP-SGD, the learning rate) before one that asks for gradients of
        its own (SAM and its family, PUGD, RTS, PCGrad, GradDrop, DP-SGD), which throws the change away;
      - such a link inside `optax.MultiSteps`, where it would see the last batch only, and inside `optax.apply_if_finite` or MultiSteps'
        `should_skip_update_fn`, which look at the first gradient and not at the one that it asks for;
      - weights that the optimiser does not train (`optax.set_to_zero`) but the link climbs along.

    Nothing is trained: one update is traced, and if a link asks for gradients, some are run on made-up ones.

    Args:
      optimizer: the whole one, as it is trained with.
      params: the parameters that `optimizer.init` gets.
      updates: something like what `optimizer.update` gets first, where that is not like the parameters (`lpg_updates`: [B, C]).
      extra_args: those that links of your own need in `update`; the ones that the package's links know are made up, with two classes:
        give `num_classes=` for links that need more (`pcgrad(groups=5)`).
    """
    if isinstance(optimizer, optax.GradientTransformation):  # MultiSteps is none, and passes what it is given on
        optimizer = optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)
    given = params if updates is None else updates
    visits = check_links(optimizer, params, state, given, **extra_args)
    asking = [visit.name for visit in visits if visit.replaces]
    if not asking:
        return
    guarded = any(map(_is_guard, jax.tree.leaves(state, is_leaf=_is_guard)))
    for progress in _PLACES:
        run = lambda second, state=state, progress=progress: optimizer.update(
            _noise(given), state, params, **_accepted(optimizer, _arguments(params, second, progress)) | extra_args
        )
        _check_climb(asking[0], params, run)
        if guarded:
            _check_guard(asking[0], params, run)


def check_links(
    optimizer: Any, params: optax.Params, state: optax.OptState, updates: Any = None, **extra_args: Any
) -> list[Visit]:
    """The links that `optimizer` called in one traced update, in their order. Raises ValueError for a link that throws another's work away,
    and for one that asks for gradients inside optax.MultiSteps."""
    with watched() as visits:
        given = params if updates is None else updates
        jax.eval_shape(lambda *traced: _traced(optimizer, visits, extra_args, *traced), params, state, given)
    return visits


def _traced(optimizer: Any, visits: list[Visit], extra_args: dict, params: Any, state: Any, like: Any) -> None:
    grads = jax.tree.map(lambda w: w + jnp.ones([], w.dtype), like)  # arrays that are nobody else's
    given = _accepted(optimizer, _arguments(params, lambda p: _like(params, p), 0.0)) | extra_args
    try:
        optimizer.update(grads, state, params, **given)
    except ValueError:  # of a link that misses something: perhaps because of where it stands
        _check_visits(visits, grads, state)
        raise
    _check_visits(visits, grads, state)


def _check_visits(visits: list[Visit], grads: Any, state: Any) -> None:
    given = {id(leaf) for leaf in jax.tree.leaves(grads)}
    for number, visit in enumerate(visits):
        if not visit.replaces or all(id(leaf) in given for leaf in visit.received):
            continue
        if _in_multi_steps(state, visit.state):
            raise ValueError(
                f"MultiSteps needs links that ask for gradients themselves before it, got {visit.name} inside, where it would see "
                f"the last batch only. Write optax.chain(pj.{visit.name}(...), optax.MultiSteps(optax.sgd(0.1), 4))."
            )
        known = {id(leaf): other for other in visits[:number] for leaf in other.returned if id(leaf) not in given}
        earlier = next((known[id(leaf)] for leaf in visit.received if id(leaf) in known), None)
        name, kind = (None, None) if earlier is None else (earlier.name, "replaces" if earlier.replaces else earlier.gradient)
        raise ValueError(undone(visit.name, name, kind))


def _in_multi_steps(state: optax.OptState, own: optax.OptState) -> bool:
    """Whether a state like `own`, a link's, is in one of MultiSteps."""
    is_multi, is_own = lambda x: isinstance(x, optax.MultiStepsState), lambda x: isinstance(x, type(own))
    inner = [x.inner_opt_state for x in jax.tree.leaves(state, is_leaf=is_multi) if is_multi(x)]
    return any(map(is_own, jax.tree.leaves(inner, is_leaf=is_own)))


def _is_guard(state: Any) -> bool:
    return isinstance(state, optax.ApplyIfFiniteState)


def _check_climb(name: str, params: Any, run: Callable) -> None:
    """Raises ValueError for a weight that is moved for the second gradient and whose updates are zero, unless all weights' are."""
    moved: set[str] = set()

    def note(point):
        same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), point, params)
        moved.update(_path(leaf) for leaf in jax.tree_util.tree_leaves_with_path(same) if not leaf[1])

    def second(point):
        jax.debug.callback(note, point)
        return _like(params, _noise(params))

    updates, state = run(second)
    zero = _zeros(updates)
    for _ in range(_UPDATES - 1):
        jax.effects_barrier()
        if not zero & moved:
            return
        updates, state = run(second, state)
        zero &= _zeros(updates)
    jax.effects_barrier()
    still = [path for path in map(_path, jax.tree_util.tree_leaves_with_path(updates)) if path in zero & moved]
    if still and len(zero) < len(jax.tree.leaves(updates)):
        raise ValueError(
            f"{name} needs to know which weights are trained, got the untrained {still[0]}, which it would climb along. "
            f"Write pj.{name}(..., mask=trained), a tree of bools like the parameters."
        )


def _check_guard(name: str, params: Any, run: Callable) -> None:
    """Raises ValueError if nan in the second gradient passes."""
    updates, _ = run(lambda point: jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params))
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates)):
        raise ValueError(
            f"A guard against nan needs to see the gradient that {name} asks for, got it around that link, where it sees the first "
            f"gradient only. Write optax.chain(pj.{name}(...), optax.apply_if_finite(optax.sgd(0.1), 5))."
        )


def _path(leaf: tuple) -> str:
    return jax.tree_util.keystr(leaf[0])


def _zeros(updates: Any) -> set[str]:
    """The weights that are not changed."""
    return {_path(leaf) for leaf in jax.tree_util.tree_leaves_with_path(updates) if not np.any(leaf[1])}


def _noise(tree: Any) -> Any:
    """Numbers without zeros, the same each time."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=np.shape(w)), w.dtype), tree)


def _like(params: Any, tree: Any) -> Any:
    """The tree as gradients of the parameters: their types."""
    return jax.tree.map(lambda w, x: jnp.asarray(x, w.dtype), params, tree)


def _accepted(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those that its update takes: not all of optax's own pass on what they don't know (lookahead)."""
    known = inspect.signature(optimizer.update).parameters
    if any(one.kind == inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return given
    return {name: value for name, value in given.items() if name in known}


def _arguments(params: Any, gradient: Callable, progress: float) -> dict[str, Any]:
    """Every extra argument that a link of the package may need, made up."""
    zeros = jnp.zeros([_BATCH], jnp.int32)
    return dict(
        grad_fn=unmasked(lambda p, *, weights=None: gradient(p), params), loss_fn=lambda p: jnp.zeros([_BATCH]), losses=jnp.zeros([_BATCH]),
        value=jnp.ones([]), step=jnp.int32(0), progress=jnp.float32(progress), rate=jnp.ones([]), labels=zeros, side={"domain": zeros},
        local_grads=gradient(params), key=jax.random.key(0), axis_name=None, num_classes=_CLASSES, num_domains=_CLASSES, epoch=jnp.int32(0),
    )  # fmt: skip
