"""Under x64 a float64 pass is float64 throughout, whatever float32 means elsewhere; a float32 pass is what it was."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy
from perturbjax.activation.dropblock import dropblock_gamma
from perturbjax.bound import radius as radius_of
from perturbjax.link import Where
from perturbjax.parameter.timing import Place
from perturbjax.split import Clean
from tests.test_contract import BATCH, CLASSES, COUNTS, DOMAINS, EPOCH, EXAMPLES, LINE, METHODS, each, parts, problem
from tests.test_settings import HELPERS

# Where float32 stands for draws or for zeros and ones, and no digit is lost.
DRAWN_IN_FLOAT32 = {"cutmix": "the boxes", "random_erasing": "the boxes"}
ZEROS_AND_ONES = {"pcgrad", "graddrop", "dp_sgd"}  # the groups' members, which weigh the losses


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def of_type(dtype):
    """The parameters, statistics and batch of the contract's problem."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, problem())


def stepper(made, dtype):
    """(state, one step of everything: (state, key) -> (loss, gradients, updates, next state)) in a pass of this float type."""
    params, stats, batch = of_type(dtype)
    links, _ = parts(made)
    tx = made if hasattr(made, "update") else optax.identity()
    objective = pj.objective(
        LINE, links, num_classes=CLASSES, class_counts=COUNTS, num_examples=EXAMPLES, num_domains=DOMAINS, replays=8
    )

    def step(state, key):
        params, stats, states, opt_state = state
        progress = jnp.asarray(0.62, dtype)

        def loss(params, weights=None):
            place = dict(key=key, step=EPOCH, progress=progress, epoch=1, stats=stats)
            return objective(params, states, batch, weights=weights, **place)

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        given = dict(grad_fn=lambda p, *, weights=None: jax.grad(loss, has_aux=True)(p, weights)[0])
        given |= dict(loss_fn=lambda p: loss(p)[1].losses, key=key, labels=batch.labels, num_classes=CLASSES)
        given |= dict(progress=progress, value=value, rate=jnp.asarray(0.5, dtype))
        updates, opt_state = optax.chain(tx).update(grads, opt_state, params, **given)
        return value, grads, updates, (params, out.stats, out.states, opt_state)

    state = params, stats, objective.init(params, batch.inputs, stats=stats), optax.chain(tx).init(params)
    return jax.tree.map(jnp.asarray, state), step


