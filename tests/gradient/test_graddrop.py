"""perturbjax.gradient.graddrop: the masks in numpy, the expectation, agreement, the leak, and plain training at leak 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.gradient.problem import KEY, C, data, flat, grad_fn_of, part, unflat


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def masks(gradients, uniform):
    """The paper's P and M, coordinate by coordinate."""
    found = np.zeros(gradients.shape, bool)
    for at in np.ndindex(uniform.shape):
        g = gradients[(slice(None), *at)]
        share = 0.5 * (1 + g.sum() / np.abs(g).sum()) if np.abs(g).sum() > 0 else 0.5
        for i, value in enumerate(g):
            found[(i, *at)] = (share > uniform[at] and value > 0) or (share < uniform[at] and value < 0) or value == 0
    return found


def updated(link, *, grads=None, key=KEY):
    params, _, y, _ = data()

    @jax.jit
    def update(params, key):
        grad_fn = grad_fn_of()
        own = grad_fn(params) if grads is None else grads
        return link.update(own, link.init(params), params, grad_fn=grad_fn, key=key, labels=jnp.asarray(y), num_classes=C)

    return update(params, key)


def test_the_mask_is_the_paper_s(float64):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 3, 40)) * (rng.random((5, 3, 40)) < 0.7)  # some are zero
    gradients[:, 0, :3] = 0  # 0/0
    uniform = rng.random((3, 40))
    found = pj.graddrop_mask(jnp.asarray(gradients), jnp.asarray(uniform))
    np.testing.assert_array_equal(found, masks(gradients, uniform))


def test_the_link_keeps_one_sign_of_every_coordinate(float64):
    """Class 3 is absent: it has no say. What comes out is the sum of the positive or of the negative class gradients."""
    params, x, y, _ = data()
    gradients = np.array([part(params, x, y, y == c) for c in range(C)])
    up, down = np.maximum(gradients, 0).sum(0), np.minimum(gradients, 0).sum(0)
    updates, state = updated(pj.graddrop())
    found = flat(updates)
    is_up, is_down = np.isclose(found, up, rtol=1e-9, atol=1e-12), np.isclose(found, down, rtol=1e-9, atol=1e-12)
    assert (is_up | is_down).all() and (is_up & (up > 1e-6)).sum() > 10 and (is_down & (down < -1e-6)).sum() > 10
    assert int(state.evaluations) == C + 1
    leaky, _ = updated(pj.graddrop(leak=0.25))
    np.testing.assert_allclose(flat(leaky), 0.25 * gradients.sum(0) + 0.75 * found, rtol=1e-9, atol=1e-12)  # same U


def test_the_expectation_is_the_plain_gradient(float64):
    """E_U[g̃] = P Σ g⁺ + (1 − P) Σ g⁻ = Σ g."""
    params, x, y, _ = data()
    gradients = {name: np.stack(parts) for name, parts in _by_class(params, x, y).items()}
    keys = jax.random.split(KEY, 20000)
    draws = jax.jit(jax.vmap(lambda key: jax.tree.map(lambda g: g.sum(0), pj.graddrop_gradients(gradients, key))))(keys)
    for name, g in gradients.items():
        found, size = np.asarray(draws[name]), np.abs(g).sum(0)
        np.testing.assert_array_less(np.abs(found.mean(0) - g.sum(0)), 5 * size / np.sqrt(len(keys)) + 1e-12)
        assert found.std(0).max() > 0.1 * size.max()


def _by_class(params, x, y):
    each = [unflat(part(params, x, y, y == c), params) for c in range(C)]
    return {name: [one[name] for one in each] for name in params}


def test_where_all_agree_nothing_is_dropped():
    """Rounding drops nothing: P of these coordinates is exactly 0 or 1, and U may be as close to 1 as float32 goes."""
    rng = np.random.default_rng(1)
    agree = np.abs(rng.normal(size=(7, 1000))).astype(np.float32) * np.sign(rng.normal(size=1000)).astype(np.float32)
    for uniform in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        assert pj.graddrop_mask(jnp.asarray(agree), jnp.full([1000], uniform, jnp.float32)).all()


def test_leak_1_is_plain_training_bit_for_bit():
    grads = {"a": jnp.full([5, 6], 0.3), "b": jnp.full([6, C], -0.1), "c": jnp.zeros(C)}
    np.testing.assert_array_equal(flat(updated(pj.graddrop(leak=1.0), grads=grads)[0]), flat(grads))


def test_the_key_decides_and_chunks_change_nothing(float64):
    one, other = (flat(updated(pj.graddrop(), key=jax.random.key(k))[0]) for k in (0, 1))
    assert (one != other).mean() > 0.1
    np.testing.assert_allclose(flat(updated(pj.graddrop(chunk=2), key=jax.random.key(0))[0]), one, rtol=1e-9, atol=1e-12)


def test_errors_name_the_call():
    params, _, y, _ = data()
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    link, given = pj.graddrop(), dict(grad_fn=grad_fn_of(), key=KEY, labels=jnp.asarray(y), num_classes=C)
    for name in given:
        with pytest.raises(ValueError, match=f"graddrop needs `{name}`, got none: call tx.update"):
            link.update(params, link.init(params), params, **{**given, name: None})
    with pytest.raises(ValueError, match="graddrop needs 0 <= leak <= 1, got 1.5"):
        pj.graddrop(leak=1.5)
    with pytest.raises(ValueError, match="graddrop needs groups='classes', 'domains' or a number"):
        pj.graddrop(groups=-1)
