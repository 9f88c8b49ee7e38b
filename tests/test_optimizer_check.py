"""Links of the optimiser that throw each other's work away are found: by name in a row, in any optimiser by watching one update."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.optimizer_check import check_links
from perturbjax.optimizer_link import OptimizerLink
from perturbjax.training import device_data, init_state, split_methods
from tests.training.problem import NUMBERS, dataset, recipe

pytestmark = pytest.mark.optax_promotes

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.ones(3)}
LINKS = {f.__name__: f for f in vars(pj).values() if hasattr(f, "coordinates") and hasattr(f(), "update")}
REPLACING = [name for name, f in LINKS.items() if f.gradient == "replaces"]
TRANSFORMING = [name for name, f in LINKS.items() if f.gradient == "transforms"]
SGD = optax.sgd(0.1)


def test_every_link_says_what_it_does_with_the_gradient():
    assert {name for name in LINKS if LINKS[name].gradient is None} == set()
    assert set(REPLACING) >= {"sam", "asam", "gsam", "amp", "looksam", "esam", "pugd", "rts", "pcgrad", "graddrop", "dp_sgd"}
    assert set(TRANSFORMING) >= {"gradient_clipping", "gradient_noise", "ngd"}


@pytest.mark.parametrize("name", LINKS)
def test_what_a_link_says_of_itself_is_what_it_does(name):
    """It asks for gradients if it replaces the given one, hands the very arrays on if it keeps it, and else makes others of them."""
    link = LINKS[name]()
    assert isinstance(link, OptimizerLink) and link.name == name
    [visit] = check_links(link, PARAMS, link.init(PARAMS))
    assert visit.asked == (link.gradient == "replaces")
    kept = all(a is b for a, b in zip(visit.received, visit.returned, strict=True))
    assert kept == (link.gradient == "keeps")


@pytest.mark.parametrize("later", REPLACING)
@pytest.mark.parametrize("earlier", [*TRANSFORMING, *REPLACING])
def test_nothing_may_change_the_gradient_before_a_link_that_replaces_it(earlier, later):
    one, other = LINKS[earlier](), LINKS[later]()
    both = "Write it once" if earlier == later else rf"Write {earlier} or {later}, one of them"
    advice = rf"Write {later}\+{earlier}," if earlier in TRANSFORMING else both
    with pytest.raises(ValueError, match=rf"{later} needs the batch's own gradient, got what {earlier} made of it.*{advice}"):
        split_methods((one, other))
    with pytest.raises(ValueError, match=advice):
        pj.check_optimizer(optax.chain(one, other, SGD), PARAMS)


@pytest.mark.parametrize("later", [*TRANSFORMING, "swad"])
@pytest.mark.parametrize("earlier", LINKS)
def test_links_that_transform_come_after_in_any_order(earlier, later):
    links = (pj.swad(), LINKS[earlier](), LINKS[later]())
    assert split_methods(links)[1] == links
    pj.check_optimizer(optax.chain(*links, SGD), PARAMS)


CHANGED = {
    "weight decay": optax.add_decayed_weights(0.1), "clipping": optax.clip_by_global_norm(1.0), "the step": SGD,
    "adam": optax.scale_by_adam(), "a chain": optax.chain(optax.identity(), optax.scale(2.0)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("name", ["sam", "looksam", "rts", "dp_sgd"])
def test_so_are_optax_s_own_links(name, what):
    with pytest.raises(ValueError, match=rf"{name} needs the batch's own gradient, got what a link of optax.*{name} first"):
        pj.check_optimizer(optax.chain(CHANGED[what], LINKS[name](), SGD), PARAMS)


def test_links_that_do_nothing_may_stand_anywhere():
    pj.check_optimizer(optax.chain(optax.identity(), optax.chain(optax.identity()), pj.swad(), pj.sam(), SGD), PARAMS)
    pj.check_optimizer(optax.named_chain(("climb", pj.sam()), ("descend", SGD)), PARAMS)
    pj.check_optimizer(optax.chain(optax.inject_hyperparams(pj.sam)(radius=0.1), SGD), PARAMS)
    pj.check_optimizer(SGD, PARAMS)


@pytest.mark.parametrize("name", REPLACING)
def test_accumulation_and_guards_stand_behind_links_that_ask_for_gradients(name):
    make = LINKS[name]
    with pytest.raises(
        ValueError, match=rf"MultiSteps needs links.*got {name} inside.*Write optax.chain\(pj.{name}\(\.\.\.\), optax.Mul"
    ):
        pj.check_optimizer(optax.MultiSteps(optax.chain(make(), SGD), 4), PARAMS)
    guarded = optax.apply_if_finite(optax.chain(make(), SGD), 5)
    with pytest.raises(ValueError, match=rf"A guard against nan needs to see the gradient that {name} asks for"):
        pj.check_optimizer(guarded, PARAMS)
    pj.check_optimizer(optax.chain(make(), optax.MultiSteps(SGD, 4).gradient_transformation()), PARAMS)
    pj.check_optimizer(optax.chain(make(), optax.apply_if_finite(SGD, 5)), PARAMS)


def test_what_stands_before_the_link_is_not_blamed_on_multi_steps_behind_it():
    with pytest.raises(ValueError, match="sam needs the batch's own gradient, got what gradient_clipping made of it"):
        pj.check_optimizer(optax.chain(pj.gradient_clipping(), pj.sam(), optax.MultiSteps(SGD, 4)), PARAMS)


@pytest.mark.parametrize(
    "name", [name for name in REPLACING if "sync_perturbation" in inspect.signature(LINKS[name]).parameters]
)
def test_links_that_climb_along_each_device_s_own_gradient_get_one(name):
    link = LINKS[name](sync_perturbation=False)
    pj.check_optimizer(optax.chain(link, SGD), PARAMS)
    init_state(recipe(lambda n: (link,)), NUMBERS, device_data(dataset()), 0)


def test_an_optimiser_that_takes_no_extra_arguments_is_looked_at_too():
    pj.check_optimizer(optax.GradientTransformation(*optax.trace(0.9)[:2]), PARAMS)
    plain = optax.GradientTransformation(SGD.init, lambda updates, state, params=None: SGD.update(updates, state, params))
    pj.check_optimizer(plain, PARAMS)


def test_a_guard_behind_the_link_stops_the_second_gradient_s_nan():
    """What the advice promises; and around the link it does not, which is what is refused."""
    update = lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: jax.tree.map(lambda w: w + jnp.nan, p))[0]
    behind = update(optax.chain(pj.sam(), optax.apply_if_finite(SGD, 5)))
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, jnp.zeros_like(u)), behind)
    assert all(np.isnan(u).all() for u in jax.tree.leaves(update(optax.apply_if_finite(optax.chain(pj.sam(), SGD), 5))))


@pytest.mark.parametrize("name", ["sam", "asam", "amp", "pugd", "looksam", "esam", "gsam"])
def test_weights_that_are_not_trained_are_not_climbed_along(name):
    frozen = optax.partition({"on": SGD, "off": optax.set_to_zero()}, {"a": "on", "b": "off"})
    with pytest.raises(ValueError, match=rf"{name} needs to know which weights are trained, got the untrained \['b'\]"):
        pj.check_optimizer(optax.chain(LINKS[name](), frozen), PARAMS)


def test_links_that_know_which_weights_are_trained_pass():
    trained, groups = {"a": True, "b": False}, {"a": "on", "b": "off"}
    still = optax.partition({"on": SGD, "off": optax.set_to_zero()}, groups)
    pj.check_optimizer(optax.chain(pj.sam(mask=trained), still), PARAMS)
    pj.check_optimizer(optax.chain(optax.masked(pj.sam(), trained), still), PARAMS)
    pj.check_optimizer(optax.partition({"on": optax.chain(pj.sam(), SGD), "off": optax.set_to_zero()}, groups), PARAMS)
    pj.check_optimizer(optax.partition({"on": pj.sam(), "off": pj.pugd()}, groups), PARAMS)
    inside = {"on": optax.chain(optax.clip(1.0), pj.sam(), SGD), "off": optax.set_to_zero()}
    with pytest.raises(ValueError, match="sam needs the batch's own gradient"):
        pj.check_optimizer(optax.partition(inside, groups), PARAMS)


@pytest.mark.parametrize("timing", [pj.after(0.5), pj.last(0.25), pj.every(3)], ids=["after", "last", "every"])
def test_a_link_that_acts_later_is_found_now(timing):
    frozen = optax.partition({"on": SGD, "off": optax.set_to_zero()}, {"a": "on", "b": "off"})
    with pytest.raises(ValueError, match="rts needs to know which weights are trained"):
        pj.check_optimizer(optax.chain(pj.rts(timing=timing), frozen), PARAMS)


WARMUP = optax.sgd(optax.linear_schedule(0.0, 0.1, 10))


def test_a_first_step_of_length_zero_is_not_frozen_weights():
    pj.check_optimizer(optax.chain(pj.sam(), WARMUP), PARAMS)
    groups = optax.partition({"on": SGD, "warm": WARMUP}, {"a": "on", "b": "warm"})
    pj.check_optimizer(optax.chain(pj.sam(), groups), PARAMS)
    pj.check_optimizer(optax.chain(pj.sam(), optax.MultiSteps(SGD, 4)), PARAMS)
    pj.check_optimizer(optax.chain(pj.sam(), optax.scale(0.0)), PARAMS)


def test_frozen_weights_are_found_behind_updates_that_start_with_zero():
    groups = {"a": "on", "b": "off"}
    warm = optax.partition({"on": WARMUP, "off": optax.set_to_zero()}, groups)
    later = optax.MultiSteps(optax.partition({"on": SGD, "off": optax.set_to_zero()}, groups), 4)
    for rest in (warm, later):
        with pytest.raises(ValueError, match=r"sam needs to know which weights are trained, got the untrained \['b'\]"):
            pj.check_optimizer(optax.chain(pj.sam(), rest), PARAMS)
        pj.check_optimizer(optax.chain(pj.sam(mask={"a": True, "b": False}), rest), PARAMS)


def test_optimizers_that_take_no_other_arguments():
    pj.check_optimizer(optax.contrib.sam(SGD, optax.sgd(0.05), sync_period=2), PARAMS)
    params, slow = optax.LookaheadParams.init_synced(PARAMS), lambda inner: optax.lookahead(inner, 5, 0.5)
    pj.check_optimizer(slow(optax.adam(1e-3)), params, updates=PARAMS)
    with pytest.raises(ValueError, match="sam needs `grad_fn`, got none"):  # lookahead does not pass it on
        pj.check_optimizer(slow(optax.chain(pj.sam(), SGD)), params, updates=PARAMS)


def test_a_link_of_one_s_own_needs_no_declaration():
    """Whether it asks for gradients is seen; what it needs beside is passed on."""

    @pj.method(target="parameter", direction=(+1,), inference="adversarial", granularity="corpus", cite="nobody", off=None)
    def mine():
        """Asks for the gradient at twice the weights."""

        def update(updates, state, params=None, *, grad_fn=None, mine=None, **extra_args):
            assert mine == 3
            return grad_fn(jax.tree.map(lambda w: 2 * w, params)), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    pj.check_optimizer(optax.chain(mine(), SGD), PARAMS, mine=3)
    with pytest.raises(ValueError, match="mine needs the batch's own gradient, got what gradient_clipping made of it"):
        pj.check_optimizer(optax.chain(pj.gradient_clipping(), mine(), SGD), PARAMS, mine=3)
    with pytest.raises(ValueError, match="got mine inside"):
        pj.check_optimizer(optax.MultiSteps(optax.chain(mine(), SGD), 2), PARAMS, mine=3)


def test_logit_gradients_as_updates():
    h, labels = jnp.full([4, 2], 0.25), jnp.zeros([4], jnp.int32)
    told = dict(updates=h, labels=labels, pullback=lambda v: jax.tree.map(lambda w: w * v.sum(), PARAMS), epoch=0, step=0)
    first = pj.lpg_updates(num_classes=2, split="all", bound=0.1)
    pj.check_optimizer(optax.chain(first, pj.gradient_clipping(), SGD), PARAMS, **told)
    with pytest.raises(ValueError, match="sam needs the batch's own gradient, got what lpg_updates made of it"):
        pj.check_optimizer(optax.chain(first, pj.sam(), SGD), PARAMS, **told)


def test_the_links_themselves_are_unchanged_by_being_watched():
    for name, (steps, radius) in itertools.product(["sam", "pugd"], [(1, 0.1), (2, 0.5)]):
        tx = optax.chain(LINKS[name](radius=radius), SGD)
        update = lambda tx=tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: jax.tree.map(jnp.sin, p))[0]
        before = update()
        for _ in range(steps):
            pj.check_optimizer(tx, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, update(), before)


def test_the_trainer_refuses_before_anything_compiles():
    refused = {
        "got what dp_sgd made of it": lambda n: (pj.dp_sgd(), pj.sam()),
        "got what a link of optax": lambda n: (optax.chain(optax.add_decayed_weights(0.1), pj.sam()),),
        "got what gradient_clipping made of it": lambda n: (optax.chain(pj.gradient_clipping(), pj.rts()),),
        "got sam inside": lambda n: (optax.MultiSteps(optax.chain(pj.sam(), optax.identity()), 2).gradient_transformation(),),
    }
    for message, build in refused.items():
        with pytest.raises(ValueError, match=message):
            init_state(recipe(build), NUMBERS, device_data(dataset()), 0)
    init_state(
        recipe(lambda n: (pj.sam(), pj.gradient_clipping(), optax.identity()), accumulate=2), NUMBERS, device_data(dataset()), 0
    )


def test_a_kind_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="method needs gradient out of .*got 'replace'"):
        pj.method(
            target="gradient", direction=(), inference="prior", granularity="corpus", cite="", off=None, gradient="replace"
        )
