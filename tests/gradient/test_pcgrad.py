"""perturbjax.gradient.pcgrad: the procedure in numpy, conflicts that are gone, groups, penalties, limits that are plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.gradient.groups import _cleared, group_members
from perturbjax.gradient.pcgrad import random_orders
from perturbjax.training import fit
from tests.gradient.problem import KEY, C, data, flat, grad_fn_of, part
from tests.training import problem as training


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def surgery(gradients, orders):
    """Word for word: project on the normal plane of every other original gradient that opposes, in the given order."""
    after = []
    for i, g in enumerate(gradients):
        g = g.copy()
        for j in orders[i]:
            other = gradients[j]
            if j != i and other @ other > 0 and g @ other < 0:
                g -= (g @ other) / (other @ other) * other
        after.append(g)
    return np.array(after)


def of_classes(params, x, y):
    return np.array([part(params, x, y, y == c) for c in range(C)])


def updated(link, *, grads=None, links=(), key=KEY, **given):
    """The link's answer on the problem, as a flat vector; what a trainer passes is filled in."""
    params, _, y, domains = data()

    @jax.jit
    def update(params, key):
        grad_fn = grad_fn_of(links)
        extra = dict(labels=jnp.asarray(y), num_classes=C, side={"domain": jnp.asarray(domains)}, num_domains=3)
        own = grad_fn(params) if grads is None else grads
        return link.update(own, link.init(params), params, grad_fn=grad_fn, key=key, **extra, **given)

    return update(params, key)


def test_the_link_is_the_procedure_in_numpy(float64):
    params, x, y, _ = data()
    gradients = of_classes(params, x, y)
    assert ((gradients @ gradients.T) < 0).sum() >= 4  # there is something to do; class 3 is absent
    wanted = surgery(gradients, np.asarray(random_orders(KEY, C)))
    for reduction, number in (("sum", 1), ("mean", 3)):
        updates, state = updated(pj.pcgrad(reduction=reduction))
        np.testing.assert_allclose(flat(updates), wanted.sum(0) / number, rtol=1e-9, atol=1e-12)
        assert int(state.evaluations) == C + 1


@pytest.mark.parametrize("seed", range(5))
def test_gradients_after_surgery_are_numpy_s_for_any_number_of_groups(seed, float64):
    rng = np.random.default_rng(seed)
    number = 2 + seed
    gradients = rng.normal(size=(number, 9))
    key = jax.random.key(seed)
    tree = {"a": jnp.asarray(gradients[:, :4].reshape(number, 2, 2)), "b": jnp.asarray(gradients[:, 4:])}
    found = pj.pcgrad_gradients(tree, key)
    found = np.concatenate([np.asarray(found["a"]).reshape(number, -1), np.asarray(found["b"])], axis=1)
    orders = np.asarray(random_orders(key, number))
    np.testing.assert_allclose(found, surgery(gradients, orders), rtol=1e-9, atol=1e-12)
    met_last = [[j for j in order if j != i][-1] for i, order in enumerate(orders)]
    for i, j in enumerate(met_last):  # nothing came after that could have made a new conflict
        assert found[i] @ gradients[j] > -1e-12
    before, after = np.minimum(gradients @ gradients.T, 0).sum(), np.minimum(found @ gradients.T, 0).sum()
    assert before < 0 and after >= before


def test_two_groups_that_conflict_end_at_right_angles_to_each_other_s_original(float64):
    g = np.array([[1.0, 0.2, 0.0], [-1.0, 0.5, 0.3]])
    after = np.asarray(pj.pcgrad_gradients(jnp.asarray(g), KEY))
    np.testing.assert_allclose([after[0] @ g[1], after[1] @ g[0]], 0, atol=1e-12)


def test_the_order_is_random_and_follows_the_key():
    orders = np.stack([np.asarray(random_orders(jax.random.key(s), 5)) for s in range(200)])
    assert (np.sort(orders, axis=-1) == np.arange(5)).all()
    first = np.bincount(orders[:, :, 0].ravel(), minlength=5) / 1000
    np.testing.assert_allclose(first, 0.2, atol=0.05)  # four standard deviations
    np.testing.assert_array_equal(random_orders(KEY, 5), random_orders(KEY, 5))


