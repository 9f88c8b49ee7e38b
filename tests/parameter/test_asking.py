"""perturbjax.parameter.asking: whose parameters climb, in which type, what grad_fn may answer, and numbers that are not finite."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import perturbjax as pj
from tests.methods import ASKING, each
from tests.optax_links import assert_trees_close, given, losses, parameters

every_asking = each(ASKING)
# Climbs of length `radius` along the gradient, or along |w| ⊙ g.
CLIMBS = {
    "sam": partial(pj.sam, radius=0.05),
    "sam-3": partial(pj.sam, radius=0.05, p=3.0),
    "asam": partial(pj.asam, radius=0.05),
    "gsam": partial(pj.gsam, radius=0.05),
    "gsam-adaptive": partial(pj.gsam, radius=0.05, adaptive=True),
    "amp": partial(pj.amp, radius=0.05, step_size=100.0),
    "looksam": partial(pj.looksam, radius=0.05),
    "esam": partial(pj.esam, radius=0.05, beta=1.0),
    "pugd": partial(pj.pugd, radius=0.05),
    "rts": partial(pj.rts, radius=0.05),
    "rts-gradient": partial(pj.rts, radius=0.05, ascent="gradient"),
}
each_climb = pytest.mark.parametrize("name", CLIMBS)


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree))))


def minus(a, b):
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(x, jnp.float32)) - y.astype(x.dtype), a, b)


def points(link, params, **extra):
    """(its update, the points where it asked for gradients), with both branches of a phase run as Python."""
    seen, grad_fn = [], extra.pop("grad_fn")

    def watched(p, *, weights=None):
        seen.append(p)
        return grad_fn(p, weights=weights)

    with jax.disable_jit():
        updates, _ = link.update(grad_fn(params), link.init(params), params, grad_fn=watched, **extra)
    return updates, seen


def test_before_a_partition_that_freezes_the_climb_is_along_the_trained_weights_alone():
    """Without a mask it isn't: part of the radius goes into weights that never move."""
    params, extra = parameters(), given(losses)
    frozen = optax.partition({"on": optax.sgd(1.0), "off": optax.set_to_zero()}, {"first": "off", "last": "on"})
    g = extra["grad_fn"](params)
    climb = 0.05 * g["last"]["kernel"] / norm(g["last"])
    mask = lambda tree: {"first": jax.tree.map(lambda _: False, tree["first"]), "last": {"kernel": True}}
    for given_mask in (mask, mask(params), {"first": False, "last": True}):
        updates, seen = points(optax.chain(pj.sam(radius=0.05, mask=given_mask), frozen), params, **extra)
        assert_trees_close(seen[0]["first"], params["first"], rtol=0)
        np.testing.assert_allclose(seen[0]["last"]["kernel"], params["last"]["kernel"] + climb, rtol=1e-6)
        wanted = extra["grad_fn"](params | {"last": {"kernel": params["last"]["kernel"] + climb}})["last"]["kernel"]
        np.testing.assert_allclose(updates["last"]["kernel"], -wanted, rtol=1e-5, atol=1e-7)
        assert norm(updates["first"]) == 0
    _, seen = points(optax.chain(pj.sam(radius=0.05), frozen), params, **extra)
    assert norm(minus(seen[0]["first"], params["first"])) > 0.01


def test_two_groups_with_a_link_of_their_own_climb_one_without_the_other():
    params, extra = parameters(), given(losses)
    groups = optax.partition({"a": pj.sam(radius=0.1), "b": pj.pugd(radius=0.3)}, {"first": "a", "last": "b"})
    full = extra | {name: pj.unmasked(extra[name], params) for name in ("grad_fn", "loss_fn")}
    g = extra["grad_fn"](params)
    updates, _ = groups.update(g, groups.init(params), params, **full)
    first, _ = pj.sam(radius=0.1, mask={"first": True, "last": False}).update(
        g, pj.sam(mask={"first": True, "last": False}).init(params), params, **extra
    )
    last = pj.pugd(radius=0.3, mask={"first": False, "last": True})
    last, _ = last.update(g, last.init(params), params, **extra)
    assert_trees_close(updates, {"first": first["first"], "last": last["last"]}, rtol=1e-6, atol=1e-8)


@every_asking
def test_masked_without_the_others_it_names_mask_and_unmasked(make):
    params, extra = parameters(), given(losses)
    for tx in (
        optax.masked(make(), {"first": False, "last": True}),
        optax.partition({"a": make(), "b": optax.set_to_zero()}, {"first": "b", "last": "a"}),
    ):
        name = make.__name__
        with pytest.raises(
            ValueError, match=rf"{name} needs all parameters .*\. Write pj\.{name}\(mask=.*pj\.unmasked\(grad_fn, params\)"
        ):
            tx.update(extra["grad_fn"](params), tx.init(params), params, **extra)


