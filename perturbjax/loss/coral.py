r"""Deep CORAL: a penalty for domains whose features differ in mean or covariance.

    L + γ · mean_{d<e} ( mean_j (μ_d − μ_e)²_j + mean_{jk} (Σ_d − Σ_e)²_{jk} )          d, e: the domains in the batch

μ_d and Σ_d are a domain's batch mean and covariance (divided by n_d − 1) of the features; gradients flow through both. Over pairs of
m domains the mean of ‖x_d − x_e‖² is 2/(m − 1) · Σ_d ‖x_d − x̄‖², which is what is computed: no pair is ever formed. The penalty
raises the loss of the whole batch; that it counts as corpus level is our reading (the taxonomy has no level of domains).
Source: Sun and Saenko, "Deep CORAL", ECCV 2016 workshops, which has no mean term; DomainBed (Gulrajani and Lopez-Paz, ICLR 2021) does.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_domain_count, check_number, domains_of
from perturbjax.classes import AxisName, class_count, class_mean, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def coral_penalty(
    features: jax.Array, domains: jax.Array, *, num_domains: int, mean_term: bool = True, axis_name: AxisName = None
) -> jax.Array:
    """The mean over pairs of domains of the squared differences of their means and covariances: a number.

    Domains with less than 2 samples in the batch are left out; with less than 2 domains left it is 0.

    Args:
      features: [B, d]. domains: [B] integers in 0..D-1; others (padding) belong to no domain.
      num_domains: D. mean_term: False compares covariances only, as in Deep CORAL.
      axis_name: mapped axis that the batch is spread over.

    >>> print(coral_penalty(jnp.array([[0.0], [2.0], [1.0], [1.0]]), jnp.array([0, 0, 1, 1]), num_domains=2))
    4.0
    """
    if features.ndim != 2 or domains.shape != features.shape[:1]:
        raise ValueError(
            f"coral_penalty needs features [B, d] and domains [B], got {features.shape} and {domains.shape}. "
            "Write features.reshape(B, -1), or take them after the pooling."
        )
    a = wide(features)
    member = jax.nn.one_hot(domains, num_domains, dtype=a.dtype)
    count = class_count(domains, num_domains, axis_name=axis_name, dtype=a.dtype)
    mean = class_mean(a, domains, num_domains, axis_name=axis_name)
    centred = a - mean.at[domains].get(mode="clip")
    scatter = jnp.einsum("bd,bi,bj->dij", member, centred, centred, precision=jax.lax.Precision.HIGHEST)
    scatter = scatter if axis_name is None else jax.lax.psum(scatter, axis_name)
    covariance = scatter / jnp.maximum(count - 1, 1)[:, None, None]
    here = (count >= 2).astype(a.dtype)
    present = here.sum()

    def spread(values: jax.Array) -> jax.Array:
        """The mean over pairs of the squared difference of their `values` [D, ...], averaged over entries."""
        flat = values.reshape(num_domains, -1)
        centre = here @ flat / jnp.maximum(present, 1)
        return 2 / jnp.maximum(present - 1, 1) * jnp.sum(here * jnp.mean((flat - centre[None]) ** 2, axis=1))

    return spread(covariance) + spread(mean) if mean_term else spread(covariance)


@method(
    target="loss", direction=(+1,), inference="prior", granularity="corpus",
    cite="Sun and Saenko, ECCV Workshops 2016", off=dict(weight=0.0),
)  # fmt: skip
def coral(*, weight: ArrayLike = 1.0, mean_term: bool = True, site: str = "features") -> Perturbation:
    """CORAL: adds γ = `weight` times the mean squared difference of the domains' feature means and covariances.

    Needs the domain of each sample, side["domain"].

    Args:
      weight: γ; DomainBed searches 0.1 to 10.
      mean_term: compare the means as well (DomainBed); False: covariances only (Deep CORAL).
      site: of the features, [B, d].

    Metric: penalty, before the weight.
    """
    check_number("coral", low=0, weight=weight)

    def init(context: Context) -> tuple:
        check_domain_count("coral", context.num_domains)
        if context.site_shapes is not None and len(context.site_shapes[context.site]) != 2:
            raise ValueError(f"coral needs a site [B, d], got {context.site_shapes[context.site]}. Write site='features'.")
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        penalty = coral_penalty(
            flow.value, domains_of("coral", flow.side), num_domains=context.num_domains, mean_term=mean_term,
            axis_name=context.axis_name,
        )  # fmt: skip
        # The same number for every sample: the loss is the mean over the batch.
        added = (jnp.asarray(weight, penalty.dtype) * penalty).astype(flow.penalty.dtype)
        return flow._replace(penalty=flow.penalty + added[None]), state, {"penalty": penalty}

    return Perturbation(site, init, apply, needs=("domains",))
