"""perturbjax.inference.pgd: against a float64 numpy loop, finite differences, and itself on several devices.

Most tests run op by op with the same shapes: one compilation of each operation serves them all.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from perturbjax.classes import class_mean
from perturbjax.inference.pgd import UNROLLED, pgd

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

B, SHAPE, HIDDEN, C = 8, (2, 3), 5, 4
rng = np.random.default_rng(0)
W1, W2 = rng.normal(size=[6, HIDDEN]), 2 * rng.normal(size=[HIDDEN, C])
VALUE = rng.normal(size=[B, *SHAPE])
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0], np.int32)  # class 3 is absent
GROUPS = {"samples": (None, B), "classes": (LABELS, C), "corpus": (np.zeros(B, np.int32), 1)}
STEPS, NORMS = ("raw", "unit", "sign"), ("l2", "linf", "l1")
each_step, each_norm = pytest.mark.parametrize("step", STEPS), pytest.mark.parametrize("norm", NORMS)
each_grouping = pytest.mark.parametrize("grouping", GROUPS)


quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


# The net twice: cross entropy of tanh(v W1) W2.


def logits_of(value, w1=W1, w2=W2):
    return jnp.tanh(value.reshape(value.shape[0], -1) @ jnp.asarray(w1, value.dtype)) @ jnp.asarray(w2, value.dtype)


def losses_of(value, labels=LABELS, w1=W1, w2=W2):
    log_p = jax.nn.log_softmax(logits_of(value, w1, w2))
    return -jnp.sum(jax.nn.one_hot(labels, C, dtype=value.dtype) * log_p, axis=-1)


def numpy_net(value):
    """(losses [B], ∂ losses_i/∂ value_i [B, ...]) by hand."""
    hidden = np.tanh(value.reshape(B, -1) @ W1)
    u = hidden @ W2
    p = np.exp(u - u.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    back = ((p - np.eye(C)[LABELS]) @ W2.T * (1 - hidden**2)) @ W1.T
    return -np.log(p[np.arange(B), LABELS]), back.reshape(value.shape)


# The loop of the module's docstring, one group after the other.


def numpy_project(delta, radius, norm):
    if norm == "linf":
        return np.clip(delta, -radius, radius)
    length = np.abs(delta).sum() if norm == "l1" else np.sqrt((delta**2).sum())
    if length <= radius:
        return delta
    if norm == "l2":
        return delta * radius / length
    low, high = 0.0, np.abs(delta).max()  # the l1 projection is a soft threshold: found by bisection
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(delta) - middle, 0).sum() > radius else (low, middle)
    return np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


def numpy_pgd(net, value, groups, num_groups, *, direction=1.0, step_size, num_steps, bound=np.inf, step, norm="l2",
              start=None, value_range=None, transform=lambda g: g):  # fmt: skip
    own = groups is None
    groups = np.arange(len(value)) if own else np.asarray(groups)
    s, k, steps, radius = (np.broadcast_to(x, [num_groups]) for x in (direction, step_size, num_steps, bound))
    delta = np.zeros([num_groups, *value.shape[1:]]) if start is None else start.copy()
    low, high = value_range or (-np.inf, np.inf)
    if own:
        delta = np.clip(value + delta, low, high) - value
    for number in range(max(steps)):
        slopes = net(np.clip(value + delta[groups], low, high))[1]
        for g in range(num_groups):
            if number >= steps[g]:
                continue
            mean = slopes[groups == g].mean(0) if (groups == g).any() else np.zeros(value.shape[1:])
            mean = transform(mean)
            length = np.sqrt((mean**2).sum())
            shaped = {"raw": mean, "unit": mean / (length or 1), "sign": np.sign(mean)}[step]
            delta[g] = numpy_project(delta[g] + s[g] * k[g] * shaped, radius[g], norm)
            if own:  # a sample's own delta keeps to the range
                delta[g] = np.clip(value[g] + delta[g], low, high) - value[g]
    return np.clip(value + delta[groups], low, high) - value, delta


def by_group(grouping, *values):
    """Settings of the grouping: as many of the values as it has groups, or one number."""
    count = GROUPS[grouping][1]
    return np.resize(values, count) if count > 1 else values[0]


def settings_of(grouping):
    return dict(
        direction=by_group(grouping, 1.0, -1.0, 1.0, 0.0, -1.0),
        step_size=by_group(grouping, 0.3, 0.2, 0.4),
        num_steps=by_group(grouping, 3, 1, 2, 0),
        bound=by_group(grouping, 0.5, 0.15, np.inf, 0.3, 0.0),
    )


def both(grouping, *, net=numpy_net, loss=losses_of, **options):
    """(delta, search), and the oracle's (delta, delta of the groups)."""
    groups, count = GROUPS[grouping]
    return pgd(loss, jnp.asarray(VALUE), groups, count, **options), numpy_pgd(net, VALUE, groups, count, **options)