@pytest.mark.parametrize("make", [pj.pcgrad, pj.graddrop])
def test_a_group_s_changes_are_those_on_the_trained_weights_and_zero_elsewhere(make):
    """each=True, which the view of gradients asks for."""
    params, extra = parameters(), given(losses)
    g, link = extra["grad_fn"](params), make(mask={"first": False, "last": True})
    changes, _ = link.update(g, link.init(params), params, each=True, **extra)
    own = {"last": params["last"]}
    alone = given(lambda p: losses({"first": params["first"], **p}))
    wanted, _ = make().update(alone["grad_fn"](own), make().init(own), own, each=True, **alone)
    assert_trees_close(changes["last"], wanted["last"], rtol=1e-5, atol=1e-7)
    assert norm(changes["first"]) == 0


def test_losses_of_the_parameters_shape_are_losses():
    params, x = {"w": jnp.linspace(0.5, 2.0, 4)}, jnp.eye(4)
    loss_fn = lambda p: (x @ p["w"]) ** 2
    grad_fn = lambda p, weights=None: jax.grad(lambda p: jnp.mean(loss_fn(p) * (1 if weights is None else weights)))(p)
    told = dict(grad_fn=grad_fn, loss_fn=loss_fn, key=jax.random.key(0))
    masked, alone = (pj.esam(mask=mask, gamma=1.0) for mask in ({"w": True}, None))
    found, wanted = (link.update(grad_fn(params), link.init(params), params, **told)[0] for link in (masked, alone))
    assert_trees_close(found, wanted, rtol=0)


def test_links_that_do_not_climb_give_all_parameters_in_their_own_types():
    """A convolution of bfloat16 with float32 is an error."""
    params = {name: jnp.ones([3, 3, 2, 2], jnp.bfloat16) for name in ("first", "last")}
    seen = []

    def grad_fn(p, weights=None):
        seen.append({w.dtype for w in jax.tree.leaves(p)})
        return jax.tree.map(jnp.ones_like, p)

    link = pj.dp_sgd(mask={"first": False, "last": True})
    told = dict(grad_fn=grad_fn, labels=jnp.zeros([2], jnp.int32), key=jax.random.key(0))
    link.update(params, link.init(params), params, **told)
    assert seen and all(types == {jnp.dtype(jnp.bfloat16)} for types in seen)


def test_a_device_s_own_gradient_is_masked_too():
    params, extra = parameters(), given(losses)
    own = jax.tree.map(lambda w: w + 1, parameters())
    link = pj.sam(radius=0.1, sync_perturbation=False, mask={"first": False, "last": True})
    _, seen = points(link, params, **extra | dict(local_grads=own))
    climb = 0.1 * own["last"]["kernel"] / norm(own["last"])
    np.testing.assert_allclose(seen[0]["last"]["kernel"], params["last"]["kernel"] + climb, rtol=1e-5)
    assert_trees_close(seen[0]["first"], params["first"], rtol=0)


@each_climb
def test_half_precision_is_given_in_float32_so_that_the_climb_is_what_was_asked_for(name):
    """20,000 weights of size 1 climb by 0.05 together, a tenth of what one of them can tell apart in bfloat16."""
    w = {"w": jnp.ones([20_000], jnp.bfloat16)}
    slope = {"w": jax.random.normal(jax.random.key(0), [20_000]).astype(jnp.bfloat16)}
    extra = given(lambda p: jnp.zeros(6)) | dict(grad_fn=lambda p, *, weights=None: slope)
    updates, [point] = points(CLIMBS[name](), w, **extra)
    assert point["w"].dtype == jnp.float32 and updates["w"].dtype == jnp.bfloat16
    climb = minus(point, w)["w"]
    along = slope["w"].astype(jnp.float32)
    if name == "sam-3":
        np.testing.assert_allclose(jnp.sum(jnp.abs(climb) ** 3) ** (1 / 3), 0.05, rtol=1e-3)
        along = jnp.sign(along) * jnp.sqrt(jnp.abs(along))
    elif name == "asam":
        np.testing.assert_allclose(jnp.linalg.norm(climb), 0.05 * 1.01, rtol=1e-3)  # T = |w| + 0.01
    else:
        np.testing.assert_allclose(jnp.linalg.norm(climb), 0.05, rtol=1e-3)
    cosine = jnp.sum(climb * along) / jnp.linalg.norm(climb) / jnp.linalg.norm(along)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)  # float32's own rounding of 1 + 4e-4


@pytest.mark.optax_promotes
def test_a_flax_model_with_bfloat16_parameters_trains():
    model, x = nn.Dense(3, param_dtype=jnp.bfloat16), jax.random.normal(jax.random.key(0), [6, 4])
    params = model.init(jax.random.key(1), x)
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x), jnp.arange(6) % 3).mean()
    tx = optax.chain(pj.sam(radius=0.05), optax.sgd(0.5))
    state, before = tx.init(params), loss(params)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        params = optax.apply_updates(params, updates)
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)} and loss(params) < before


