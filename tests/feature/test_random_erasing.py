"""perturbjax.feature.random_erasing: one box an image, its sizes and shapes, its filling, whose draw it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

B, H, W = 8, 12, 10
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(B, H, W, 3)).astype(np.float32)
MODEL = pj.line(lambda w, x: x.reshape(x.shape[0], -1)[:, :2] + w)


@functools.cache
def program(**settings):
    """One compiled pass for these settings: data, key -> metrics."""
    seen = pj.Perturbation("input", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made, zero = pj.objective(MODEL, pj.chain(pj.random_erasing(**settings), seen), num_classes=2), jnp.zeros([1, 2])
    return jax.jit(lambda data, key: made(zero, made.init(zero, data.inputs), data, key=key)[1].metrics)


def run(key=0, *, x=X, index=None, **settings):
    """(the images afterwards, the share that was erased)."""
    data = pj.batch(jnp.asarray(x), jnp.zeros(len(x), jnp.int32), index=jnp.arange(len(x)) if index is None else index)
    found = program(**settings)(data, jax.random.key(key))
    return np.asarray(found["seen/value"]), float(found["random_erasing/erased"])


def test_one_box_of_each_image_is_overwritten_and_nothing_else():
    value, erased = run(probability=1.0)
    changed = (value != X).any(3)
    for one in changed:
        assert one.any() and 0.01 < one.mean() < 0.5
        np.testing.assert_array_equal(one, one.any(1)[:, None] & one.any(0)[None])
    assert erased == pytest.approx(changed.mean()) and value.min() >= 0 and value.max() <= 1
    assert len({one.tobytes() for one in changed}) == B  # a box for each
    inside = value[changed]
    assert abs(inside.mean() - 0.5) < 0.1 and abs(inside.std() - 12**-0.5) < 0.05


def test_sizes_and_shapes_are_those_asked_for():
    """Algorithm 1 in numpy, on an image so large that rounding is nothing."""
    size = 200
    draw = jax.jit(jax.vmap(lambda key: (lambda m: (m.any(1).sum(), m.any(0).sum()))(pj.erasing_box(key, size, size))))
    h, w = (np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), 3000)))
    rng, shares, ratios = np.random.default_rng(0), [], []
    while len(shares) < 20_000:
        area, ratio = rng.uniform(0.02, 0.4), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        if np.sqrt(area * ratio) < 1 and np.sqrt(area / ratio) < 1:
            shares.append(area)
            ratios.append(ratio)
    at = (np.arange(3000) + 0.5) / 3000
    np.testing.assert_allclose(np.sort(h * w / size**2), np.quantile(shares, at), atol=0.02)
    np.testing.assert_allclose(np.log(np.sort(h / w)), np.log(np.quantile(ratios, at)), atol=0.15)


def test_a_box_that_never_fits_leaves_the_image_alone():
    value, erased = run(probability=1.0, smallest=1.0, largest=1.0, aspect=1.0)
    np.testing.assert_array_equal(value, X)
    assert erased == 0


def test_mean_filling_is_the_images_own_by_channel():
    value, _ = run(probability=1.0, fill="mean")
    for before, after in zip(X, value, strict=True):
        changed = (after != before).any(2)
        np.testing.assert_allclose(after[changed], np.broadcast_to(before.mean((0, 1)), after[changed].shape), atol=1e-6)


def test_draws_belong_to_the_position_in_the_data_set_and_happen_as_often_as_asked():
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    one, _ = run(index=jnp.arange(B))
    other, _ = run(x=X[order], index=jnp.arange(B)[order])
    np.testing.assert_array_equal(other, one[order])
    often = np.mean([(run(s)[0] != X).any((1, 2, 3)) for s in range(12)])
    assert 0.35 < often < 0.65
    np.testing.assert_array_equal(run(probability=0.0)[0], X)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match=r"random_erasing needs images .* Write mixup for anything else"):
        run(x=X.reshape(B, -1))
    with pytest.raises(ValueError, match="random_erasing needs 0 <= largest <= 1, got 40"):
        pj.random_erasing(largest=40)
    with pytest.raises(ValueError, match="random_erasing needs fill to be one of its names, got 'black'"):
        pj.random_erasing(fill="black")