@each_step
@each_norm
@each_grouping
def test_is_the_numpy_loop(x64, step, norm, grouping):
    (delta, search), (expected, of_groups) = both(grouping, step=step, norm=norm, **settings_of(grouping))
    assert np.abs(expected).max() > 0.05 and delta.dtype == jnp.float64
    np.testing.assert_allclose(delta, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(search.delta, of_groups, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(search.losses, numpy_net(VALUE)[0], rtol=1e-12)


def test_an_absent_group_keeps_a_zero_delta(x64):
    for step in STEPS:
        (_, search), _ = both("classes", step=step, step_size=1.0, num_steps=2, bound=1.0)
        np.testing.assert_array_equal(search.delta[3], 0)
        assert np.abs(search.delta[:3]).min() > 0


@each_grouping
def test_starts_from_a_delta_and_clips_value_plus_delta(x64, grouping):
    start = 0.3 * np.random.default_rng(1).normal(size=[GROUPS[grouping][1], *SHAPE])
    options = dict(start=start, value_range=(-0.4, 0.9), step="unit", **settings_of(grouping))
    (delta, search), (expected, of_groups) = both(grouping, **options)
    np.testing.assert_allclose(delta, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(search.delta, of_groups, rtol=1e-10, atol=1e-12)
    assert (VALUE + delta).min() >= -0.4 - 1e-12 and (VALUE + delta).max() <= 0.9 + 1e-12
    # Step 0 is where the search starts, clipped.
    groups = np.arange(B) if GROUPS[grouping][0] is None else GROUPS[grouping][0]
    np.testing.assert_allclose(search.losses, numpy_net(np.clip(VALUE + start[groups], -0.4, 0.9))[0], rtol=1e-12)


def test_a_sample_s_own_delta_turns_round_at_the_edge_of_the_range(x64):
    """The value lies on the edge: what would have left the range isn't owed when the slope turns (Madry's loop clips each step)."""
    slopes = iter([-1.0, -1.0, 1.0])
    loss = lambda v: next(slopes) * v.sum((1, 2))
    options = dict(step_size=0.1, num_steps=3, bound=1.0, step="sign", value_range=(0.0, 1.0))
    delta, search = pgd(loss, jnp.zeros([B, *SHAPE]), None, B, start=jnp.full([B, *SHAPE], -0.5), **options)
    np.testing.assert_allclose(delta, 0.1)
    np.testing.assert_allclose(search.delta, 0.1)


def test_transform_acts_on_the_group_mean_before_the_step(x64):
    weights = np.array([[[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]])
    for grouping in GROUPS:  # the oracle transforms one group's mean at a time, pgd all of them
        transform = lambda mean: mean * (weights if mean.ndim == 3 else weights[0])
        (delta, _), (expected, _) = both(grouping, step_size=0.3, num_steps=2, step="unit", bound=0.4, transform=transform)
        np.testing.assert_allclose(delta, expected, rtol=1e-10, atol=1e-12)


def test_a_long_loop_is_a_masked_scan_with_the_numbers_of_the_unrolled_one(x64, monkeypatch):
    steps = np.array([13, 4, 11, 0])
    long = dict(step="unit", step_size=0.1, num_steps=steps, bound=0.6, direction=by_group("classes", 1.0, -1.0))
    assert UNROLLED == 10
    run = lambda value: pgd(losses_of, value, *GROUPS["classes"], **long)[0]
    loops = lambda: str(jax.make_jaxpr(run)(VALUE)).count("scan[")
    scanned, scans = both("classes", **long), loops()
    monkeypatch.setattr(sys.modules["perturbjax.inference.pgd"], "UNROLLED", 13)
    run = lambda value: pgd(losses_of, value, *GROUPS["classes"], **long)[0]  # not the traced one
    unrolled, _ = both("classes", **long)
    assert (scans, loops()) == (1, 0)
    np.testing.assert_allclose(scanned[0][0], unrolled[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(scanned[0][0], scanned[1][0], rtol=1e-9, atol=1e-12)


def test_a_long_loop_runs_in_float32_too():
    """Under strict promotion the step's number must not meet the count in another type."""
    search = quick(lambda value: pgd(losses_of, value, *GROUPS["classes"], step_size=0.1, num_steps=12, bound=0.5)[0])
    delta = search(jnp.asarray(VALUE, jnp.float32))
    expected, _ = numpy_pgd(numpy_net, VALUE, *GROUPS["classes"], step_size=0.1, num_steps=12, bound=0.5, step="unit")
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)


def finite_difference(f, x, eps=1e-6):
    """∂f/∂x of a scalar function by central differences, float64."""
    x = np.asarray(x, np.float64)
    at = lambda i, e: f(x + e * np.eye(x.size)[i].reshape(x.shape))
    return np.array([(at(i, eps) - at(i, -eps)) / (2 * eps) for i in range(x.size)]).reshape(x.shape)


@each_step
@each_norm
def test_derivatives_with_respect_to_bound_step_size_and_direction(x64, step, norm):
    """Exact for one step: the slope doesn't depend on them. Class 0 ends outside its ball, 1 inside, 2 has none."""
    groups, count = GROUPS["classes"]
    along = jnp.asarray(np.random.default_rng(2).normal(size=VALUE.shape))
    at = {
        "bound": np.array([0.2, 5.0, 9.0, 0.1]),
        "step_size": np.array([3.0, 0.2, 0.5, 0.4]),
        "direction": np.array([1.0, -1, 1, 1]),
    }

    def total(hyper):
        return jnp.sum(along * pgd(losses_of, jnp.asarray(VALUE), groups, count, num_steps=1, step=step, norm=norm, **hyper)[0])

    gradient, total = jax.grad(total)(at), quick(total)
    for name in at:
        expected = finite_difference(lambda x, name=name: total(at | {name: x}), at[name])
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)
        assert np.abs(expected[0 if name == "bound" else 1]) > 1e-3, name


@each_step
@each_norm
def test_derivatives_are_finite_at_a_zero_gradient_and_an_infinite_or_zero_bound(x64, step, norm):
    for height in (0.0, 1.0):  # a flat loss, and one that isn't

        def total(hyper, height=height):
            loss = lambda v: height * losses_of(v)
            return pgd(loss, jnp.asarray(VALUE), *GROUPS["classes"], num_steps=2, step=step, norm=norm, **hyper)[0].sum()

        bound = jnp.array([jnp.inf, 0.0, 0.1, jnp.inf])
        for leaf in jax.tree.leaves(jax.value_and_grad(total)(dict(bound=bound, step_size=jnp.ones(C), direction=jnp.ones(C)))):
            assert np.isfinite(leaf).all(), leaf


@pytest.mark.parametrize("grouping", ["samples", "classes"])
def test_no_gradient_leaks_into_the_value_or_the_parameters(x64, grouping):
    groups, count = GROUPS[grouping]

    def search(args):
        loss = lambda v: losses_of(v, w1=args["w1"], w2=args["w2"])
        return pgd(loss, args["value"], groups, count, step_size=0.3, num_steps=2, bound=0.5)

    def outer(args):
        delta, seen = search(args)
        return losses_of(args["value"] + delta, w1=args["w1"], w2=args["w2"]).sum() + jnp.sum(seen.delta) + seen.losses.sum()

    args = jax.tree.map(jnp.asarray, {"value": VALUE, "w1": W1, "w2": W2})
    fixed, gradient = search(args)[0], jax.grad(outer)(args)
    constant = quick(lambda args: losses_of(args["value"] + fixed, w1=args["w1"], w2=args["w2"]).sum())
    leaking = quick(outer)
    for name in args:
        expected = finite_difference(lambda x, name=name: constant(args | {name: x}), args[name], eps=1e-5)
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
        full = finite_difference(lambda x, name=name: leaking(args | {name: x}), args[name], eps=1e-5)
        assert np.abs(full - expected).max() > 1e-2, "the test could not see a leak"


def test_no_gradient_leaks_where_the_sum_is_clipped(x64):
    """There δ = high − value: as a constant, not as a function of the value."""

    def total(value):
        return pgd(losses_of, value, None, B, step_size=0.3, num_steps=2, value_range=(-0.2, 0.2))[0].sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(VALUE)), 0)


def test_traced_settings_need_no_second_compilation_and_vmap(x64):
    traces = []

    @quick
    def run(hyper):
        traces.append(1)
        return pgd(losses_of, jnp.asarray(VALUE), *GROUPS["classes"], max_steps=3, **hyper)[0]

    sweep = dict(
        direction=np.array([1.0, -1.0]),
        step_size=np.array([0.2, 0.3]),
        num_steps=np.array([1, 3]),
        bound=np.array([0.1, np.inf]),
    )
    one = lambda i: {k: jnp.asarray(v[i]) for k, v in sweep.items()}
    expected = [
        numpy_pgd(numpy_net, VALUE, *GROUPS["classes"], step="unit", **{k: v[i] for k, v in sweep.items()})[0] for i in range(2)
    ]
    np.testing.assert_allclose([run(one(0)), run(one(1))], expected, rtol=1e-10, atol=1e-12)
    assert len(traces) == 1
    np.testing.assert_allclose(jax.vmap(run)(jax.tree.map(jnp.asarray, sweep)), expected, rtol=1e-10, atol=1e-12)


def test_a_traced_or_computed_number_of_steps_needs_max_steps():
    value = jnp.asarray(VALUE, jnp.float32)
    with pytest.raises(ValueError, match="pgd needs max_steps .* Pass max_steps=10"):
        jax.jit(lambda k: pgd(losses_of, value, *GROUPS["classes"], step_size=0.1, num_steps=k)[0])(3)
    with pytest.raises(ValueError, match="pgd needs max_steps"):
        pgd(losses_of, value, *GROUPS["classes"], step_size=0.1, num_steps=lambda losses, aux: 2)


def test_settings_may_be_functions_of_step_zero(x64):
    value, labels = jnp.asarray(VALUE), jnp.asarray(LABELS)
    with_logits = lambda v: (losses_of(v), {"logits": logits_of(v)})
    calls = []

    def hyper(losses, aux):
        calls.append(1)
        np.testing.assert_allclose(losses, numpy_net(VALUE)[0], rtol=1e-12)  # the clean pass
        np.testing.assert_array_equal(aux["logits"], logits_of(value))
        easy = class_mean(losses, labels, C) < 1.0
        return dict(
            direction=jnp.where(easy, 1.0, -1.0), step_size=jnp.where(easy, 0.2, 0.1), bound=jnp.where(easy, 0.3, 0.05),
            num_steps=jnp.where(easy, 2, 3),
        )  # fmt: skip

    pick = lambda name: lambda losses, aux: hyper(losses, aux)[name]
    names = ("direction", "step_size", "bound", "num_steps")
    settings = {name: pick(name) for name in names}
    delta, search = pgd(with_logits, value, LABELS, C, has_aux=True, max_steps=3, **settings)
    assert len(calls) == 4
    known = jax.tree.map(np.asarray, hyper(search.losses, search.aux))
    assert set(known["direction"]) == {1.0, -1.0}
    expected, _ = numpy_pgd(numpy_net, VALUE, LABELS, C, step="unit", **known)
    np.testing.assert_allclose(delta, expected, rtol=1e-10, atol=1e-12)


def test_no_gradient_leaks_through_settings_that_are_functions_of_step_zero(x64):
    def outer(value):
        delta, search = pgd(losses_of, value, None, B, step_size=lambda losses, aux: losses, num_steps=1)
        return jnp.sum(delta) + jnp.sum(search.losses)

    np.testing.assert_array_equal(jax.grad(outer)(jnp.asarray(VALUE)), 0)


# Several devices.

DEVICES = dict(
    step="unit", step_size=np.float32([0.3, 0.2, 0.4, 0.1]), num_steps=2, bound=np.float32([0.5, 0.3, 1.0, 1.0]),
    direction=np.float32([1.0, -1.0, 1.0, 1.0]),
)  # fmt: skip


def per_device(value, labels, w1, *, axis_name="d", **options):
    loss = lambda v: (losses_of(v, labels, w1=w1), logits_of(v, w1))
    delta, search = pgd(loss, value, labels, C, axis_name=axis_name, has_aux=True, **(DEVICES | options))
    return delta, search.losses, search.aux


def arguments():
    return jnp.asarray(VALUE, jnp.float32), jnp.asarray(LABELS), jnp.asarray(W1, jnp.float32)


@functools.cache
def one_device(**options):
    return quick(lambda *args: per_device(*args, axis_name=None, **options))(*arguments())


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=1e-5, atol=1e-6)


def mapped(f, count, check_vma):
    mesh, P = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]), PartitionSpec
    specs = dict(in_specs=(P("d"), P("d"), P()), out_specs=(P("d"), P("d"), P("d")))
    return quick(jax.shard_map(f, mesh=mesh, check_vma=check_vma, **specs))


