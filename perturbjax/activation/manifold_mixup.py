r"""Manifold mixup: mixup at a site that is drawn anew for each batch.

    site s uniform over the given ones;   ã⁽ˢ⁾_i = λ a⁽ˢ⁾_i + (1 − λ) a⁽ˢ⁾_j,   ỹ_i = λ y_i + (1 − λ) y_j,   λ ~ Beta(α, α)

The loss is the cross entropy with ỹ, as in the paper. The authors' code takes the binary cross entropy of p = softmax(u), loss="binary":

    −(1/C) Σ_c ( ỹ_c log p_c + (1 − ỹ_c) log(1 − p_c) ),   whose gradients are about C times smaller

Source: Verma et al., "Manifold Mixup", ICML 2019, and its code; LPA eq. 4.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.feature.mixup import draw_mixing, mix, mix_side
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method

_DRAW = "manifold_mixup"  # in flow.extra: the batch's site, λ and pairs, drawn for all by the link that comes first


def softmax_binary_cross_entropy(log_p: jax.Array, targets: jax.Array) -> jax.Array:
    """−(1/C) Σ_c (y_c log p_c + (1 − y_c) log(1 − p_c)): [B], from log softmax(u) and y [B, C].

    >>> print(softmax_binary_cross_entropy(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1.0, 0.0]])).round(3))
    [0.693]
    """
    tiny = jnp.finfo(log_p.dtype).tiny  # where p rounds to 1: log(1 − p) stays finite, its gradient is zero, as in the code
    others = jnp.log(jnp.maximum(-jnp.expm1(log_p), tiny))
    y = targets.astype(log_p.dtype)
    return -jnp.mean(y * log_p + (1 - y) * others, axis=-1)


@method(
    target=("activation", "label"), direction=(+1, -1), inference="prior", granularity="sample",
    cite="Verma et al., ICML 2019", off=None,
)  # fmt: skip
def manifold_mixup(
    *, alpha: ArrayLike = 2.0, sites: tuple[str, ...] = ("input", "stage1", "stage2"), loss: Literal["ce", "binary"] = "ce"
) -> tuple[Perturbation, ...]:
    """Manifold mixup with λ ~ Beta(α, α), α = `alpha`, at one of `sites`, drawn for each batch.

    loss: "ce", or "binary" as in the authors' code: it replaces the cross entropy, so it comes before the other links of the loss.
    Per-device code mixes within each device's batch, as in `mixup`.
    """
    check_number("manifold_mixup", low=0, open_low=True, alpha=alpha)
    check_choice("manifold_mixup", "loss", loss, ("ce", "binary"))
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

    def binary(flow: Flow, rest: Rest, state: tuple, context: Context):
        losses = softmax_binary_cross_entropy(flow.trace["prediction"], flow.targets)
        return flow._replace(value=losses.astype(flow.value.dtype)), state, {}

    links = tuple(link(number, site) for number, site in enumerate(sites))
    return links if loss == "ce" else (*links, Perturbation("loss", lambda context: (), binary))
