"""Parameters that stay as they are, named by prefixes of their paths: "stem", "stage2/block0", "logits/bias".

What is frozen is not differentiated, and no link of the optimiser sees it: norms, climbs, noise, decay and momentum are those of the
other parameters alone. The trainer does so for the prefixes in the model's field `frozen`; in a loop of one's own:

    trained, frozen = split_params(params, model.frozen)
    opt_state = tx.init(trained)
    grads = jax.grad(lambda trained: loss(join_params(trained, frozen)))(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    params = join_params(optax.apply_updates(trained, updates), frozen)
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

Params = Any
"""Nested dictionaries of arrays."""


def covered(path: str, prefixes: Iterable[str]) -> bool:
    """Whether one of the prefixes is the path, or a module around it.

    >>> covered("stage1/block0/conv1", ["stage1/block0"]), covered("stage10/block0", ["stage1"])
    (True, False)
    """
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def split_params(params: Params, prefixes: Iterable[str]) -> tuple[Params, Params]:
    """(those that are trained, those that are frozen), each without the other's names; ValueError for a prefix that none of them has.

    >>> split_params({"stem": {"w": 1}, "logits": {"w": 2, "b": 3}}, ("stem", "logits/b"))
    ({'logits': {'w': 2}}, {'stem': {'w': 1}, 'logits': {'b': 3}})
    """
    prefixes = tuple(prefixes)
    if not prefixes:
        return params, {}
    _check_prefixes("frozen", params, prefixes)
    return _split(params, prefixes, "")


def _split(params: Params, prefixes: tuple[str, ...], at: str) -> tuple[dict, dict]:
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for name, part in params.items():
        if covered(at + name, prefixes):
            frozen[name] = part
        elif not isinstance(part, Mapping):
            trained[name] = part
        else:
            for kept, own in zip((trained, frozen), _split(part, prefixes, f"{at}{name}/"), strict=True):
                kept.update({name: own} if own else {})
    return trained, frozen


def join_params(trained: Params, frozen: Params) -> Params:
    """What `split_params` split."""
    if not frozen:
        return trained
    both = {name: join_params(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**trained, **frozen, **both}


def stop_frozen(params: Params, prefixes: Iterable[str]) -> Params:
    """The parameters, with no gradient for those that are frozen."""
    trained, frozen = split_params(params, prefixes)
    return join_params(trained, jax.lax.stop_gradient(frozen))


def check_frozen(function: str, params: Params, prefixes: Iterable[str]) -> None:
    """Raises ValueError for a prefix that no parameter has, or if nothing is left to train."""
    prefixes = tuple(prefixes)
    _check_prefixes(function, params, prefixes)
    if prefixes and not split_params(params, prefixes)[0]:
        raise ValueError(
            f"{function} needs some parameters to be left out, got {', '.join(prefixes)}: nothing is left to train. "
            f"Leave out {prefixes[-1]!r}."
        )


def _check_prefixes(function: str, params: Params, prefixes: tuple[str, ...]) -> None:
    known = list(_paths(params, ""))
    for prefix in prefixes:
        if prefix not in known:
            close = difflib.get_close_matches(prefix, known, n=1, cutoff=0.5)
            guess = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{function} needs prefixes of this model's parameters, got {prefix!r}. {guess}It has {', '.join(params)}."
            )


def _paths(params: Params, at: str) -> Iterator[str]:
    """Of all modules and parameters, outer ones first."""
    for name, part in params.items():
        yield at + name
        if isinstance(part, Mapping):
            yield from _paths(part, f"{at}{name}/")
