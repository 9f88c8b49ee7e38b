"""The work of searches, by XLA's own count of the compiled step: what methods.md calls ideal, no pass more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.models import create

B, C, SIZE, STEPS = 32, 10, 16, 3
NET = create("cnn", num_classes=C, mean=(0.5,), std=(0.25,), width=16)
VARIABLES = jax.eval_shape(lambda: NET.init(jax.random.key(0), jnp.zeros([1, SIZE, SIZE, 1]), train=False))
IMAGES = jax.ShapeDtypeStruct((B, SIZE, SIZE, 1), jnp.float32)


def flops(function, *arguments):
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def step_flops(links):
    """Of loss and gradient on a batch."""
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    made = pj.objective(NET, links, num_classes=C, class_counts=np.full(C, 9), num_examples=90, replays=8)
    states = jax.eval_shape(lambda p, s, x: made.init(p, x, stats=s), params, stats, IMAGES)
    loss = lambda p, st, s, x, y: made(p, st, pj.Batch(x, y), stats=s, step=1, progress=0.5, epoch=1)[0]
    labels = jax.ShapeDtypeStruct((B,), jnp.int32)
    return flops(jax.grad(loss), params, states, stats, IMAGES, labels)


def share_after(site):
    """f: the work of the forward pass behind the site, over that of the whole."""
    cut, (params, stats) = pj.line(NET), (VARIABLES["params"], VARIABLES["batch_stats"])
    run = lambda start, stop: lambda p, s, v: cut.slice(p, v, start, stop, stats=s, train=True, key=jax.random.key(0))[0]
    value = jax.eval_shape(run("input", site), params, stats, IMAGES) if site != "input" else IMAGES
    return flops(run(site, "logits"), params, stats, value) / flops(run("input", "logits"), params, stats, IMAGES)


@pytest.fixture(scope="module")
def plain():
    return step_flops(())


@pytest.mark.parametrize("site, rank", [("input", None), ("stage1", None), ("stage1", 2), ("stage2", None), ("features", None)])
def test_lpa_costs_one_and_two_thirds_of_the_part_behind_its_site_for_each_step(plain, site, rank):
    """1 + (2T/3)·f; with a rank, the decompositions on top (library calls, which XLA doesn't count)."""
    ideal = 1 + 2 * STEPS / 3 * share_after(site)
    assert step_flops(pj.lpa(site=site, direction=1.0, num_steps=STEPS, rank=rank)) <= 1.1 * ideal * plain


def test_adversarial_training_costs_the_same_by_sample_and_by_class(plain):
    """1 + 2T/3, not 1 + T."""
    sample = step_flops(pj.adversarial_training(num_steps=STEPS, random_starts=False))
    by_class = step_flops(pj.cuat(num_steps=STEPS, update="before"))
    assert sample <= 1.05 * (1 + 2 * STEPS / 3) * plain
    assert by_class == pytest.approx(sample, rel=0.03)


@pytest.mark.parametrize("make", [pj.uat, pj.cuat, pj.free_at])
def test_deltas_that_are_updated_after_the_step_cost_next_to_nothing(plain, make):
    assert step_flops(make()) <= 1.05 * plain
