"""perturbjax.gradient.groups: for every method of the loss, the classes' parts of the gradient add up to that of the batch.

PCGrad, GradDrop, DP-SGD and the gradient view rest on it: a loss that is divided by the weights of its samples breaks it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests import test_contract as contract

SETTINGS = {"ldam": dict(drw=True), "focal": dict(granularity="category"), "class_weighting": dict(kind="effective")}
FAST = ("ldam", "focal", "self_paced", "class_weighting", "lpg")


def of_the_loss(make):
    return make is not pj.ce and not hasattr(make(**SETTINGS.get(make.__name__, {})), "update")


METHODS = [
    pytest.param(f, id=f.__name__, marks=[] if f.__name__ in FAST else pytest.mark.slow)
    for f in contract.METHODS
    if of_the_loss(f)
]


@pytest.mark.parametrize("make", METHODS)
def test_the_classes_parts_of_the_gradient_add_up_to_the_batch_s(make):
    """In the last part of training, when weights that are deferred act."""
    params, stats, batch = contract.problem()
    settings = SETTINGS.get(make.__name__, {})
    made = pj.objective(
        contract.LINE, pj.chain(make(**settings)), num_classes=contract.CLASSES, class_counts=contract.COUNTS,
        num_examples=115 + contract.BATCH, num_domains=contract.DOMAINS, replays=8,
    )  # fmt: skip
    states = made.init(params, batch.inputs, stats=stats)
    place = dict(key=jax.random.key(2), progress=0.93, epoch=2, stats=stats)
    rows = jax.nn.one_hot(batch.labels, contract.CLASSES).T

    @jax.jit
    def gradients(params):
        of = lambda row: jax.grad(made, has_aux=True)(params, states, batch, weights=row, **place)[0]
        return jax.vmap(of)(jnp.concatenate([rows, jnp.zeros_like(rows[:1]), jnp.ones_like(rows[:1])]))

    for name, found in gradients(params).items():
        parts, penalty, whole = found[:-2], found[-2], found[-1]
        total = (parts - penalty[None]).sum(0) + penalty
        np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-5 + 1e-5 * float(jnp.abs(whole).max()), err_msg=name)
