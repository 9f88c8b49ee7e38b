r"""Mixup across domains: every sample is mixed with one of the next domain in a ring drawn anew for each batch.

    x̃_i = λ_d x_i + (1 − λ_d) x_j,   ỹ_i = λ_d y_i + (1 − λ_d) y_j,   d = d_i,  d_j = next(d),  λ_d ~ Beta(α, α) once per domain

j runs through the samples of the next domain, each as often as the others (once where domains have equal shares of the batch). λ is
replaced by max(λ, 1 − λ) as in `mixup`: the ring is drawn in both directions alike, so pairs mean the same, and `labels` and domain
stay the dominant sample's. A batch of one domain mixes within it. Source: mixup (Zhang et al., ICLR 2018) between domains, as in
Wang et al., "Heterogeneous Domain Generalization via Domain Mixup", ICASSP 2020, and DomainBed.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_domain_count, check_number, domains_of
from perturbjax.classes import class_count
from perturbjax.feature.mixup import mix, mix_side
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def ring_partners(key: jax.Array, domains: jax.Array, *, num_domains: int) -> jax.Array:
    """[B]: for each sample the position of its partner, a sample of the next domain of a random ring of those in the batch.

    domains: [B] integers in 0..D-1, D = num_domains.
    """
    ring_key, order_key = jax.random.split(key)
    count = class_count(domains, num_domains, dtype=jnp.result_type(float)).astype(jnp.int32)
    place = jax.random.permutation(ring_key, jnp.arange(num_domains, dtype=jnp.int32))  # of each domain in the ring
    # Steps along the ring from d to e, 1..D; absent domains are never next, d itself is if it is alone.
    steps = (place[None, :] - place[:, None] - 1) % num_domains + 1
    following = jnp.argmin(jnp.where(count[None, :] > 0, steps, num_domains + 1), axis=1).astype(jnp.int32)
    # The batch sorted by domain, in random order within each: rank r of domain e stands at start[e] + r.
    shuffled = jax.random.permutation(order_key, jnp.arange(domains.shape[0], dtype=jnp.int32))
    order = shuffled[jnp.argsort(domains[shuffled], stable=True)]
    start = jnp.cumsum(count) - count
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype)) - start[domains]
    target = following[domains]
    return order[start[target] + rank % jnp.maximum(count[target], 1)]


@method(
    target=("feature", "label"), direction=(+1, -1), inference="prior", granularity="sample",
    cite="Wang et al., ICASSP 2020", off=None,
)  # fmt: skip
def domain_mixup(*, alpha: ArrayLike = 0.2, site: str = "input") -> Perturbation:
    """Mixup between domains with λ ~ Beta(α, α), α = `alpha`, per domain, at the input or at another `site`.

    Needs the domain of each sample, side["domain"]. Per-device code mixes within each device's batch.
    """
    check_number("domain_mixup", low=0, open_low=True, alpha=alpha)

    def init(context: Context) -> tuple:
        check_domain_count("domain_mixup", context.num_domains)
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        domains = domains_of("domain_mixup", flow.side)
        pair_key, weight_key = jax.random.split(context.key)
        partner = ring_partners(pair_key, domains, num_domains=context.num_domains)
        drawn = jax.random.beta(weight_key, alpha, alpha, [context.num_domains])
        weight = jnp.maximum(drawn, 1 - drawn)[domains]  # [B]

        if not jnp.issubdtype(flow.value.dtype, jnp.floating):
            raise ValueError(
                f"domain_mixup needs floating values, got {flow.value.dtype}. Mix at a later site: site='features'."
            )
        value, targets = (mix(values, weight, partner) for values in (flow.value, flow.targets))
        side = mix_side(flow.side, weight[:, None], partner)
        return flow._replace(value=value, targets=targets, side=side), state, {"weight": weight.mean()}

    return Perturbation(site, init, apply, needs=("domains",))
