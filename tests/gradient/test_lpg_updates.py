"""perturbjax.gradient.lpg_updates and perturb_cotangent: the same numbers as the link of the loss, by two other roads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from tests.gradient.lpg_problem import (
    COUNTS,
    EPS,
    NET,
    SIGN,
    B,
    C,
    assert_close,
    double,
    forward,
    hidden,
    logit_gradients,
    problem,
    quick,
)

Y = problem()[2]
SETTINGS = [
    dict(bound=EPS, direction=SIGN),
    dict(bound=EPS, direction=SIGN, form="scale", clamp=False),
    dict(bound=EPS, direction=SIGN, granularity="sample"),
    dict(bound=0.25, inference="pgd", split="frequency"),
    dict(bound=EPS, direction=SIGN, inference="pgd", jacobian="full", granularity="sample"),
    dict(bound=pj.varied(eps=0.125, delta_eps=0.5), inference="pgd", jacobian="full", split="accuracy", tau="median"),
    dict(bound=optax.linear_schedule(0.0, 0.5, 4), inference="pgd", step="unit", split=pj.by_variance(update="step")),
]


@pytest.fixture
def float64():
    with double():
        yield


def by_the_loss(settings, steps=3):
    """Parameters and states after some steps of SGD with momentum, the perturbation in the loss."""
    params, x, y = problem()
    params, tx = jax.tree.map(jnp.asarray, params), optax.sgd(0.125, momentum=0.5)
    made = pj.objective(NET, pj.lpg(**settings), num_classes=C, class_counts=COUNTS)
    states, held = made.init(params, x), tx.init(params)

    @quick
    def step(params, states, held, number):
        grads, out = jax.grad(made, has_aux=True)(params, states, pj.batch(x, y), step=number, epoch=number // 2)
        updates, held = tx.update(grads, held, params)
        return optax.apply_updates(params, updates), out.states, held

    for number in range(steps):
        params, states, held = step(params, states, held, jnp.int32(number))
    return params, states[0]


def by_optax(settings, steps=3, *, given=("logits", "targets"), place=("step", "epoch")):
    """The same, the perturbation in the optimiser."""
    params, x, y = problem()
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.chain(pj.lpg_updates(num_classes=C, class_counts=COUNTS, **settings), optax.sgd(0.125, momentum=0.5))
    held = tx.init(params)

    @quick
    def step(params, held, number):
        logits, pull = jax.vjp(lambda p: forward(p, x), params)
        h = jax.nn.softmax(logits) - jax.nn.one_hot(y, C, dtype=logits.dtype)
        more = dict(logits=logits, targets=jax.nn.one_hot(y, C, dtype=logits.dtype), step=number, epoch=number // 2)
        updates, held = tx.update(
            h, held, params, labels=jnp.asarray(y), pullback=lambda v: pull(v / B), features=hidden(params, x), unknown=1,
            **{name: more[name] for name in (*given, *place)},
        )  # fmt: skip
        return optax.apply_updates(params, updates), held

    for number in range(steps):
        params, held = step(params, held, jnp.int32(number))
    return params, held[0]


@pytest.mark.optax_promotes
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for k, v in s.items() if isinstance(v, str)))
def test_in_the_loss_and_in_the_optimiser_it_is_one_perturbation(float64, settings):
    params, state = by_the_loss(settings)
    ours, ours_state = by_optax(settings)
    assert_close(ours, params, rtol=1e-9, atol=1e-12)
    assert_close(ours_state, state, rtol=1e-6, atol=1e-7)  # the running means are float32
    plain, _ = by_the_loss(dict(bound=0.0))
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, plain))) > 1e-3


def test_logits_and_targets_of_a_plain_cross_entropy_are_read_off_h(float64):
    for split in ("accuracy", "variance", pj.by_accuracy(update="step", tau="median")):
        settings = dict(bound=EPS, split=split)
        (a, state), (b, read_off) = by_optax(settings), by_optax(settings, given=())
        assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert_close(state, read_off, rtol=1e-6, atol=1e-7)


def test_place_is_asked_for_where_it_is_needed_only():
    for settings in (dict(direction=SIGN), dict(split="frequency")):
        by_optax(settings, steps=1, place=())
    with pytest.raises(ValueError, match="lpg_updates needs 'epoch', got none. Pass epoch=i // steps_per_epoch"):
        by_optax(dict(), steps=1, place=("step",))
    with pytest.raises(ValueError, match="lpg_updates needs 'step', got none"):
        by_optax(dict(direction=SIGN, bound=lambda step: 0.1), steps=1, place=("epoch",))
    with pytest.raises(ValueError, match="lpg_updates needs 'progress', got none. Pass progress=i / steps"):
        by_optax(dict(direction=SIGN, bound=pj.linear(first=0.1, last=0)), steps=1)


def test_a_bound_of_zero_is_the_plain_gradient_bit_for_bit():
    params, x, y = problem()
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    logits, pull = jax.vjp(lambda p: forward(p, jnp.asarray(x, jnp.float32)), params)
    h = jax.nn.softmax(logits) - jax.nn.one_hot(y, C)
    for settings in (dict(), dict(form="scale"), dict(inference="pgd"), dict(inference="pgd", jacobian="full")):
        tx = pj.lpg_updates(num_classes=C, direction=SIGN, bound=0.0, **settings)
        given = dict(labels=jnp.asarray(y), pullback=pull, features=hidden(params, jnp.asarray(x, jnp.float32)))
        grads, _ = jax.jit(lambda h: tx.update(h, tx.init(params), params, **given))(h)
        jax.tree.map(np.testing.assert_array_equal, grads, jax.jit(pull)(h)[0])


def test_what_a_pullback_returns_may_be_in_the_tuple_of_jax_vjp():
    h, labels = jnp.zeros([2, C]), jnp.array([0, 1])
    tx = pj.lpg_updates(num_classes=C, direction=0.0)
    update = lambda params, grads: tx.update(h, tx.init(params), params, labels=labels, pullback=lambda v: grads)[0]
    one = {"w": jnp.ones(2)}
    assert update(one, (one,)) == one and update(one, one) == one
    assert update((1.0,), (2.0,)) == (2.0,)  # parameters that are a tuple of one stay one
    assert update((1.0, 2.0), (2.0, 3.0)) == (2.0, 3.0)
    assert update(None, (one,)) == one


def test_class_means_over_devices(float64):
    params, x, y = problem()
    params, h = jax.tree.map(jnp.asarray, params), jnp.asarray(logit_gradients(forward(params, x), y))

    def grads(x, h, y, axis_name=None, **settings):
        tx = pj.lpg_updates(num_classes=C, axis_name=axis_name, direction=SIGN, bound=EPS, **settings)
        pull = jax.vjp(lambda p: forward(p, x), params)[1]
        out, _ = tx.update(h, tx.init(params), params, labels=y, pullback=pull, features=hidden(params, x))
        return out if axis_name is None else jax.lax.psum(out, axis_name)

    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    P = PartitionSpec
    for settings in (dict(), dict(inference="pgd"), dict(inference="pgd", jacobian="full")):
        f = lambda x, h, y: grads(x, h, y, axis_name="d", **settings)
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P("d"), P("d")), out_specs=P(), check_vma=False)
        assert_close(quick(mapped)(x, h, y), quick(lambda *a: grads(*a, **settings))(x, h, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            dict(),
            dict(labels=None),
            r"lpg_updates needs `labels`, got none. Call tx.update\(h, state, params, ..., labels=labels",
        ),
        (dict(), dict(pullback=None), r"lpg_updates needs `pullback`, got none.*jax.vjp\(f, params\)"),
        (dict(), dict(h=jnp.zeros([3, 4])), r"needs h \[B, 4\] and labels \[B\], got \(3, 4\) and \(2,\)"),
        (dict(), dict(h=jnp.zeros([2, 5])), r"needs h \[B, 4\] and labels \[B\], got \(2, 5\) and \(2,\). Pass softmax"),
        (dict(), dict(h=jnp.zeros([2])), r"needs h \[B, 4\] and labels \[B\], got \(2,\)"),
        (
            dict(),
            dict(h=jnp.zeros([2, 3, 4]), labels=jnp.zeros([2, 3], int)),
            r"got \(2, 3, 4\) and \(2, 3\).*flatten sequences",
        ),
        (dict(), dict(h={"w": jnp.zeros(2), "b": jnp.zeros(2)}), "as updates, got a tree of 2 arrays. .*first in optax.chain"),
        (dict(), dict(h={"w": jnp.zeros([2, 4])}), "as updates, got a tree of 1 arrays"),
        (dict(inference="pgd"), dict(), r"lpg_updates needs `features`, got none.*or build it with jacobian=\"full\""),
        (dict(), dict(labels=jnp.zeros([2])), "lpg_updates needs integer labels, got float32"),
    ],
)
def test_errors_of_update_say_what_to_pass(settings, arguments, message):
    tx = pj.lpg_updates(num_classes=C, direction=1.0, **settings)
    given = dict(h=jnp.zeros([2, C]), labels=jnp.array([0, 1]), pullback=lambda v: v) | arguments
    with pytest.raises(ValueError, match=message):
        tx.update(given.pop("h"), tx.init(None), None, **given)


def test_errors_of_the_factory_say_what_to_pass():
    with pytest.raises(ValueError, match=r"lpg_updates needs class_counts for its split or bound, got none.*numpy.bincount"):
        pj.lpg_updates(num_classes=C, split="frequency")
    with pytest.raises(ValueError, match=r"lpg_updates needs class_counts of shape \(4,\), got \(3,\)"):
        pj.lpg_updates(num_classes=C, class_counts=COUNTS[:3])
    with pytest.raises(ValueError, match="lpg_updates needs num_classes >= 2, got 1"):
        pj.lpg_updates(num_classes=1)
    with pytest.raises(ValueError, match="lpg needs bound >= 0, got -1"):
        pj.lpg_updates(num_classes=C, bound=-1.0)


# ------------------------------------------------------------------------------------------------------ perturb_cotangent


def test_perturb_cotangent_is_the_third_road_to_the_same_gradient(float64):
    """The recipe of its docstring, in a loop without any of the library's machinery."""
    params, x, y = problem()
    params = jax.tree.map(jnp.asarray, params)

    def loss(params):
        u = forward(params, x)
        h = jax.lax.stop_gradient(jax.nn.softmax(u) - jax.nn.one_hot(y, C, dtype=u.dtype))
        u = pj.perturb_cotangent(u, pj.lpg_delta(h, jnp.asarray(y), direction=SIGN, bound=EPS) / len(y))
        return optax.softmax_cross_entropy_with_integer_labels(u, y).mean()

    made = pj.objective(NET, pj.lpg(direction=SIGN, bound=EPS), num_classes=C)
    run = lambda p: made(p, made.init(p, x), pj.batch(x, y))[0]
    np.testing.assert_allclose(quick(loss)(params), quick(run)(params), rtol=1e-12)
    assert_close(quick(jax.grad(loss))(params), quick(jax.grad(run))(params), rtol=1e-9, atol=1e-12)


