"""perturbjax.analysis.explain: Grad-CAM against closed forms and numpy, features, t-SNE's form, figures that show what they are given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.analysis.explain import cam_figure, grad_cam, penultimate, tsne, tsne_figure
from perturbjax.analysis.landscape import as_svg
from perturbjax.analysis.metrics import groups_by_frequency
from perturbjax.models import create

RNG = np.random.default_rng(0)
SHARED = dict(num_classes=3, mean=(0.5,), std=(0.2,))
IMAGES = RNG.random((4, 8, 8, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def cnn():
    """(model, params, stats), with any numbers for the variables."""
    model, random = create("cnn", width=3, num_stages=1, **SHARED), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    made = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.0, 0.5, leaf.shape), leaf.dtype), shapes)
    return model, made["params"], jax.tree.map(jnp.abs, made["batch_stats"])


def test_before_pooling_and_a_linear_layer_it_is_the_class_activation_map(cnn):
    """Zhou et al.'s map: relu(Σ_k W_ck A_k)/hw."""
    model, params, stats = cnn
    run = jax.jit(lambda x: grad_cam(model, params, x, LABELS, site="stage1", stats=stats))
    maps = model.apply({"params": params, "batch_stats": stats}, IMAGES, stop="stage1")
    rows = np.asarray(params["logits"]["kernel"], np.float64).T[LABELS]
    small = np.maximum(np.einsum("bhwk,bk->bhw", np.asarray(maps, np.float64), rows), 0) / 16
    assert 0.1 < (small > 0).mean() < 1
    np.testing.assert_allclose(
        run(IMAGES), jax.image.resize(small.astype(np.float32), (4, 8, 8), "bilinear"), rtol=1e-4, atol=1e-5
    )


def test_it_is_the_equation_where_the_gradient_is_taken_by_hand(float64):
    """u = tanh(pooled(A²) W): by the chain rule in numpy, enlarged by numpy's own interpolation."""
    kernel, pixels = RNG.normal(size=(2, 3)), RNG.normal(size=(4, 3, 3, 2))
    net = {"stage1": lambda w, x: x[:, ::2, ::2], "logits": lambda w, a: jnp.tanh((a**2).mean((1, 2)) @ w)}
    images = np.repeat(np.repeat(pixels, 2, axis=1), 2, axis=2)
    got = np.asarray(grad_cam(net, jnp.asarray(kernel), jnp.asarray(images), LABELS))
    assert got.dtype == np.float64 and got.shape == (4, 6, 6)
    hidden = (pixels**2).mean((1, 2)) @ kernel
    slope = 1 - np.tanh(hidden[np.arange(4), LABELS]) ** 2
    gradient = slope[:, None, None, None] * kernel.T[LABELS][:, None, None] * 2 * pixels / 9
    small = np.maximum((pixels * gradient.mean((1, 2), keepdims=True)).sum(-1), 0)
    assert 0.1 < (small > 0).mean() < 1
    at = (np.arange(6) + 0.5) / 2 - 0.5  # where the large grid's centres lie on the small one
    along = lambda values: np.interp(at, np.arange(3), values)
    expected = np.apply_along_axis(along, 2, np.apply_along_axis(along, 1, small))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_every_image_has_a_map_of_its_own_and_of_its_class(cnn):
    model, params, stats = cnn
    run = jax.jit(lambda x, y: grad_cam(model, params, x, y, stats=stats))
    whole = run(IMAGES, LABELS)
    for i in range(4):
        np.testing.assert_allclose(run(IMAGES[i : i + 1], LABELS[i : i + 1])[0], whole[i], rtol=1e-5, atol=1e-6)
    assert np.abs(run(IMAGES, (LABELS + 1) % 3) - whole).max() > 1e-3