def inner(equation):
    """The programs inside an equation: of jit, cond, scan, custom derivatives."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def in_use(program):
    """The equations that an output depends on, those of inner programs included. (Metrics are no output here.)"""
    wanted = {id(v) for v in program.outvars}
    for equation in reversed(program.eqns):
        if any(id(v) in wanted for v in equation.outvars):
            wanted |= {id(v) for v in equation.invars}
            yield equation
            for part in inner(equation):
                yield from in_use(part)


def types_in_use(step, *given):
    """Names of the float types of all that a step computes on the way to its outputs."""
    program = jax.make_jaxpr(step)(*given).jaxpr
    values = [v.aval for equation in in_use(program) for v in equation.outvars]
    return {str(v.dtype) for v in values if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating)}


def signature(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def float_types(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@each(METHODS)
def test_a_float64_pass_computes_nothing_in_float32(make):
    state, step = stepper(make() if make is not pj.ce else (), jnp.float64)
    key = jax.random.key(0)
    value, grads, updates, after = jax.eval_shape(step, state, key)
    assert signature(after) == signature(state)
    assert float_types((state, value, grads, updates)) == {"float64"}
    if make.__name__ not in DRAWN_IN_FLOAT32 and make.__name__ not in ZEROS_AND_ONES:
        assert types_in_use(step, state, key) == {"float64"}


@each(METHODS)
def test_a_float32_pass_keeps_its_types_under_x64(make):
    state, step = stepper(make() if make is not pj.ce else (), jnp.float32)
    value, grads, updates, after = jax.eval_shape(step, state, jax.random.key(0))
    assert signature(after) == signature(state)
    assert float_types((value, grads, updates, state[:2])) == {"float32"}


@pytest.mark.optax_promotes  # two float types meet here
@pytest.mark.parametrize("text", [*sorted(HELPERS), *(f.__name__ for f in METHODS)])
def test_float32_numbers_serve_in_a_float64_pass(text):
    """As the trainer gives them: traced, and of their own type."""
    tables = taxonomy.registry(), taxonomy.helpers()
    structure, numbers = spec.split_numbers(spec.parse_chain(text), *tables)

    def run(numbers, key):
        [made] = spec.build(structure, numbers, *tables)
        state, step = stepper(made, jnp.float64)
        value, grads, _, after = step(state, key)
        assert signature(after) == signature(state)
        return value, grads

    found = jax.eval_shape(run, tuple(jnp.float32(x) for x in numbers), jax.random.key(0))
    assert float_types(found) == {"float64"}


def test_the_check_finds_float32_on_the_way_and_not_beside_it():
    x = jnp.ones(3)
    assert types_in_use(lambda x: x.sum(dtype="float32").astype(x.dtype), x) == {"float64", "float32"}
    assert types_in_use(lambda x: jax.lax.cond(x[0] > 0, lambda: x, lambda: x.astype("float32").astype(x.dtype)), x) == {
        "float64", "float32",
    }  # fmt: skip

    def beside(x):
        x.astype("float32").sum()
        return x.sum()

    assert types_in_use(beside, x) == {"float64"}


def context(**fields):
    return pj.Context(CLASSES, jnp.asarray(COUNTS), **fields)


@pytest.mark.parametrize("update", ["step", "epoch"])
@pytest.mark.parametrize("split", [pj.by_accuracy, pj.by_variance])
def test_class_statistics_of_splits_are_exact_to_float64(split, update):
    rng = np.random.default_rng(0)
    made, seen = split(update=update, decay=0.7), {}
    state = made.init(context())
    for number in range(4):
        u, y = rng.normal(size=(BATCH, CLASSES)), rng.integers(0, CLASSES, BATCH).astype(np.int32)
        where = Where(step=number, progress=number / 4, epoch=number)
        clean = Clean(jnp.asarray(u), jnp.asarray(y), jax.nn.one_hot(y, CLASSES))
        state = made.update(state, clean, context(where=where))
        p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
        for c in np.unique(y):
            h = p[y == c] - np.eye(CLASSES)[c]
            now = (p[y == c, c].mean(),) if split is pj.by_accuracy else (h.mean(0), (h**2).sum(1).mean())
            if update == "step" and c in seen:
                now = tuple(0.7 * old + 0.3 * new for old, new in zip(seen[c], now, strict=True))
            if update == "step" or number < 3:  # by epoch: those of the epoch before
                seen[c] = now
    found = (state,) if split is pj.by_accuracy else (state.mean, state.square)
    for c, expected in seen.items():
        for part, value in zip(found, expected, strict=True):
            assert part.mean.dtype == jnp.float64
            np.testing.assert_allclose(part.mean[c], value, rtol=1e-13, atol=1e-15)


def test_isda_is_exact_to_float64_whatever_its_ramp():
    rng = np.random.default_rng(1)
    params = dict(a=rng.normal(size=(5, 4)), w=rng.normal(size=(3, 4)), b=rng.normal(size=3))
    model = pj.line(
        {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, a: a @ w["w"].T + w["b"][None]},
        head=lambda w: (w["w"], w["b"]),
    )
    x, y = rng.normal(size=(12, 5)), (np.arange(12) % 3).astype(np.int32)
    a = np.tanh(x @ params["a"])
    plain = a @ params["w"].T + params["b"]
    gap = params["w"][None] - params["w"][:, None]
    spread = np.array([np.cov(a[y == c].T, bias=True) for c in range(3)])
    form = np.einsum("yjd,yde,yje->yj", gap, spread, gap)
    for ramp, factor in (("none", 1.0), ("step", 0.7), ("epoch", 0.7)):
        made = pj.objective(model, pj.isda(strength=0.1, ramp=ramp, decay=0.9), num_classes=3)
        _, out = made(params, made.init(params, x), pj.batch(x, y), progress=0.7, epoch=2)
        assert float_types(out.states) == {"float64"}
        np.testing.assert_allclose(out.logits, plain + 0.05 * factor * form[y], rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(out.states[0].covariance, spread, rtol=1e-12, atol=1e-15)


def test_drop_block_s_gamma_and_factor_are_exact_to_float64():
    for rate, size, n in ((0.1, 7, 8), (0.3, 3, 11), (1 / 3, 2, 5)):
        gamma = dropblock_gamma((n, n), rate=rate, block_size=size)
        expected = rate / min(size, n) ** 2 * n**2 / (n - min(size, n) + 1) ** 2
        assert gamma.dtype == jnp.float64
        np.testing.assert_allclose(gamma, expected, rtol=1e-15)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 2)))
    model = pj.line({"stage1": lambda w, x: x, "logits": lambda w, a: a.mean((1, 2)) @ w})
    made = pj.objective(model, pj.dropblock(rate=0.3, block_size=3, ramp=False, site="stage1"), num_classes=2)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2)))
    _, out = made(w, made.init(w, x), pj.batch(x, jnp.zeros(6, jnp.int32)), key=jax.random.key(0))
    mask = pj.dropblock_mask(
        jax.random.fold_in(jax.random.key(0), 0), jnp.arange(6, dtype=jnp.int32), (8, 8, 2), rate=0.3, block_size=3
    )
    kept = np.asarray(mask) > 0
    assert mask.dtype == jnp.float64 and 0.4 < kept.mean() < 0.95
    np.testing.assert_allclose(out.logits, (np.asarray(x) * kept / kept.mean()).mean((1, 2)) @ np.asarray(w), rtol=1e-13)
    np.testing.assert_allclose(pj.dropout_mask(jax.random.key(0), jnp.arange(3), (4,), rate=0.3).max(), 1 / 0.7, rtol=1e-15)


@pytest.mark.parametrize("progress", [0.0, 0.123456789, 1 / 3, 0.7, 1.0])
def test_courses_are_exact_to_float64(progress):
    place = Place(step=1, progress=progress, value=None, rate=progress)
    for course, expected in (
        (pj.linear(first=0.3, last=0.1), 0.1 + 0.2 * (1 - progress)),
        (pj.cosine(first=0.3, last=0.1), 0.1 + 0.2 * 0.5 * (1 + math.cos(math.pi * progress))),
        (pj.by_rate(high=0.3, low=0.1, floor=0.05), 0.1 + 0.2 * max(progress - 0.05, 0) / 0.95),
    ):
        value = course.at(place)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        assert course.at(place._replace(progress=jnp.float32(progress), rate=jnp.float32(progress))).dtype == jnp.float32


def test_bounds_are_exact_to_float64_where_the_pass_is():
    split = pj.by_frequency(tau=0.4)
    rank = np.arange(1, 6)
    given = context(where=Where(step=0, progress=1 / 3, epoch=0), level={"logits": 3, "stage1": 1}.get)
    radius = lambda bound, **kw: radius_of(bound, default=1.0, split=split, state=(), context=given, **kw)
    np.testing.assert_allclose(radius(pj.varied(eps=0.1, delta_eps=0.7)), 0.1 + 0.7 * abs(0.4 - rank / 5), rtol=1e-14)
    np.testing.assert_allclose(radius(pj.linear(first=0.3, last=0.1)), np.full(5, 0.1 + 0.2 * (1 - 1 / 3)), rtol=1e-14)
    np.testing.assert_allclose(radius(pj.layer_scaled(0.3, beta=0.7), site="stage1"), np.full(5, 0.3 * 0.7**2), rtol=1e-14)
    prior = np.where(rank > 2, 5 / COUNTS, COUNTS / 50)
    np.testing.assert_allclose(radius(pj.varied_by_frequency(eps=0.1, delta_eps=0.3)), 0.1 + 0.3 * prior, rtol=1e-14)


def test_scanned_steps_in_float64_need_no_second_program():
    """A step's state goes into the next one as it is: lpl over accuracies, C-UAT's deltas, d2l's window, ISDA's covariances."""
    for make in (pj.lpl, pj.cuat, pj.d2l, pj.isda, pj.dann):
        state, step = stepper(make(), jnp.float64)
        shapes = jax.eval_shape(
            lambda s, step=step: jax.lax.scan(lambda s, k: step(s, k)[::-1][:2], s, jax.random.split(jax.random.key(0), 3)),
            state,
        )
        assert signature(shapes[0]) == signature(state)