def test_perturb_cotangent_is_the_identity_forward_and_adds_backward_under_jit_and_vmap():
    u, delta = jnp.array([[0.1, 1e-30], [-3.0, jnp.inf]]), jnp.array([[0.5, -1.0], [2.0, 0.25]])
    np.testing.assert_array_equal(jax.jit(pj.perturb_cotangent)(u, delta), u)
    f = lambda u, delta: (pj.perturb_cotangent(u, delta) * jnp.array([2.0, 3.0])).sum()
    by_u, by_delta = jax.jit(jax.vmap(jax.grad(f, argnums=(0, 1))))(u, delta)
    np.testing.assert_array_equal(by_u, jnp.array([[2.5, 2.0], [4.0, 3.25]]))
    np.testing.assert_array_equal(by_delta, 0.0)
    narrow = jax.grad(lambda u: pj.perturb_cotangent(u, delta[0]).sum())(jnp.zeros(2, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"perturb_cotangent needs delta of u's shape \(2, 2\), got \(2,\)"):
        pj.perturb_cotangent(u, delta[0])


def test_labels_as_lists_and_arrays_are_one(float64):
    params, x, y = problem()
    params, h = jax.tree.map(jnp.asarray, params), jnp.asarray(logit_gradients(forward(params, x), y))
    tx = pj.lpg_updates(num_classes=C, direction=SIGN)
    pull = jax.vjp(lambda p: forward(p, x), params)[1]
    a, b = (tx.update(h, (), params, labels=labels, pullback=pull)[0] for labels in (y, jnp.asarray(y)))
    assert_close(a, b, rtol=0, atol=0)
