r"""ZLA: logit adjustment by a prior on two levels, groups of classes and classes within a group.

    u_c + τ·(log π_{c|G(c)} + log ρ_{G(c)})

G is the seen or the unseen group, ρ_seen/ρ_unseen = `ratio`; π_{c|seen} is by the counts, π_{c|unseen} uniform. For zero-shot
learning, unseen classes have generated samples only; under a long tail, the rare classes take their place. LA is one group.
Source: Chen et al., "Zero-shot Logit Adjustment", IJCAI 2022 (its logits are cosines over 0.04: a cosine head of scale 25).
The taxonomy's Table 1 has it at the sample level; the shift is the same vector for all samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, is_traced
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.split import by_frequency

HALF = 0.5  # of the classes are seen where nothing is said, and the counts agree


def zla_delta(class_counts: ArrayLike, unseen: ArrayLike, *, ratio: ArrayLike = 1000.0) -> jax.Array:
    """log π_{c|G(c)} + log ρ_{G(c)}: [C], the log of a distribution.

    Args:
      class_counts: [C] training samples of each class; those of unseen classes don't matter.
      unseen: [C] bool. ratio: ρ_seen/ρ_unseen > 0.

    Raises:
      ValueError: a seen class without samples.

    >>> print(jnp.exp(zla_delta(jnp.array([30, 10, 0]), jnp.array([False, False, True]), ratio=4.0)).round(3))
    [0.6 0.2 0.2]
    """
    if not is_traced((class_counts, unseen)):
        empty = np.flatnonzero((np.asarray(class_counts) <= 0) & ~np.asarray(unseen))
        if empty.size:
            raise ValueError(
                f"zla needs at least one sample of every seen class, got none of class {empty[0]}. "
                f"Name the class as unseen: unseen=[{empty[0]}]."
            )
    n, apart = jnp.asarray(class_counts, float), jnp.asarray(unseen)
    total, number = jnp.sum(jnp.where(apart, 0, n)), jnp.maximum(jnp.sum(apart), 1).astype(n.dtype)
    within = jnp.where(apart, -jnp.log(number), jnp.log(jnp.where(apart, 1, n) / jnp.where(total > 0, total, 1)))
    log_ratio = jnp.log(jnp.asarray(ratio, n.dtype))
    return within + jnp.where(apart, jax.nn.log_sigmoid(-log_ratio), jax.nn.log_sigmoid(log_ratio))


def _check_that_counts_tell(class_counts: ArrayLike, rare: jax.Array) -> None:
    """Raises ValueError unless the rare classes [C] have at most half as many samples as the others, by the mean of a class."""
    if is_traced((class_counts, rare)):
        return
    n, apart = np.asarray(class_counts, float), np.asarray(rare)
    seen, unseen = n[~apart].mean() if (~apart).any() else 0.0, n[apart].mean()
    if 2 * unseen > seen:
        raise ValueError(
            f"zla needs to know which classes are unseen, got counts that don't tell: the rarer half has {unseen:.4g} samples a class, the "
            f"other {seen:.4g}. Write zla(unseen=[{np.flatnonzero(apart)[0]}, ...]), or zla(share=0.5) for the most frequent half as the "
            "seen classes (the others are then taken as all but unseen, and are learnt badly if they aren't)."
        )


@method(
    target="logit", direction=(+1, -1), inference="prior", granularity="corpus",
    cite="Chen et al., IJCAI 2022", off=dict(tau=0.0),
)  # fmt: skip
def zla(
    *, ratio: ArrayLike = 1000.0, tau: ArrayLike = 1.0, share: ArrayLike | None = None, unseen: tuple[int, ...] | None = None
) -> Perturbation:
    """ZLA: logit adjustment by a prior on two levels, seen and unseen classes. Evaluation uses the plain logits.

    Args:
      ratio: ρ_seen/ρ_unseen. tau: factor of the whole log prior, as in LA.
      share: of the classes, the most frequent ones, which are seen; 1 for all (LA). None: half of them, if the others are rare.
      unseen: the unseen (synthetic) classes, by number. None: those that `share` leaves.

    Raises:
      ValueError: at init, where neither is given and the counts don't tell: the rarer half has more than half as many samples a class as
        the other. Taken for unseen, such classes are hardly learnt (the prior says that they almost never come).
    """
    check_number("zla", low=0, open_low=True, ratio=ratio)
    check_number("zla", tau=tau)
    check_number("zla", low=0, high=1, share=share)
    split = by_frequency(tau=HALF if share is None else share)

    def shift(context: Context) -> jax.Array:
        if unseen is None:
            return zla_delta(context.class_counts, split.direction((), context) > 0, ratio=ratio)
        wrong = [c for c in unseen if not 0 <= c < context.num_classes]
        if wrong:
            raise ValueError(f"zla needs unseen classes in 0..{context.num_classes - 1}, got {wrong[0]}. Leave it out.")
        return zla_delta(context.class_counts, np.isin(np.arange(context.num_classes), unseen), ratio=ratio)

    def init(context: Context) -> tuple:
        if unseen is None and share is None:
            _check_that_counts_tell(context.class_counts, split.direction((), context) > 0)
        shift(context)  # a seen class without samples, or a class that isn't there, is found out here
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        delta = shift(context)
        delta = (jnp.asarray(tau, delta.dtype) * delta).astype(flow.value.dtype)
        return flow._replace(value=flow.value + delta[None]), state, {}

    return Perturbation("logits", init, apply, needs=("class_counts",))
