r"""Domain-adversarial training (DANN): features from which a classifier of domains, trained beside, can't tell the domain.

    w descends  L(w) − λ · mean_i ℓ_i^dom(a_i; θ),    θ descends  mean_i ℓ_i^dom(sg(a_i); θ),    ℓ^dom = −log softmax(D_θ(a))_{d_i}

This is gradient reversal: a penalty −λ·ℓ^dom with θ constant has the gradient that the reversal layer gives, and the shown loss
contains it with this sign. D_θ is a small ReLU network; θ is this link's state and takes a step of Adam in every step of training, by
the features as they are before it. Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016. DomainBed's code
alternates instead: one step for w (the first one), then one for θ; its β₂ is 0.9, and it can add g·‖∂ℓ_i^dom/∂a_i‖² to ℓ_i^dom,
for both. Corpus level is our reading (the taxonomy has no level of domains).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_domain_count, check_number, domains_of
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


class DANNState(NamedTuple):
    """The classifier of domains."""

    layers: tuple  # ((W [d_in, d_out], b [d_out]) of each layer)
    moments: Any  # Adam's state


def discriminator_init(key: jax.Array, sizes: tuple[int, ...], dtype: Any = jnp.float32) -> tuple:
    """((W, b), ...) of a network with these layer sizes (features, hidden ones, D): LeCun-normal W, zero b."""
    draw = jax.nn.initializers.lecun_normal()
    pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
    keys = jax.random.split(key, len(pairs))
    return tuple((draw(k, pair, dtype), jnp.zeros([pair[1]], dtype)) for k, pair in zip(keys, pairs, strict=True))


def domain_losses(layers: tuple, features: jax.Array, domains: jax.Array) -> jax.Array:
    """ℓ^dom [B] of features [B, d] and domains [B]: cross entropy of a ReLU network; 0 for domains of no class (padding)."""
    x = wide(features)
    for number, (kernel, bias) in enumerate(layers):
        x = (x if number == 0 else jax.nn.relu(x)) @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None]
    return -jnp.sum(jax.nn.one_hot(domains, x.shape[-1], dtype=x.dtype) * jax.nn.log_softmax(x), axis=-1)


@method(
    target="loss", direction=(), inference="adversarial", granularity="corpus",
    cite="Ganin et al., JMLR 2016", off=dict(weight=0.0),
)  # fmt: skip
def dann(
    *,
    weight: ArrayLike = 1.0,
    step_size: ArrayLike = 1e-3,
    decay: ArrayLike = 0.5,
    width: int = 256,
    depth: int = 3,
    site: str = "features",
    square_decay: ArrayLike = 0.999,
    gradient_penalty: ArrayLike | None = None,
) -> Perturbation:
    """DANN: the features climb the loss of a classifier of domains, which is trained beside.

    Needs the domain of each sample, side["domain"].

    Args:
      weight: λ.
      step_size: of the classifier's Adam; DomainBed has that of the network (5e-5 with a pretrained ResNet-50).
      decay, square_decay: β₁ and β₂ of that Adam (DomainBed: 0.9 for β₂).
      gradient_penalty: g, of the squared gradient of each ℓ_i^dom by the features (DomainBed's grad_penalty, which it searches in
        10^−2…10^1); None: no penalty, and no second derivative to pay for.
      width, depth: hidden units and linear layers of the classifier. It begins the same for all seeds.
      site: of the features; other sites than vectors are flattened.

    State: the classifier. Metric: domain_loss; a classifier that knows nothing has log D.
    """
    check_number("dann", low=0, weight=weight, step_size=step_size)
    check_number("dann", low=0, high=0.999, decay=decay)
    check_number("dann", low=0, high=1 - 1e-6, square_decay=square_decay)
    check_number("dann", low=0, gradient_penalty=gradient_penalty)
    check_number("dann", low=1, width=width, depth=depth)
    adam = optax.scale_by_adam(b1=decay, b2=square_decay)

    def penalised(layers: tuple, features: jax.Array, domains: jax.Array, losses: jax.Array) -> jax.Array:
        """ℓ^dom + g·‖∂ℓ^dom/∂a‖² [B]; `losses`: the first of the two."""
        if gradient_penalty is None:
            return losses
        slope = jax.grad(lambda a: domain_losses(layers, a, domains).sum())(features)
        return losses + jnp.asarray(gradient_penalty, losses.dtype) * jnp.sum(slope**2, axis=-1)

    def init(context: Context) -> DANNState:
        num_domains = check_domain_count("dann", context.num_domains)
        shape = context.site_shapes[context.site]
        layers = discriminator_init(
            jax.random.key(0), (math.prod(shape[1:]), *[width] * (depth - 1), num_domains), context.dtype
        )
        return DANNState(layers, adam.init(layers))

    def apply(flow: Flow, rest: Rest, state: DANNState, context: Context):
        domains = domains_of("dann", flow.side)
        features = wide(flow.value).reshape(flow.value.shape[0], -1)
        held = jax.lax.stop_gradient(state.layers)
        losses = domain_losses(held, features, domains)
        climbed = jnp.asarray(weight, losses.dtype) * penalised(held, features, domains, losses)
        flow = flow._replace(penalty=flow.penalty - climbed.astype(flow.penalty.dtype))
        fixed = jax.lax.stop_gradient(features)

        def own(layers: tuple) -> jax.Array:
            return penalised(layers, fixed, domains, domain_losses(layers, fixed, domains)).mean()

        grads = jax.grad(own)(held)
        if context.axis_name is not None:
            grads = jax.lax.pmean(grads, context.axis_name)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            moved, moments = adam.update(grads, state.moments)
        layers = jax.tree.map(lambda w, u: w - jnp.asarray(step_size, w.dtype) * u.astype(w.dtype), state.layers, moved)
        return flow, DANNState(layers, moments), {"domain_loss": losses.mean()}

    return Perturbation(site, init, apply, needs=("domains",))
