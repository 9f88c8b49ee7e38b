"""perturbjax.analysis.gradient_view: δ_c of each kind of method against formulas written out, and the figure's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.analysis.gradient_view import Variations, gradient_perturbation, gradient_plot, gradient_variations
from tests.gradient.problem import KEY, MODEL, B, C, data, flat, part

COUNT = np.array([5, 4, 3, 0])  # class 3 is absent
SCALE = B / np.maximum(COUNT, 1)


@pytest.fixture(autouse=True)
def float64(request):
    with jax.enable_x64("float32" not in request.node.name):
        yield


def view(methods, *, params=None, x=None, **given):
    own, inputs, y, _ = data()
    params, x = own if params is None else params, inputs if x is None else x
    settings = dict(num_classes=C, class_counts=np.array([10, 8, 6, 4]), num_examples=B, key=KEY)
    run = lambda p: gradient_perturbation(methods, MODEL, p, pj.batch(x, jnp.asarray(y)), **{**settings, **given})
    return jax.jit(run)(params)


def rows(tree):
    """[C, P] of leaves [C, ...]."""
    return np.stack([flat(jax.tree.map(lambda leaf, c=c: leaf[c], tree)) for c in range(C)])


def class_gradients(params=None):
    """g_c by hand: class means of ∇ℓ_i."""
    own, x, y, _ = data()
    return np.stack([SCALE[c] * part(own if params is None else params, x, y, y == c) for c in range(C)])


def check(found, wanted):
    """The view against g̃ [C, P]: δ, relative variation, gain; zeros for the absent class."""
    g = class_gradients()
    np.testing.assert_array_equal(found.present, COUNT > 0)
    np.testing.assert_allclose(rows(found.gradients), g, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(rows(found.delta)[:3], (wanted - g)[:3], rtol=1e-7, atol=1e-11)
    norm = lambda m: np.linalg.norm(m[:3], axis=1)
    np.testing.assert_allclose(found.norm[:3], norm(g), rtol=1e-8)
    np.testing.assert_allclose(found.relative[:3], norm(wanted - g) / norm(g), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found.gain[:3], norm(wanted) / norm(g) - 1, rtol=1e-6, atol=1e-9)
    for name in ("norm", "relative", "gain"):
        assert getattr(found, name)[3] == 0


def moved(params, step):
    """params + step, a flat vector."""
    found, at = {}, 0
    for name in sorted(params):
        size = params[name].size
        found[name], at = params[name] + step[at : at + size].reshape(params[name].shape), at + size
    return found


def test_sam_is_each_class_s_gradient_where_the_whole_batch_climbs():
    params, x, y, _ = data()
    g = part(params, x, y, np.ones(B))
    check(view(pj.sam(radius=0.7)), class_gradients(moved(params, 0.7 * g / np.linalg.norm(g))))


def test_clipping_is_each_class_s_own():
    g = class_gradients()
    norms = np.linalg.norm(g, axis=1)[:3]
    bound = float(np.median(norms))  # above it for one class, below for another
    factor = np.minimum(1, bound / norms)
    assert factor.min() < 1 and (factor == 1).sum() == 2
    wanted = g.copy()
    wanted[:3] *= factor[:, None]
    found = view(pj.gradient_clipping(bound=bound))
    check(found, wanted)
    np.testing.assert_allclose(found.gain[:3], factor - 1, atol=1e-9)


@pytest.mark.optax_promotes  # add_noise divides a float by an int
def test_noise_is_the_same_for_every_class():
    params = data()[0]
    zeros = jax.tree.map(jnp.zeros_like, params)
    link = optax.add_noise(0.3, 0.55, KEY)
    noise = flat(link.update(zeros, link.init(params))[0])
    found = view(pj.gradient_noise(eta=0.3))
    check(found, class_gradients() + noise[None])
    np.testing.assert_allclose(found.relative[:3] * found.norm[:3], np.linalg.norm(noise), rtol=1e-9)


def test_pcgrad_is_each_class_s_gradient_after_surgery():
    params, x, y, _ = data()
    shares = np.stack([part(params, x, y, y == c) for c in range(C)])
    after = np.asarray(pj.pcgrad_gradients(jnp.asarray(shares), KEY))  # tested against numpy in test_pcgrad.py
    found = view(pj.pcgrad())
    check(found, SCALE[:, None] * after)
    assert (np.asarray(found.gain[:3]) <= 1e-12).all() and float(found.relative.max()) > 0.01  # projections shorten


def test_lpg_is_the_pull_back_of_its_logit_perturbation():
    """δ_c = (1/n_c) Σ_{i∈c} J_iᵀ δ^h_c (eq. 10), with the closed form of eqs. 13 and 14."""
    params, x, y, _ = data()
    sign = jnp.array([1.0, -1.0, 1.0, -1.0])
    forward = lambda p: jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]
    u = np.asarray(forward(params))
    h = np.exp(u) / np.exp(u).sum(1, keepdims=True) - np.eye(C)[y]
    wanted, pull = class_gradients(), jax.vjp(forward, params)[1]
    for c in range(3):
        mean = h[y == c].mean(0)
        delta = float(sign[c]) * 0.2 * mean / np.linalg.norm(mean)
        wanted[c] += flat(pull(jnp.asarray((y == c)[:, None] * delta[None] / COUNT[c]))[0])
    found = view(pj.lpg(bound=0.2, split="all", direction=sign))
    check(found, wanted)
    assert found.gain[0] > 0 > found.gain[1]


def test_dp_sgd_is_the_mean_of_the_class_s_clipped_gradients():
    params, x, y, _ = data()
    each = np.stack([B * part(params, x, y, np.arange(B) == i) for i in range(B)])
    norms = np.linalg.norm(each, axis=1)
    bound = float(np.median(norms))
    cut = each * np.minimum(1, bound / norms)[:, None]
    wanted = np.stack([cut[y == c].mean(0) if c < 3 else 0 * cut[0] for c in range(C)])
    check(view(pj.dp_sgd(bound=bound, noise_multiplier=0.0)), wanted)


def test_graddrop_at_full_leak_and_the_empty_chain_change_nothing():
    for methods in (pj.graddrop(leak=1.0), ()):
        found = view(methods)
        check(found, class_gradients())
        np.testing.assert_array_equal(found.relative, 0.0)
    with pytest.raises(ValueError, match="gradient_perturbation needs pcgrad and graddrop with groups='classes', got 2 groups"):
        view(pj.pcgrad(groups=2))
    assert view(pj.graddrop()).relative.max() > 0.01


def test_methods_that_act_together_act_in_their_order():
    """SAM on a smoothed loss, then clipping: the climb follows the smoothed gradient, and what came out is clipped by class."""
    params, x, y, _ = data()
    smooth = 0.3

    def smoothed(p, chosen):
        u = jax.nn.log_softmax(jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None])
        targets = (1 - smooth) * jnp.asarray(np.eye(C)[y]) + smooth / C
        return (-(targets * u).sum(1) * chosen).sum()

    grad = jax.jit(jax.grad(smoothed))
    g = flat(grad(params, np.full(B, 1 / B)))
    there = moved(params, 0.5 * g / np.linalg.norm(g))
    wanted = np.stack([flat(grad(there, (y == c) / max(COUNT[c], 1))) for c in range(C)])
    norms = np.linalg.norm(wanted, axis=1)
    wanted *= np.minimum(1, 0.4 / np.maximum(norms, 1e-9))[:, None]
    assert (norms[:3] > 0.4).any()
    check(view([pj.label_smoothing(weight=smooth), pj.sam(radius=0.5), pj.gradient_clipping(bound=0.4)]), wanted)


LINKS = [f for f in vars(pj).values() if hasattr(f, "coordinates") and {"gradient", "parameter"} & set(f.coordinates.target)]


@pytest.mark.slow
@pytest.mark.optax_promotes  # add_noise
@pytest.mark.parametrize("make", LINKS, ids=lambda f: f.__name__)
def test_every_link_of_the_optimiser_can_be_looked_at_in_float32(make):
    found = view(make(), params=jax.tree.map(jnp.float32, data()[0]), x=jnp.float32(data()[1]))
    for values in (found.norm, found.relative, found.gain):
        assert np.isfinite(values).all() and values[3] == 0
    assert (found.norm[:3] > 0).all()


def test_over_a_data_set_in_float32_statistics_are_gathered_first():
    """Without the first pass a split by accuracy would leave every class alone; at one batch the ratios are that batch's."""
    params, x, y, _ = data()
    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, x))
    given = dict(num_classes=C, batch_size=B)
    lpg = gradient_variations(pj.lpg(bound=0.1), MODEL, params, x, y, **given)
    assert (lpg.relative[:3] > 0.01).all() and (lpg.gain[:3] > 0).any() and (lpg.gain[:3] < 0).any()
    clip = gradient_variations(pj.gradient_clipping(bound=0.3), MODEL, params, x, y, **given)
    norms = np.linalg.norm(class_gradients(), axis=1)[:3]
    np.testing.assert_allclose(clip.norm[:3], norms, rtol=1e-5)
    np.testing.assert_allclose(clip.relative[:3], 1 - np.minimum(1, 0.3 / norms), atol=1e-5)
    assert all(np.isnan(values[3]) for values in clip)  # class 3 is in no batch


def test_the_figure_has_a_row_for_each_method_and_a_column_for_each_data_set():
    found = lambda k: Variations(np.arange(4.0) * k, np.array([-0.1, 0.1, 0.2, np.nan]), np.ones(4))
    panels = {"balanced": ([5, 5, 5, 5], {"sam": found(1), "clip": found(0)}), "long tail": ([50, 9, 3, 1], {"sam": found(2)})}
    svg = gradient_plot(panels)
    assert svg == gradient_plot(panels) and svg.startswith("<svg")
    assert all(f">{text}<" in svg for text in ("sam", "clip", "balanced", "long tail"))