@pytest.mark.parametrize("count, check_vma", [(1, True), (2, True), (2, False), (4, False), (8, True), (8, False)])
def test_class_groups_that_span_devices_have_the_numbers_of_one_device(count, check_vma):
    assert_same(mapped(per_device, count, check_vma)(*arguments()), one_device())


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_long_loop_on_four_devices(check_vma):
    f = lambda *args: per_device(*args, num_steps=12)
    assert_same(mapped(f, 4, check_vma)(*arguments()), one_device(num_steps=12))


@pytest.mark.parametrize("check_vma", [True, False])
def test_deltas_per_sample_on_four_devices(check_vma):
    def f(value, labels, w1):
        loss = lambda v: losses_of(v, labels, w1=w1)
        delta, search = pgd(loss, value, None, len(labels), step_size=0.1, num_steps=12, bound=0.5, axis_name="d")
        return delta, search.losses, search.delta

    expected, of_groups = numpy_pgd(numpy_net, VALUE, None, B, step_size=0.1, num_steps=12, bound=0.5, step="unit")
    delta, losses, own = mapped(f, 4, check_vma)(*arguments())
    for a, b in ((delta, expected), (own, of_groups), (losses, numpy_net(VALUE)[0])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", [jax.pmap, lambda f, **axes: quick(jax.vmap(f, **axes))], ids=["pmap", "vmap"])
def test_pmap_and_vmap_over_the_axis_have_the_numbers_of_one_device(over):
    value, labels, w1 = arguments()
    split = lambda x: x.reshape((4, B // 4) + x.shape[1:])
    got = over(per_device, axis_name="d", in_axes=(0, 0, None))(split(value), split(labels), w1)
    assert_same(got, one_device())


def test_jit_has_the_numbers_of_eager_code(x64):
    eager, _ = both("classes", step="unit", **settings_of("classes"))
    hyper = settings_of("classes")
    search = lambda value: pgd(losses_of, value, *GROUPS["classes"], step="unit", **hyper)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), jax.jit(search)(jnp.asarray(VALUE)), eager
    )


# Numbers.


def test_bfloat16_is_computed_in_float32():
    """A slope of 1 for every sample: 600 of them have a mean of 1, and 3 steps of 2^-9 don't vanish beside a delta of 1."""
    value = jnp.zeros([600, 2], jnp.bfloat16)
    options = dict(step_size=2**-9, num_steps=3, step="raw", start=jnp.ones([1, 2]))
    delta, search = quick(lambda v: pgd(lambda v: v.sum(-1), v, jnp.zeros([600], jnp.int32), 1, **options))(value)
    assert delta.dtype == jnp.bfloat16 and search.delta.dtype == jnp.float32
    np.testing.assert_array_equal(search.delta, 1 + 3 * 2**-9)


@st.composite
def problems(draw):
    batch, groups, shape = draw(st.sampled_from([(1, 1, ()), (B, C, SHAPE)]))  # each compiles
    label = st.lists(st.integers(0, groups - 1), min_size=batch, max_size=batch)
    each = lambda low, high: np.array(draw(st.lists(st.floats(low, high), min_size=groups, max_size=groups)))
    steps = draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups))
    options = dict(
        direction=np.array(draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=groups, max_size=groups))),
        step_size=each(0, 2), bound=each(0, 2), num_steps=np.array(steps), step=draw(st.sampled_from(STEPS)),
        norm=draw(st.sampled_from(NORMS)),
    )  # fmt: skip
    value = np.random.default_rng(draw(st.integers(0, 99))).normal(size=[batch, *shape])
    return value, np.array(draw(label), np.int32), groups, options


