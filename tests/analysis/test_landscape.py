"""perturbjax.analysis.landscape: lengths of directions, losses along lines and over planes, figures that show them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.analysis.landscape import (
    as_svg,
    gradient_direction,
    line_figure,
    line_losses,
    plane_figure,
    plane_losses,
    random_direction,
)
from perturbjax.analysis.sharpness import data_loss
from tests.analysis.test_sharpness import by_hand, net, problem

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def weights():
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(3, 3, 4, 5)) * np.array([0.0, 0.1, 1, 10, 100])  # the first filter is zero
    return {"kernel": jnp.asarray(kernel), "dense": jnp.asarray(rng.normal(size=(6, 2))), "bias": jnp.asarray([3.0, 4.0])}


def test_every_filter_of_a_random_direction_is_as_long_as_the_net_s_own(float64):
    w = weights()
    d = random_direction(w, KEY)
    length = lambda x: np.linalg.norm(np.asarray(x).reshape(-1, x.shape[-1]), axis=0)
    for name in ("kernel", "dense"):
        np.testing.assert_allclose(length(d[name]), length(w[name]), rtol=1e-9)
        inside = np.asarray(d[name]).reshape(-1, w[name].shape[-1])[:, -1]
        assert np.std(inside / np.linalg.norm(inside)) > 0.1  # a random one, not the filter itself
    np.testing.assert_array_equal(d["bias"], 0.0)
    np.testing.assert_allclose(np.linalg.norm(random_direction(w, KEY, vectors="scale")["bias"]), 5.0, rtol=1e-9)


def test_other_ways_to_scale(float64):
    w = weights()
    layer = random_direction(w, KEY, normalise="layer")
    np.testing.assert_allclose(np.linalg.norm(layer["kernel"]), np.linalg.norm(w["kernel"]), rtol=1e-9)
    raw = random_direction(w, KEY, normalise="none")["kernel"]
    assert 0.8 < float(raw.std()) < 1.2
    other = random_direction(w, jax.random.key(1), normalise="none")["kernel"]
    assert abs(np.corrcoef(raw.ravel(), other.ravel())[0, 1]) < 0.3
    with pytest.raises(ValueError, match="random_direction needs normalise to be one of its names, got 'weight'"):
        random_direction(w, KEY, normalise="weight")


def test_scaling_a_layer_and_the_next_one_back_leaves_the_curve_as_it_is(float64):
    """Li et al.'s reason for the normalisation, for a net of two linear layers with a ReLU between."""
    relu = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    rng = np.random.default_rng(0)
    w = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 3)))}
    scaled = {"a": 10 * w["a"], "b": w["b"] / 10}
    loss = data_loss(relu, rng.normal(size=(9, 3)), rng.integers(0, 3, 9))
    places = np.linspace(-1, 1, 5)
    one, other = (line_losses(loss, p, random_direction(p, KEY), places) for p in (w, scaled))
    np.testing.assert_allclose(one, other, rtol=1e-9)
    raw, far = (line_losses(loss, p, random_direction(p, KEY, normalise="none"), places) for p in (w, scaled))
    assert np.abs(raw - far).max() > 0.1


def test_lines_and_planes_are_the_losses_there(float64):
    params, x, y = problem()
    loss = data_loss(net, x, y, batch_size=4)
    first, second = (random_direction(params, jax.random.key(k), vectors="scale") for k in (1, 2))
    at = lambda s, t: by_hand(jax.tree.map(lambda w, a, b: w + s * a + t * b, params, first, second), x, y)
    places = np.array([-0.5, 0.0, 0.25])
    np.testing.assert_allclose(line_losses(loss, params, first, places), [at(t, 0) for t in places], rtol=1e-9)
    found = plane_losses(loss, params, first, second, places, [0.0, 1.0])
    np.testing.assert_allclose(found, [[at(s, t) for s in places] for t in (0.0, 1.0)], rtol=1e-9)


def test_up_the_gradient_the_loss_rises_by_its_length(float64):
    params, x, y = problem()
    loss = data_loss(net, x, y)
    d = gradient_direction(loss, params)
    np.testing.assert_allclose(sum(float((v**2).sum()) for v in d.values()), 1, rtol=1e-9)
    low, high = line_losses(loss, params, d, [-1e-5, 1e-5])
    norm = np.sqrt(sum(float((v**2).sum()) for v in loss.gradient(params).values()))
    assert (high - low) / 2e-5 == pytest.approx(norm, rel=1e-6)


def test_figures_name_the_nets_and_are_the_same_every_time():
    t = np.linspace(-1, 1, 9)
    lines = {"along the gradient": {"ce": (t, np.stack([t**2 + 0.1, t**2 + 0.2])), "sam": (t, t[None] ** 2 / 2 + 0.1)}}
    draw = lambda: as_svg(line_figure(lines), "lines", "Loss along lines")
    assert (
        draw() == draw()
        and draw().startswith("<svg")
        and all(f">{name}<" in draw() for name in ("ce", "sam", "along the gradient"))
    )
    bowl = t[None] ** 2 + t[:, None] ** 2 + 0.1
    svg = as_svg(plane_figure({"ce": (t, t, bowl), "sam": (t, t, 0.5 * bowl), "flat": (t, t, 0 * bowl + 0.3)}), "plane", "Loss")
    assert svg.startswith("<svg") and ">flat<" in svg