def test_one_group_is_plain_training_bit_for_bit(float64):
    params = data()[0]
    grads = jax.jit(grad_fn_of())(params)
    np.testing.assert_array_equal(flat(updated(pj.pcgrad(groups=1), grads=grads)[0]), flat(grads))


def test_without_conflicts_nothing_changes_bit_for_bit():
    """Two classes whose gradients live in different coordinates."""
    grad_fn = lambda p, *, weights=None: p * (jnp.ones(4) if weights is None else weights)
    w, labels = jnp.array([0.1, 0.2, 0.3, 0.7]), jnp.array([0, 1, 0, 1])
    link = pj.pcgrad()
    out, _ = link.update(w / 3, link.init(w), w, grad_fn=grad_fn, key=KEY, labels=labels, num_classes=2)
    np.testing.assert_array_equal(out, w / 3)


def test_what_earlier_links_did_to_the_gradient_is_kept(float64):
    """The link adds what surgery changes: a shift of the incoming gradient comes out as the same shift."""
    params = data()[0]
    shifted = jax.tree.map(lambda g: g + 0.5, jax.jit(grad_fn_of())(params))
    a, b = updated(pj.pcgrad())[0], updated(pj.pcgrad(), grads=shifted)[0]
    np.testing.assert_allclose(flat(b) - flat(a), 0.5, rtol=1e-9)


