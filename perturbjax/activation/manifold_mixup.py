r"""Manifold mixup: mixup at a site that is drawn anew for each batch.

    site s uniform over the given ones;   ã⁽ˢ⁾_i = λ a⁽ˢ⁾_i + (1 − λ) a⁽ˢ⁾_j,   ỹ_i = λ y_i + (1 − λ) y_j,   λ ~ Beta(α, α)

The loss is the cross entropy with ỹ, as in the paper; the authors' code takes a binary cross entropy of softmax(u) instead.
Source: Verma et al., "Manifold Mixup", ICML 2019; LPA eq. 4.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method
from perturbjax.feature.mixup import draw_mixing, mix, mix_side

_DRAW = "manifold_mixup"  # in flow.extra: the batch's site, λ and pairs, drawn for all by the link that comes first


@method(
    target=("activation", "label"), direction=(), inference="prior", granularity="sample",
    cite="Verma et al., ICML 2019", off=None,
)  # fmt: skip
def manifold_mixup(
    *, alpha: ArrayLike = 2.0, sites: tuple[str, ...] = ("input", "stage1", "stage2")
) -> tuple[Perturbation, ...]:
    """Manifold mixup with λ ~ Beta(alpha, alpha) at one of `sites`, drawn for each batch.

    Per-device code mixes within each device's batch, as in `mixup`.
    """
    check_number("manifold_mixup", low=0, open_low=True, alpha=alpha)
    if not sites or isinstance(sites, str):
        raise ValueError(f"manifold_mixup needs a tuple of sites, got {sites!r}. Write sites=('input', 'stage1').")

    def link(number: int, site: str) -> Perturbation:
        def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
            if _DRAW not in flow.extra:
                site_key, mix_key = jax.random.split(context.key)
                drawn = (
                    jax.random.randint(site_key, [], 0, len(sites)),
                    *draw_mixing(mix_key, flow.labels.shape[0], alpha=alpha),
                )
                flow = flow._replace(extra={**flow.extra, _DRAW: drawn})
            chosen, weight, partner = flow.extra[_DRAW]
            here = jnp.where(chosen == number, weight, 1)  # λ = 1 leaves this site alone
            mixed = flow._replace(
                value=mix(flow.value, here, partner),
                targets=mix(flow.targets, here, partner),
                side=mix_side(flow.side, here, partner),
            )
            return mixed, state, {}

        return Perturbation(site, lambda context: (), apply)

    return tuple(link(number, site) for number, site in enumerate(sites))
