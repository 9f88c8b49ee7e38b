"""The model as a line of named sites, so that any stretch of it can be run alone.

    input ──► stem ──► stage1 … stageN ──► features ──► logits

A perturbation at a site reruns only what stands after it; that needs no hooks, only a model that can be entered and left
at named places. The models of `perturbjax.models` can; `line` does the same for anyone's own.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from perturbjax.checks import check_choice
from perturbjax.frozen import stop_frozen

Variables = Any
Stats = Any


@dataclasses.dataclass(frozen=True)
class Line:
    """A model cut at named sites."""

    sites: tuple[str, ...]
    """Names from "input" to "logits", in the order of the forward pass."""
    slice: Callable[..., tuple[jax.Array, Stats]]
    """(variables, value, start, stop, *, stats, train, key) -> (value at `stop`, statistics with that stretch's updated)."""
    head: Callable[[Variables], tuple[jax.Array, jax.Array]] | None = None
    """variables -> (W [C, d], b [C]) of the last linear layer; None if unknown."""
    scale: float | None = None
    """s, if the logits are cosines times s (a cosine head); None: they are not, or it is unknown."""
    side: Callable[[jax.Array], Mapping[str, jax.Array]] | None = None
    """inputs -> what the slices need of them beside the value, by name, each [B, ...] (of texts: the mask of the words), which `slice`
    then takes as `side=`; None: nothing."""

    def site(self, name: str) -> str:
        """The site's own name: itself, or the last stage for "last_stage"; of texts, whose input is whole numbers, "embedding" for
        "input". "raw_input" is the input of texts, too: for links that exchange samples. Raises ValueError for an unknown one."""
        if name == "raw_input":
            return "input"
        if name == "input" and "embedding" in self.sites:
            return "embedding"
        if name == "last_stage":
            stages = [s for s in self.sites if s.startswith("stage")]
            if not stages:
                raise ValueError(
                    f"line needs a site named 'stage…' for site='last_stage', got the sites {', '.join(self.sites)}. "
                    "Cut the model with pj.line({'stage1': first_part, 'logits': second_part}), or name one of its sites."
                )
            return stages[-1]
        check_choice("line", "site", name, self.sites)
        return name

    def level(self, name: str) -> int:
        """Number of a site for layer-scaled bounds: input and stem 0, stage l is l, features the last l, logits the last + 1."""
        stages = [s for s in self.sites if s.startswith("stage")]
        if name == "logits":
            return len(stages) + 1
        return sum(self.sites.index(s) <= self.sites.index(name) for s in stages)


def line(
    model: Any,
    *,
    stateful: bool = False,
    head: Callable[[Variables], tuple[jax.Array, jax.Array]] | None = None,
    scale: float | None = None,
) -> Line:
    """Turns a model into a `Line`.

    Args:
      model: one of
        a Flax linen module with `sites` (those of `perturbjax.models`): variables are its "params", stats its "batch_stats"; no gradient
        reaches the parameters below the prefixes in its `frozen`, if it has that field;
        a function `apply(variables, inputs) -> logits`: a line with the two sites input and logits;
        a mapping from site to function, in the order of the forward pass, the last one "logits": each function takes
        (variables, value at the site before) and returns the value at its own site;
        a Line, which is returned as it is.
      stateful: the functions take `(variables, value, stats, *, train, key)` and return `(value, stats)`, for models with
        BatchNorm or their own dropout (see below).
      head: variables -> (W [C, d], b [C]) of the last layer, for the methods that need the class rows (ISDA).
      scale: s, if the logits are s·cos θ, for the methods that need a cosine head (LDAM, ArcFace).

    >>> two = line({"features": lambda w, x: x @ w["a"], "logits": lambda w, a: a @ w["b"]})
    >>> two.sites
    ('input', 'features', 'logits')

    A Flax module `net` with BatchNorm and dropout, whose own flag is `train`; the statistics go from step to step beside the states:

        def apply(params, x, stats, *, train, key):
            variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key} if train else {}
            logits, new = net.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        loss = pj.objective(pj.line(apply, stateful=True), chain, num_classes=10)
        states = loss.init(params, x, stats=stats)
        value, out = loss(params, states, pj.batch(x, y), key=key, stats=stats)
        states, stats = out.states, out.stats

    A flax.nnx model with them, taken apart by `graphdef, params, stats = nnx.split(model, nnx.Param, ...)`:

        def apply(params, x, stats, *, train, key):
            net = nnx.merge(graphdef, params, stats, copy=True)
            net.train() if train else net.eval()
            return net(x), nnx.state(net, nnx.Not(nnx.Param))
    """
    if isinstance(model, Line):
        return model
    pieces = dict(model) if isinstance(model, Mapping) else {"logits": model}
    nnx = sys.modules.get("flax.nnx")  # where it isn't loaded, there is no module of it
    for piece in (model, *pieces.values()):
        if nnx is not None and isinstance(piece, nnx.Module):
            raise ValueError(
                f"line needs a function of the parameters, got {type(piece).__name__}, a flax.nnx module, which holds its own. "
                "Write graphdef, params = nnx.split(model); pj.line(lambda p, x: nnx.merge(graphdef, p)(x)); "
                "with BatchNorm or dropout see its docstring."
            )
    if hasattr(model, "sites") and hasattr(model, "apply"):
        return _from_module(model)
    # A Flax module is callable, but only inside another one.
    if not pieces or not all(callable(piece) and not hasattr(piece, "apply") for piece in pieces.values()):
        raise ValueError(
            f"line needs a Flax module with sites, a function or a mapping from site to function, got {model!r}. "
            "For a Flax model without sites write pj.line(model.apply); with BatchNorm or dropout: pj.line(apply, stateful=True), "
            "see its docstring."
        )
    if list(pieces)[-1] != "logits" or "input" in pieces:
        raise ValueError(
            f"line needs a mapping that ends with 'logits' and leaves out 'input', got {', '.join(pieces)}. "
            "Name what each function returns: {'features': body, 'logits': head}."
        )
    sites = ("input", *pieces)

    def run_slice(variables, value, start, stop, *, stats=None, train=True, key=None):
        for place in range(sites.index(start) + 1, sites.index(stop) + 1):
            name = sites[place]
            if stateful:
                # Each piece draws for itself, the same in every slice; the first one with the key as it is, as a model of one piece.
                own = key if key is None or place == 1 else jax.random.fold_in(key, place)
                value, stats = pieces[name](variables, value, stats, train=train, key=own)
            else:
                value = pieces[name](variables, value)
        return value, stats

    return Line(sites, run_slice, head, scale)


def _from_module(module: Any) -> Line:
    frozen = getattr(module, "frozen", ())

    def run_slice(variables, value, start, stop, *, stats=None, train=True, key=None, side=None):
        collections = {"params": stop_frozen(variables, frozen), **({"batch_stats": stats} if stats else {})}
        rngs = None if key is None else {"dropout": key}
        options = dict(train=train, start=start, stop=stop)
        options |= {name: side[name] for name in getattr(module, "takes", ())}
        if not (train and stats):
            return module.apply(collections, value, rngs=rngs, **options), stats
        # Every slice returns the whole collection, its own part updated: so it goes into the next slice as it is.
        value, new = module.apply(collections, value, rngs=rngs, mutable=["batch_stats"], **options)
        return value, new["batch_stats"]

    cosine = getattr(module, "head", None) == "cosine"
    has_head = hasattr(module, "head_of") and not cosine
    head = (lambda variables: module.head_of(stop_frozen(variables, frozen))) if has_head else None
    side = getattr(module, "side_of", None)
    return Line(tuple(module.sites), run_slice, head, module.scale if cosine else None, side)