@given(problems())
@settings(max_examples=30)
def test_any_shape_any_groups(problem):
    value, labels, groups, options = problem
    wave = np.random.default_rng(3).normal(size=[1, *value.shape[1:]]) + 2
    net = lambda v: (None, wave * np.cos(v * wave))
    with enable_x64(True):
        loss = lambda v: jnp.sin(v * wave).reshape(len(labels), -1).sum(1)
        delta, search = pgd(loss, jnp.asarray(value), labels, groups, **options)
    expected, of_groups = numpy_pgd(net, value, labels, groups, **options)
    np.testing.assert_allclose(delta, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(delta, search.delta[labels])
    order = {"l2": 2, "linf": np.inf, "l1": 1}[options["norm"]]
    lengths = np.linalg.norm(np.reshape(search.delta, [groups, -1]), order, axis=1)
    assert (lengths <= options["bound"] * (1 + 1e-9) + 1e-12).all()
    still = (options["direction"] == 0) | (options["num_steps"] == 0) | ~np.isin(np.arange(groups), labels)
    np.testing.assert_array_equal(np.asarray(search.delta)[still], 0)


def test_padding_belongs_to_no_group():
    """Labels outside 0..G-1 take no part in the means and get no delta."""
    labels = jnp.array([0, 1, -1, 3, C, 2, 0, 99])
    value = jnp.asarray(VALUE, jnp.float32)
    inside = np.isin(labels, range(C))
    loss = lambda labels: lambda v: losses_of(v, labels)
    search = quick(lambda value, labels, known: pgd(loss(known), value, labels, C, step_size=0.3, num_steps=2)[0])
    delta = search(value, labels, jnp.where(inside, labels, 0))
    alone = search(value[inside], labels[inside], labels[inside])
    np.testing.assert_allclose(delta[inside], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(delta[~inside], 0)


def test_errors_name_what_was_given():
    value, search = jnp.asarray(VALUE, jnp.float32), dict(step_size=0.1)
    with pytest.raises(ValueError, match=re.escape("got (7,) and (8, 2, 3)")):
        pgd(losses_of, value, jnp.zeros([7], jnp.int32), 1, **search)
    with pytest.raises(ValueError, match="num_groups = 8 .* got 4"):
        pgd(losses_of, value, None, 4, **search)
    with pytest.raises(ValueError, match=re.escape("start (4, 2, 3) (one delta per group), got (8, 2, 3)")):
        pgd(losses_of, value, *GROUPS["classes"], start=value, **search)
    with pytest.raises(ValueError, match="'lint'.*'linf'"):
        pgd(losses_of, value, *GROUPS["classes"], norm="lint", **search)
    with pytest.raises(ValueError, match="'signs'.*'sign'"):
        pgd(losses_of, value, *GROUPS["classes"], step="signs", **search)
