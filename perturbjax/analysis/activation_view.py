r"""The unified view of activation perturbation: how far any method moves the activations of each class at a site, δ = ã − a.

    relative variation E‖δ‖/E‖a‖,    gain E‖ã‖/E‖a‖ − 1 (more than zero: expansive, less: contractive),    change of the class's loss

Means are over the samples of the class in the batch; a is the activation of the plain pass, ã that of the perturbed one behind the
links at the site: of dropout a ⊙ m, of manifold mixup λa_i + (1 − λ)a_j, of adversarial training and LPA a + δ. What a method did
before the site counts as far as it gets there. Source: "Learning to Perturb Activations" (LPA), section 3.2 and Figure 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.analysis.gradient_view import Variations, over_batches
from perturbjax.chains import split_methods
from perturbjax.classes import class_count, class_mean, wide
from perturbjax.core import Batch, objective
from perturbjax.link import Perturbation
from perturbjax.projection import group_norm

_SEEN = "activation_variation"


class ActivationView(NamedTuple):
    """What a method does to the activations of each class of a batch, by class."""

    present: jax.Array  # [C] bool, whether the class is in the batch; the others are zero where it isn't
    norm: jax.Array  # [C], E‖a‖
    relative: jax.Array  # [C], E‖δ‖/E‖a‖; 0 where E‖a‖ is 0
    gain: jax.Array  # [C], E‖ã‖/E‖a‖ − 1; 0 where E‖a‖ is 0
    loss_change: jax.Array  # [C], mean perturbed loss minus mean plain loss


def activation_variation(
    methods: Any,
    model: Any,
    params: Any,
    batch: Batch,
    *,
    site: str,
    num_classes: int,
    states: tuple | None = None,
    stats: Any = None,
    class_counts: ArrayLike | None = None,
    num_examples: int | None = None,
    replays: int = 1,
    key: jax.Array | None = None,
    step: ArrayLike | None = None,
    progress: ArrayLike | None = None,
    epoch: ArrayLike | None = None,
) -> ActivationView:
    """How far one method, or several that act together, move the activations at `site`. Jits.

    Args:
      methods: a perturbation, or a sequence of them; optax links among them change no activation and are left out.
      site: any of the model's, or "last_stage".
      model, params, stats: as for `pj.objective`; BatchNorm is in training mode.
      states: of the perturbations; None: initial ones (a split by accuracy then leaves all classes alone).
      class_counts, num_examples, replays: as for `pj.objective`. key, step, progress, epoch: as for its call. At the first step of an epoch,
        step 0 too, an LPA with several sites compares them and perturbs none: for what it does, give states in which they have been
        compared and a later step.

    Raises:
      ValueError: a method that changes the number of samples (two views).

    >>> import perturbjax as pj
    >>> net = {"stage1": lambda w, x: x, "logits": lambda w, a: a @ w}
    >>> batch = pj.batch(3 * jnp.eye(3), jnp.arange(3))
    >>> view = activation_variation(pj.lpa(bound=0.6, beta=0.5, direction=1.0), net, jnp.eye(3), batch, site="stage1", num_classes=3)
    >>> print(view.norm, view.relative.round(2), (view.gain < 0).sum(), (view.loss_change > 0).sum())
    [3. 3. 3.] [0.1 0.1 0.1] 3 3
    """
    links, _ = split_methods(methods)
    labels = jnp.asarray(batch.labels)
    look = Perturbation(
        site, lambda context: (), lambda flow, rest, state, context: (flow, state, {"value": flow.value}), name=_SEEN
    )
    settings = dict(num_classes=num_classes, class_counts=class_counts, num_examples=num_examples, replays=replays)
    place = dict(key=jax.random.key(0) if key is None else key, step=step, progress=progress, epoch=epoch, stats=stats)

    def run(links: tuple, states: tuple) -> tuple[jax.Array, jax.Array]:
        """(values at the site [B, ...], losses [B])."""
        out = objective(model, (*links, look), **settings)(params, (*states, ()), batch, **place)[1]
        return wide(out.metrics[f"{_SEEN}/value"]), out.losses

    if states is None:
        states = objective(model, links, **settings).init(params, jnp.asarray(batch.inputs), stats=stats)
    plain, losses = run((), ())
    moved, after = run(links, states)
    if moved.shape != plain.shape or after.shape != losses.shape:
        raise ValueError(
            f"activation_variation needs methods that keep the samples of the batch, got {moved.shape} at {site!r} for {plain.shape}. "
            "Leave out those that make more of them."
        )
    columns = [group_norm(plain), group_norm(moved - plain), group_norm(moved), (after - losses).astype(plain.dtype)]
    norm, change, length, rise = class_mean(jnp.stack(columns, axis=1), labels, num_classes).T
    ratio = lambda x: jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1), 0)
    return ActivationView(class_count(labels, num_classes) > 0, norm, ratio(change), ratio(length - norm), rise)


def activation_variations(
    methods: Any,
    model: Any,
    params: Any,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    site: str,
    num_classes: int,
    stats: Any = None,
    batch_size: int = 64,
    batches: int | None = None,
    replays: int = 1,
    seed: int = 0,
) -> Variations:
    """What a method does to the classes' activations over a data set, at fixed parameters; see `gradient_variations`."""
    look = functools.partial(activation_variation, methods, model, params, site=site)
    place = dict(num_classes=num_classes, stats=stats, batch_size=batch_size, batches=batches, replays=replays, seed=seed)
    return over_batches(look, methods, model, params, inputs, labels, **place)
