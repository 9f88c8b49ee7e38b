r"""Training dynamics of every sample, recorded on the way: what each one's logits were while it was trained on.

For a sample with given label y and logits u each time it is in a batch, the means over training of

    loss           −log p_y
    margin         u_y − max_{j≠y} u_j                                     (its mean is the area under the margin, AUM)
    gradient_norm  ‖p − ŷ‖₂                                                (over early training: EL2N)
    logpert        ‖v‖₁ = max(0, log((1−λ)/λ) − (u_y − logsumexp_{j≠y} u_j))   LogPert's exact perturbation: what it takes to
                                                                           lift p_y to 1 − λ
    probability    p, all classes

Samples whose label is wrong are learnt late or never, and need large perturbations until then: the label audit ranks by that.

The recorder is a link that changes nothing. It costs a scatter of B rows per step, and its tables are state: checkpointed, resumed, the
same on any number of devices.

Sources: Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020 (margin). Paul, Ganguli,
Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021 (gradient norm). Yao and Wu, "A Taxonomy for Learning with Perturbation and
Algorithms", 2022, sections 5.1 and 6.3 (accumulated ‖v‖₁).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax import table
from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation

SCALARS = ("loss", "margin", "gradient_norm", "logpert")


class Dynamics(NamedTuple):
    """Sums over the times each of the N samples was trained on."""

    count: jax.Array  # [N] float32
    loss: jax.Array  # [N] float32
    margin: jax.Array  # [N] float32
    gradient_norm: jax.Array  # [N] float32
    logpert: jax.Array  # [N] float32
    probability: jax.Array  # [N, C] float32, or [N, 0] if not kept


def sample_signals(logits: jax.Array, labels: jax.Array, weight: float = 0.175) -> dict[str, jax.Array]:
    """{"loss", "margin", "gradient_norm", "logpert"}, each [B], and "probability" [B, C], of logits [B, C] and labels [B].

    weight: LogPert's λ, in (0, 1).
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p, own = jnp.exp(log_p), jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    pick = lambda x: jnp.sum(jnp.where(own, x, 0), axis=-1)
    others = jnp.where(own, -jnp.inf, logits)
    wanted = jnp.log((1 - weight) / weight)
    return {
        "loss": -pick(log_p),
        "margin": pick(logits) - others.max(-1),
        "gradient_norm": jnp.linalg.norm(p - own.astype(p.dtype), axis=-1),
        "logpert": jnp.maximum(0, wanted - (pick(logits) - jax.nn.logsumexp(others, axis=-1))),
        "probability": p,
    }


def dynamics(*, weight: float = 0.175, probabilities: bool = True) -> Perturbation:
    """A link that records every sample's training dynamics and changes nothing. Needs num_examples; put it first in the chain.

    Args:
      weight: LogPert's λ, in (0, 1). probabilities: keep the sums of p, N·C numbers, too.

    Mixed samples (mixup) count for the one whose index the flow has.
    """
    check_number("dynamics", low=0, high=1, open_low=True, weight=weight)

    def init(context: Context) -> Dynamics:
        if context.num_examples is None:
            raise ValueError("dynamics needs num_examples, got none. Write pj.objective(..., num_examples=len(labels)).")
        zeros = lambda *shape: jnp.zeros((context.num_examples, *shape), jnp.float32)
        return Dynamics(zeros(), zeros(), zeros(), zeros(), zeros(), zeros(context.num_classes if probabilities else 0))

    def apply(flow: Flow, rest, state: Dynamics, context: Context):
        found = sample_signals(jax.lax.stop_gradient(flow.value), flow.labels, weight)
        values = {"count": jnp.ones_like(found["loss"]), **found}
        if not probabilities:
            del values["probability"]
        added = {
            name: table.add(getattr(state, name), flow.index, x, axis_name=context.axis_name) for name, x in values.items()
        }
        return flow, state._replace(**added), {}

    return Perturbation("logits", init, apply, needs=("index",), name="dynamics")


def mean_dynamics(state: Dynamics) -> dict[str, Any]:
    """The means over training, each [N] (probability [N, C]), as numpy arrays; nan for samples that were never trained on."""
    count = np.asarray(state.count, np.float64)
    count = np.where(count > 0, count, np.nan)
    means = {name: np.asarray(getattr(state, name), np.float64) / count for name in SCALARS}
    return means | {"probability": np.asarray(state.probability, np.float64) / count[:, None]}
