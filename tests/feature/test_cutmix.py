"""perturbjax.feature.cutmix: pixels and labels by the same area, boxes against the authors' recipe, whose draw it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, H, W = 3, 8, 6, 10
MODEL = pj.line(lambda w, x: x.reshape(x.shape[0], -1) @ w)
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(size=(B, H, W, 2)).astype(np.float32), RNG.integers(0, C, B)
PARAMS = jnp.asarray(RNG.normal(size=(H * W * 2, C)), jnp.float32)


@functools.cache
def program(**settings):
    """One compiled pass for these settings: data, key -> (metrics, what a link behind CutMix sees)."""
    look = lambda flow, rest, s, c: (flow, s, {"value": flow.value, "targets": flow.targets, "labels": flow.labels})
    seen = pj.Perturbation("input", lambda context: (), look, name="seen")
    made = pj.objective(MODEL, pj.chain(pj.cutmix(**settings), seen), num_classes=C)
    return jax.jit(lambda data, key: made(PARAMS, made.init(PARAMS, data.inputs), data, key=key)[1].metrics)


def run(key=0, *, x=X, index=None, **settings):
    data = pj.batch(jnp.asarray(x), jnp.asarray(Y), index=jnp.arange(B) if index is None else index)
    found = program(**settings)(data, jax.random.key(key))
    return {name.removeprefix("seen/"): np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("boxes", ["batch", "sample"])
def test_pixels_and_labels_are_mixed_by_the_same_area(boxes):
    """Every pixel comes from the image itself or from one partner, who has a box or all around it, and less than half; the label follows."""
    swapped = 0
    for seed in range(32):
        out = run(seed, probability=1.0, boxes=boxes)
        foreign = (out["value"] != X).any(3)
        areas = []
        for i in range(B):
            box = lambda pixels: pixels.any(1)[:, None] & pixels.any(0)[None]
            around = (box(foreign[i]) != foreign[i]).any()
            swapped += around
            rows, columns = (~foreign[i] if around else foreign[i]).any(1), (~foreign[i] if around else foreign[i]).any(0)
            np.testing.assert_array_equal(foreign[i] ^ around, rows[:, None] & columns[None])  # a box
            for side in (rows, columns):
                assert np.abs(np.diff(side.astype(int))).sum() <= 2  # in one piece
            partners = [j for j in range(B) if (out["value"][i][foreign[i]] == X[j][foreign[i]]).all()]
            share = 1 - foreign[i].mean()
            wanted = [share * np.eye(C)[Y[i]] + (1 - share) * np.eye(C)[Y[j]] for j in partners]
            assert any(np.allclose(out["targets"][i], t, atol=1e-6) for t in wanted)
            assert share >= 0.5 and out["labels"][i] == Y[i]
            areas.append(share)
        assert out["cutmix/weight"] <= np.mean(areas) + 1e-6  # a sample may be its own partner
        if boxes == "batch":
            mixed = [a for i, a in enumerate(areas) if foreign[i].any()]
            np.testing.assert_allclose(mixed, mixed[:1] * len(mixed), atol=1e-6)
    assert swapped > 0


def test_boxes_are_those_of_the_papers_recipe():
    """The share of the box has the distribution of the authors' lines, transcribed to numpy."""
    boxes = np.asarray(jax.jit(lambda keys: pj.cutmix_boxes(keys, 32, 32))(jax.random.split(jax.random.key(0), 4000)))
    rng, shares = np.random.default_rng(0), []
    for _ in range(40_000):
        side = int(32 * np.sqrt(1 - rng.beta(1, 1)))
        cx, cy = rng.integers(32), rng.integers(32)
        edge = lambda c, s=side: np.clip(c + s // 2, 0, 32) - np.clip(c - s // 2, 0, 32)
        shares.append(edge(cx) * edge(cy) / 1024)
    expected = np.quantile(shares, (np.arange(4000) + 0.5) / 4000)
    np.testing.assert_allclose(np.sort(boxes.mean((1, 2))), expected, atol=0.03)


def test_boxes_of_samples_belong_to_their_position_in_the_data_set():
    foreign = lambda index: (run(index=index, probability=1.0, boxes="sample")["value"] != X).any(3)
    one, other = foreign(jnp.arange(B)), foreign(jnp.arange(B)[::-1])
    both = one.any((1, 2)) & other[::-1].any((1, 2))  # not one's own partner
    assert both.sum() >= 3
    np.testing.assert_array_equal(one[both], other[::-1][both])


def test_it_happens_with_the_probability_asked_for():
    mixed = np.mean([(run(s, probability=0.3, boxes="sample")["value"] != X).any((1, 2, 3)) for s in range(12)])
    assert 0.1 < mixed < 0.4  # an eighth have themselves as partner, and some boxes are empty
    off = run(probability=0.0)
    np.testing.assert_array_equal(off["value"], X)
    np.testing.assert_array_equal(off["targets"], np.eye(C)[Y])


def test_errors_say_what_was_given():
    with pytest.raises(
        ValueError, match=r"cutmix needs images \[B, height, width, ...\] of floats at the input, got float32 \(8, 120\)"
    ):
        run(x=X.reshape(B, -1))
    with pytest.raises(ValueError, match="cutmix needs alpha > 0, got 0"):
        pj.cutmix(alpha=0)
    with pytest.raises(ValueError, match="cutmix needs 0 <= probability <= 1, got 2"):
        pj.cutmix(probability=2)
    with pytest.raises(ValueError, match="cutmix needs boxes to be one of its names, got 'pixel'"):
        pj.cutmix(boxes="pixel")