@every_asking
@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, 1e30], ids=["inf", "nan", "overflow of the norm"])
def test_a_gradient_that_is_not_finite_becomes_nan_in_all_leaves_of_a_net_of_relus(make, bad):
    """At weights that are nan, ReLU's slope is 0, so that most gradients there are finite."""
    params, extra = parameters(), given(partial(losses, activation=jax.nn.relu))
    g = extra["grad_fn"](params)
    if bad == 1e30 and make in (pj.pcgrad, pj.graddrop, pj.dp_sgd):
        return  # these don't climb along the gradient that they are given
    spoilt = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(bad), g)
    one = {"first": g["first"], "last": spoilt["last"]}
    updates, _ = make().update(one, make().init(params), params, **extra)
    if make is not pj.dp_sgd or bad != 1e30:
        for leaf in jax.tree.leaves(updates):
            assert np.isnan(leaf).all()
    if bad == 1e30:
        return
    second = lambda p, *, weights=None: {"first": g["first"], "last": spoilt["last"]}
    updates, _ = make().update(g, make().init(params), params, **extra | dict(grad_fn=second))
    for leaf in jax.tree.leaves(updates):
        assert np.isnan(leaf).all()


@pytest.mark.parametrize("make", [pj.sam, pj.rts], ids=["sam", "rts"])
def test_one_device_s_infinite_gradient_makes_all_devices_nan(make):
    """Each climbs along its own; with ReLUs the others' parameters would stay finite, and apart from its."""
    link = make(sync_perturbation=False)
    params, extra = parameters(), given(partial(losses, activation=jax.nn.relu), axis_name="d")
    mean = lambda tree: jax.lax.pmean(tree, "d")

    def update(scale):
        own = jax.tree.map(lambda x: scale * x, extra["grad_fn"](params))
        averaged = extra | dict(grad_fn=lambda p: mean(extra["grad_fn"](p)), local_grads=own)
        finite = jax.tree.map(jnp.nan_to_num, mean(own))  # what it is given is whole: the climb alone has the infinity
        return link.update(finite, link.init(params), params, **averaged)[0]

    found = jax.pmap(update, "d", devices=jax.devices()[:2])(jnp.array([1.0, jnp.inf]))
    for leaf in jax.tree.leaves(found):
        assert np.isnan(leaf).all()
    for leaf in jax.tree.leaves(jax.pmap(update, "d", devices=jax.devices()[:2])(jnp.array([1.0, 2.0]))):
        assert np.isfinite(leaf).all()


def on_the_circle(angle):
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


@each_climb
def test_complex_parameters_climb_by_the_radius_and_up(name):
    """As far as the same climb on real and imaginary parts, where |w| is 1 (so that |w| ⊙ g is g)."""
    z = {"z": on_the_circle(jnp.array([0.3, 1.0, 2.5, -1.2]))}
    loss = lambda p: jnp.sum(jnp.abs(p["z"] - 2) ** 2) + jnp.real(p["z"][0] ** 3)
    extra = given(lambda p: jnp.zeros(6)) | dict(grad_fn=lambda p, *, weights=None: jax.grad(loss)(p))
    updates, [point] = points(CLIMBS[name](), z, **extra)
    climb, g = np.asarray(point["z"] - z["z"]), np.asarray(jax.grad(loss)(z)["z"])
    if name == "sam-3":
        np.testing.assert_allclose(np.sum(np.abs(climb) ** 3) ** (1 / 3), 0.05, rtol=1e-5)
        np.testing.assert_allclose(np.angle(climb), np.angle(np.conj(g)), atol=1e-4)
    else:
        wanted = 0.05 * np.conj(g) / np.linalg.norm(g) * (1.01 if name == "asam" else 1)
        np.testing.assert_allclose(climb, wanted, rtol=1e-4, atol=1e-6)
        rise = np.sum(np.real(g * climb))  # the slope along the climb
        np.testing.assert_allclose(loss(point) - loss(z), rise, rtol=0.05)
    assert updates["z"].dtype == jnp.complex64


def test_decay_in_the_loss_of_complex_parameters_is_the_gradient_of_that_loss():
    z = {"z": jnp.array([1 + 2j, -0.5j, 0.3], jnp.complex64)}
    loss = lambda p: jnp.sum(jnp.abs(p["z"] - 2) ** 2) + jnp.real(p["z"][0] ** 3)
    decayed = lambda p: loss(p) + 0.05 * jnp.sum(jnp.abs(p["z"]) ** 2)
    link, plain = pj.sam(radius=0.1, decay=0.1), pj.sam(radius=0.1)
    ours, _ = link.update(jax.grad(loss)(z), link.init(z), z, grad_fn=jax.grad(loss))
    wanted, _ = plain.update(jax.grad(decayed)(z), plain.init(z), z, grad_fn=jax.grad(decayed))
    np.testing.assert_allclose(ours["z"], wanted["z"], rtol=1e-5)