def test_sites_that_are_no_maps_and_bad_shapes_are_named(cnn):
    model, params, stats = cnn
    look = partial(grad_cam, model, params, stats=stats)
    with pytest.raises(ValueError, match=r"grad_cam needs a site with values \[B, h, w, K\], got 'features' with \(4, 6\)"):
        look(IMAGES, LABELS, site="features")
    with pytest.raises(ValueError, match="line needs site to be one of its names, got 'stage7'"):
        look(IMAGES, LABELS, site="stage7")
    with pytest.raises(ValueError, match=r"grad_cam needs images .*got \(8, 8, 1\)"):
        look(IMAGES[0], LABELS[:1])
    with pytest.raises(ValueError, match="labels .B. of integers, got .*float"):
        look(IMAGES, LABELS.astype(np.float32))


def test_features_come_in_batches_and_from_bytes(cnn):
    model, params, stats = cnn
    whole = model.apply({"params": params, "batch_stats": stats}, IMAGES, stop="features")
    got = penultimate(model, params, IMAGES, stats=stats, batch_size=3)
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)
    raw = np.round(255 * IMAGES).astype(np.uint8)
    from_bytes = penultimate(model, params, raw, stats=stats)
    np.testing.assert_allclose(from_bytes, penultimate(model, params, raw / np.float32(255), stats=stats), rtol=1e-5, atol=1e-6)
    assert penultimate(model, params, IMAGES, stats=stats, site="stage1").shape == (4, 4 * 4 * 6)
    with pytest.raises(ValueError, match="penultimate needs batch_size >= 1, got 0"):
        penultimate(model, params, IMAGES, stats=stats, batch_size=0)


def test_texts_have_features_too():
    model = create("bilstm", num_classes=2, vocabulary_size=9, embedding=4, width=2)
    tokens = jnp.asarray([[3, 4, 5], [2, 6, 0]], jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    got = penultimate(model, variables["params"], np.asarray(tokens))
    np.testing.assert_allclose(got, model.apply(variables, tokens, stop="features"), rtol=1e-5, atol=1e-6)


def test_t_sne_keeps_far_clusters_apart_and_is_repeatable():
    labels = np.repeat([0, 1, 2], 8)
    features = 50 * np.eye(3)[labels] + RNG.normal(size=(24, 3))
    points = tsne(features)
    np.testing.assert_array_equal(points, tsne(features))
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(24, np.inf))
    assert (labels[apart.argmin(1)] == labels).all()  # the nearest is of the own cluster
    with pytest.raises(ValueError, match=r"tsne needs features \[N, d\] of at least 4 samples, got \(3, 3\)"):
        tsne(features[:3])
    with pytest.raises(ValueError, match="tsne needs perplexity > 0"):
        tsne(features, perplexity=0)


def test_the_figures_show_the_nets_the_groups_and_the_classes():
    labels, points = np.array([0, 1, 2, 2]), {name: RNG.normal(size=(4, 2)) for name in ("ce", "la")}
    groups = groups_by_frequency([50, 20, 5])
    svg = as_svg(tsne_figure(points, labels, groups, ("cat", "dog", "eel")), "t", "t")
    for text in ("ce", "la", "head", "tail", "cat", "eel"):
        assert f">{text}<" in svg
    assert ">dog<" not in svg  # neither head nor tail
    balanced = as_svg(tsne_figure(points, labels, None), "t", "t")
    assert ">head<" not in balanced and all(f">{c}<" in balanced for c in range(3))
    maps = np.stack([np.zeros([8, 8]), np.ones([8, 8])])  # an empty map too
    figure = cam_figure(IMAGES[:2], ["cat (head)", "eel"], {"ce": (maps, ["cat", "✗ dog"]), "la": (maps, ["eel", "eel"])})
    svg = as_svg(figure, "c", "c")
    for text in ("image", "ce", "la", "cat (head)", "✗ dog"):
        assert f">{text}<" in svg
    assert svg.count("<image") == 2 * 3  # an image, or a map over it, in each cell
    assert svg == as_svg(
        cam_figure(IMAGES[:2], ["cat (head)", "eel"], {"ce": (maps, ["cat", "✗ dog"]), "la": (maps, ["eel", "eel"])}), "c", "c"
    )
