r"""Adaptive layer selection for LPA: of several candidate sites, the one whose perturbation changes the loss most.

    l* = argmax_l Σ_c | mean_{i: y_i = c} ℓ(a_i⁽ˡ⁾ + δ_c⁽ˡ⁾) − ℓ(a_i⁽ˡ⁾) |

Compared on one batch, at the first step of the first epoch, of the second (the first with accuracies) and of every E-th after it: the
training batch of that step. Batches held back, which the net has not fitted, would be missing in training and need passes of their
own; the paper leaves open which it compares on.
In that step every site searches from the clean pass and none is perturbed; in all others one site searches, and the rest cost
nothing. Source: "Learning to Perturb Activations" (LPA), section 3.5, eq. 13.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perturbjax.classes import AxisName, class_mean
from perturbjax.link import Context, Flow, Perturbation, Rest, searched_from


class SitesState(NamedTuple):
    """Shared by the links at all candidate sites."""

    split: Any  # state of the split
    effects: jax.Array  # [S], Σ_c |mean loss change| at each site, when they were last compared


def layer_effect(
    clean: jax.Array, perturbed: jax.Array, labels: jax.Array, num_classes: int, *, axis_name: AxisName = None
) -> jax.Array:
    """Σ_c |mean over class c of the perturbed minus the clean losses [B]| (eq. 13): a number; absent classes add nothing.

    >>> print(layer_effect(jnp.zeros(3), jnp.array([1.0, 3.0, -1.0]), jnp.array([0, 0, 1]), 2))
    3.0
    """
    return jnp.abs(class_mean(perturbed - clean, labels, num_classes, axis_name=axis_name)).sum()


def comparing(context: Context, every: int) -> jax.Array:
    """Whether the sites are compared at this step: a bool made of the step alone, one for all seeds that are vmapped."""
    epoch = jnp.asarray(context.step, jnp.int32) // context.epoch_length()
    return context.epoch_begins() & ((epoch == 0) | ((epoch - 1) % every == 0))


Search = Callable[[Flow, Rest, Any, Context, Any], tuple[jax.Array, tuple[jax.Array, jax.Array], Any, dict[str, jax.Array]]]


def site_links(
    sites: tuple[str, ...],
    every: int,
    init_split: Callable[[Context], Any],
    search: Search,
    check: Callable[[Context], Any],
    needs: tuple[str, ...],
) -> tuple[Perturbation, ...]:
    """A link for each candidate site, with one state.

    Args:
      sites: candidates; as long as nothing tells them apart, the first one is used.
      every: E, in epochs.
      init_split: of the split.
      search: (flow, rest, split state, context, whether that state has this batch already) -> (delta, (losses [B], logits [B, C]) of
        the clean pass, split state with this batch, metrics).
      check: context at a site -> raises ValueError if the search can't act there.
      needs: of the links.
    """

    def init(context: Context) -> SitesState:
        if context.num_examples is None and context.steps_per_epoch is None:
            raise ValueError(
                "lpa needs num_examples to know when an epoch begins, got none. "
                "Write objective(..., num_examples=N), or give one site: site='last_stage'."
            )
        check(context)
        return SitesState(init_split(context), jnp.zeros([len(sites)], context.dtype))

    # In flow.extra, of these links alone: (whether the split has this batch, metrics of the active site).
    seen = f"lpa {id(init)}"

    def link(number: int, site: str) -> Perturbation:
        def apply(flow: Flow, rest: Rest, state: SitesState, context: Context):
            due = comparing(context, every)
            active = due | (jnp.argmax(state.effects) == number)
            counted, metrics = flow.extra.get(seen, (jnp.zeros([], bool), None))

            def searched():
                delta, (losses, logits), split, found = search(flow, rest, state.split, context, counted)

                def compare():
                    after = jax.lax.stop_gradient(rest(flow.value + delta))
                    groups = (flow.labels, context.num_classes)
                    return layer_effect(losses, after, *groups, axis_name=context.axis_name).astype(state.effects.dtype)

                effect = jax.lax.cond(due, compare, lambda: state.effects[number])
                return jnp.where(due, jnp.zeros_like(delta), delta), split, effect, found, logits

            like = jax.eval_shape(searched)
            zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
            idle = lambda: (zeros(like[0]), state.split, state.effects[number], zeros(like[3]), zeros(like[4]))
            delta, split, effect, found, logits = jax.lax.cond(active, searched, idle)
            evaluations = found.pop("inner_evaluations")
            metrics = found if metrics is None else jax.tree.map(lambda a, b: jnp.where(active, a, b), found, metrics)
            state = SitesState(split, state.effects.at[number].set(effect))
            flow = searched_from(flow, logits, searched=active)
            flow = flow._replace(value=flow.value + delta, extra={**flow.extra, seen: (counted | active, metrics)})
            chosen = jnp.argmax(state.effects).astype(jnp.int32)
            effects = {f"effect_{name}": state.effects[i] for i, name in enumerate(sites)}
            return flow, state, {**metrics, **effects, "site": chosen, "inner_evaluations": evaluations}

        return Perturbation(site, init, apply, search=True, needs=needs, shared=True)

    return tuple(link(number, site) for number, site in enumerate(sites))