def test_domains_and_groups_of_classes_with_neighbouring_indices(float64):
    params, x, y, domains = data()
    by_domain = np.array([part(params, x, y, domains == d) for d in range(3)])
    wanted = surgery(by_domain, np.asarray(random_orders(KEY, 3))).sum(0)
    np.testing.assert_allclose(flat(updated(pj.pcgrad(groups="domains"))[0]), wanted, rtol=1e-9, atol=1e-12)
    halves = np.array([part(params, x, y, y // 2 == h) for h in range(2)])
    wanted = surgery(halves, np.asarray(random_orders(KEY, 2))).sum(0)
    np.testing.assert_allclose(flat(updated(pj.pcgrad(groups=2))[0]), wanted, rtol=1e-9, atol=1e-12)
    members = group_members("pcgrad", 3, dict(labels=jnp.arange(10), num_classes=10))
    np.testing.assert_array_equal(members.argmax(0), [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])


def test_a_penalty_of_the_loss_counts_once(float64):
    """Weights don't touch Flow.penalty, so it is in every gradient that grad_fn gives; it belongs to no group."""
    params, x, y, _ = data()
    squares = pj.Perturbation(
        "stage1", lambda context: (),
        lambda flow, rest, state, context: (flow._replace(penalty=flow.penalty + (flow.value**2).sum(1)), state, {}),
    )  # fmt: skip
    penalty = flat(jax.grad(lambda p: (jnp.tanh(x @ p["a"]) ** 2).sum(1).mean() + 0 * p["b"].sum() + 0 * p["c"].sum())(params))
    wanted = surgery(of_classes(params, x, y), np.asarray(random_orders(KEY, C)))
    np.testing.assert_allclose(flat(updated(pj.pcgrad(), links=squares)[0]), wanted.sum(0) + penalty, rtol=1e-9, atol=1e-12)
    mean, _ = updated(pj.pcgrad(reduction="mean"), links=squares)
    np.testing.assert_allclose(flat(mean), wanted.sum(0) / 3 + penalty, rtol=1e-9, atol=1e-12)


def test_rounding_is_no_group():
    """What subtracting a penalty leaves of a group without samples has a direction that means nothing; real gradients stay."""
    weights, rest = jnp.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), {"w": jnp.array([3.0, -4.0])}
    gradients = {"w": jnp.array([[1e-7, 0.0], [2e-7, -1e-7], [0.5, 0.0]])}  # the last: its samples are on another device
    cleared = _cleared(gradients, rest, weights)["w"]
    np.testing.assert_array_equal(cleared, gradients["w"] * jnp.array([[1.0], [0.0], [1.0]]))
    without_penalty = _cleared(gradients, {"w": jnp.zeros(2)}, weights)["w"]
    np.testing.assert_array_equal(without_penalty, gradients["w"])


def test_chunks_jit_and_vmap_change_nothing(float64):
    whole, _ = updated(pj.pcgrad())
    chunked, _ = updated(pj.pcgrad(chunk=2))
    np.testing.assert_allclose(flat(chunked), flat(whole), rtol=1e-9, atol=1e-12)
    keys = jax.random.split(jax.random.key(1), 3)
    together = jax.vmap(lambda key: updated(pj.pcgrad(), key=key)[0])(keys)
    for k, key in enumerate(keys):
        alone = flat(updated(pj.pcgrad(), key=key)[0])
        np.testing.assert_allclose(flat(jax.tree.map(lambda t, k=k: t[k], together)), alone, rtol=1e-9, atol=1e-12)


def test_a_small_step_harms_no_class_whose_conflict_is_gone(float64):
    """Two groups: −g̃ lowers both groups' losses to first order, where −g raises one."""
    params, x, y, _ = data()
    group = y // 2
    parts = np.array([part(params, x, y, group == h) for h in range(2)])
    parts[1] *= 0.1 if parts[0] @ parts[1] < 0 else -0.1
    total = np.asarray(pj.pcgrad_gradients(jnp.asarray(parts), KEY)).sum(0)
    assert (parts @ parts.sum(0)).min() < 0 < (parts @ total).min() + 1e-12


@pytest.mark.optax_promotes  # schedules
def test_the_trainer_passes_what_it_needs_and_counts_the_gradients():
    history = fit(training.recipe(lambda numbers: (pj.pcgrad(),)), training.dataset(), training.NUMBERS, 0)
    assert history.gradient_evaluations == 1 + 3 + 1
    assert history.accuracy[-1] > 0.5


def test_errors_name_the_call():
    params, _, y, _ = data()
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    link, given = pj.pcgrad(), dict(grad_fn=grad_fn_of(), key=KEY, labels=jnp.asarray(y), num_classes=C)
    call = lambda link=link, **changed: link.update(params, link.init(params), params, **{**given, **changed})
    for name in ("grad_fn", "key", "labels", "num_classes"):
        with pytest.raises(ValueError, match=f"pcgrad needs `{name}`, got none: call tx.update"):
            call(**{name: None})
    with pytest.raises(ValueError, match="pcgrad needs `params`, got none"):
        link.update(params, link.init(params), **given)
    with pytest.raises(ValueError, match=r"pcgrad needs a grad_fn that takes weights= \[B\], got one without"):
        call(grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="pcgrad needs `num_domains`, got none"):
        call(pj.pcgrad(groups="domains"))
    with pytest.raises(ValueError, match=r"pcgrad needs side\['domain'\], got \[\]. Write groups='classes'"):
        call(pj.pcgrad(groups="domains"), side={}, num_domains=2)
    with pytest.raises(ValueError, match="pcgrad needs at most 4 groups of 4 classes, got 5"):
        call(pj.pcgrad(groups=5))
    for wrong in ("class", 0, True):
        with pytest.raises(ValueError, match="pcgrad needs groups='classes', 'domains' or a number of at least 1"):
            pj.pcgrad(groups=wrong)
    with pytest.raises(ValueError, match="pcgrad needs reduction to be one of its names, got 'median'"):
        pj.pcgrad(reduction="median")
    with pytest.raises(ValueError, match="pcgrad needs chunk >= 1, got 0"):
        pj.pcgrad(chunk=0)


def test_in_a_chain_the_arguments_reach_it(float64):
    plain, _ = updated(pj.pcgrad())
    tx = optax.chain(pj.pcgrad(), optax.sgd(0.5))
    chained, _ = updated(tx)
    np.testing.assert_allclose(flat(chained), -0.5 * flat(plain), rtol=1e-12)