def test_complex_gradients_have_products_but_no_signs():
    w = jnp.array([1 + 1j, 2 - 1j], jnp.complex64)
    turned = on_the_circle(jnp.arange(12.0).reshape(6, 2))
    extra = given(lambda p: jnp.abs(jnp.sum(p[None] * turned, axis=1)) ** 2)
    real = lambda p: jnp.concatenate([p.real, p.imag])
    joined = lambda v: jax.lax.complex(v[:2], v[2:])
    flat = given(lambda v: extra["loss_fn"](joined(v)))
    link = pj.pcgrad()
    found, _ = link.update(extra["grad_fn"](w), link.init(w), w, **extra)
    wanted, _ = link.update(flat["grad_fn"](real(w)), link.init(real(w)), real(w), **flat)
    np.testing.assert_allclose(real(jnp.conj(found)), wanted, rtol=1e-4)
    with pytest.raises(ValueError, match=r"graddrop needs real gradients, got complex64\. Write graddrop\(mask="):
        pj.graddrop().update(extra["grad_fn"](w), pj.graddrop().init(w), w, **extra)


@every_asking
@pytest.mark.parametrize("kind", ["value_and_grad", "has_aux"])
def test_a_grad_fn_that_returns_more_than_the_gradient_is_an_error(make, kind):
    params, extra = parameters(), given(losses)
    g = extra["grad_fn"](params)
    more = {"value_and_grad": lambda g: (jnp.ones([]), g), "has_aux": lambda g: (g, {"logits": jnp.ones([6, 3])})}[kind]
    both = lambda p, *, weights=None: more(extra["grad_fn"](p, weights=weights))
    with pytest.raises(
        ValueError, match=rf"{make.__name__} needs grad_fn to return the gradients alone, .* got a tuple of 2, .*take \[1\]"
    ):
        make().update(g, make().init(params), params, **extra | dict(grad_fn=both))
    with pytest.raises(ValueError, match=rf"{make.__name__} needs to be given the gradients alone, .* got a tuple of 2"):
        make().update(more(g), make().init(params), params, **extra)


def test_gradients_of_other_parameters_of_the_same_shapes_are_an_error():
    w = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    with pytest.raises(ValueError, match="sam needs grad_fn to return the gradients alone, like the parameters"):
        pj.sam().update(w, pj.sam().init(w), w, grad_fn=lambda p: {"b": p["a"], "c": p["b"]})


def variables(tree):
    """As flax.nnx has parameters: a State of variables."""
    return nnx.State(jax.tree.map(nnx.Param, tree))


@every_asking
def test_parameters_and_gradients_of_nnx_go_together_in_any_container(make):
    params, extra = parameters(), given(losses)
    g = extra["grad_fn"](params)
    wanted, _ = make().update(g, make().init(params), params, **extra)
    plain = lambda tree: jax.tree.map(lambda x: x, nnx.to_pure_dict(tree)) if isinstance(tree, nnx.State) else tree
    grad_fn = lambda p, *, weights=None: extra["grad_fn"](plain(p), weights=weights)
    as_state = lambda p, *, weights=None: variables(grad_fn(p, weights=weights))
    loss_fn = lambda p: losses(plain(p))
    for own, first, second in [
        (variables(params), variables(g), as_state),
        (variables(params), g, grad_fn),
        (params, variables(g), as_state),
        (variables(params), variables(g), grad_fn),
    ]:
        found, _ = make().update(first, make().init(own), own, **extra | dict(grad_fn=second, loss_fn=loss_fn))
        assert jax.tree.structure(found) == jax.tree.structure(first)
        for u, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(u, w, rtol=1e-5, atol=1e-7)


def test_the_biases_of_an_nnx_module_are_biases():
    """asam(adaptive="weights") knows them by their names, which nnx writes before a `value`."""
    params = parameters()
    ours = pj.asam_ascent(variables(params), variables(params), radius=1.0, adaptive="weights")
    wanted = pj.asam_ascent(params, params, radius=1.0, adaptive="weights")
    for u, w in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(u, w)


def test_a_missing_grad_fn_names_the_train_state_that_swallows_it():
    from flax.training.train_state import TrainState

    w = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=w, tx=optax.chain(pj.sam(), optax.sgd(0.1)))
    with pytest.raises(
        ValueError, match=r"sam needs `grad_fn`, got none.*TrainState.apply_gradients.*docs/optimizer_links\.md"
    ):
        state.apply_gradients(grads=w)
