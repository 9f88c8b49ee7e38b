"""perturbjax.activation.dropblock: blocks of the given size, the share of positions, against a transcription with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import perturbjax as pj

masks = jax.jit(pj.dropblock_mask, static_argnames=("shape", "block_size", "border", "share_channels", "axis_name"))
MAPS = pj.line({"stage1": lambda w, x: x + w, "logits": lambda w, a: a.mean([1, 2])})


def loops(starts, height, width, b, border):
    """k [B, H, W, C] from where blocks start, in float64, block by block."""
    kept = np.ones((starts.shape[0], height, width, starts.shape[3]))
    before = 0 if border else (b - 1) // 2  # without border correction a place is the middle of its block
    for n, i, j, c in zip(*np.nonzero(starts)):
        for row in range(i - before, i - before + b):
            for column in range(j - before, j - before + b):
                if 0 <= row < height and 0 <= column < width:
                    kept[n, row, column, c] = 0
                else:
                    assert not border
    return kept


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("b", [1, 2, 3, 5])
def test_blocks_are_those_of_the_loops(b, border):
    places = (8 - b + 1, 6 - b + 1) if border else (8, 6)
    starts = np.random.default_rng(b).random((2, *places, 3)) < 0.06
    assert starts.any()
    kept = pj.dropblock_kept(jnp.asarray(starts), (8, 6), block_size=b, border=border)
    np.testing.assert_array_equal(kept, loops(starts, 8, 6, b, border).astype(bool))


def test_one_start_is_one_whole_block_wherever_it_may_be():
    for border, inside in ((True, 4), (False, None)):
        n = 7 - 4 * border + border
        starts = jnp.eye(n * n, dtype=bool).reshape(n * n, n, n, 1)  # one sample for each place
        gone = ~np.asarray(pj.dropblock_kept(starts, (7, 7), block_size=4, border=border))[..., 0]
        rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
        np.testing.assert_array_equal(gone.sum((1, 2)), rows * columns)  # a rectangle, without holes
        if inside:
            assert (rows == inside).all() and (columns == inside).all()
        else:
            assert rows.min() == 2 and rows.max() == 4  # cut at the border


def test_the_mask_is_the_transcription_from_the_same_starts():
    """The draws of `per_sample_keys`, then γ, blocks and the factor in float64."""
    key, index, (h, w, c), b, rate = jax.random.key(3), jnp.array([5, 0, 17]), (9, 8, 4), 3, 0.2
    gamma = rate / b**2 * h * w / ((h - b + 1) * (w - b + 1))
    np.testing.assert_allclose(pj.dropblock_gamma((h, w), rate=rate, block_size=b), gamma, rtol=1e-6)
    np.testing.assert_allclose(pj.dropblock_gamma((h, w), rate=rate, block_size=b, border=False), rate / b**2, rtol=1e-6)
    starts = [
        jax.random.bernoulli(k, jnp.asarray(gamma, float), (h - b + 1, w - b + 1, c)) for k in pj.per_sample_keys(key, index)
    ]
    kept = loops(np.stack(starts), h, w, b, True)
    mask = masks(key, index, (h, w, c), rate=rate, block_size=b)
    assert mask.dtype == jnp.result_type(float) and 0 < (kept == 0).mean() < 1
    np.testing.assert_allclose(mask, kept * kept.size / kept.sum(), rtol=1e-5)


@pytest.mark.parametrize("border", [True, False])
def test_the_mean_is_one_and_the_share_is_the_rate_but_for_overlaps(border):
    mask = np.asarray(masks(jax.random.key(0), jnp.arange(200), (12, 12, 8), rate=0.1, block_size=3, border=border))
    np.testing.assert_allclose(mask.mean(), 1, rtol=1e-5)
    b, n = 3, 12
    starts = np.minimum(np.minimum(np.arange(n) + 1, b), n - np.arange(n))  # places along an axis whose block covers a position
    gamma = 0.1 / b**2 * (n * n / (n - b + 1) ** 2)
    if not border:
        gamma = 0.1 / b**2
        starts = np.array([sum(0 <= i + k < n for k in (-1, 0, 1)) for i in range(n)])
    expected = 1 - (1 - gamma) ** np.multiply.outer(starts, starts)  # of each position, exactly
    share = (mask == 0).mean((0, 3))
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.1 * 0.9 / (200 * 8))
    np.testing.assert_allclose(share.mean(), expected.mean(), rtol=0.05)
    assert (abs(expected.mean() - 0.1) < 0.006) == border  # what the border correction is for


def test_blocks_as_large_as_the_map_take_it_all_or_nothing():
    mask = np.asarray(masks(jax.random.key(0), jnp.arange(50), (4, 4, 3), rate=0.3, block_size=7))  # b = min(7, 4)
    assert (np.ptp(mask, axis=(1, 2)) == 0).all()
    assert abs((mask == 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 150)


def test_channels_share_their_blocks_if_told_to():
    own, shared = (
        masks(jax.random.key(0), jnp.arange(4), (6, 6, 5), rate=0.3, block_size=2, share_channels=share)
        for share in (False, True)
    )
    assert own.shape == (4, 6, 6, 5) and shared.shape == (4, 6, 6, 1)
    assert len({row.tobytes() for row in np.moveaxis(np.asarray(own[0]), -1, 0)}) == 5
    assert len({row.tobytes() for row in np.asarray(shared)}) == 4


def test_texts_lose_runs_of_words_and_vectors_single_entries():
    words = np.asarray(masks(jax.random.key(1), jnp.arange(30), (20, 1), rate=0.1, block_size=4))[..., 0] == 0
    runs = [len(run) for row in words for run in "".join("x" if gone else " " for gone in row).split()]
    assert runs and min(runs) >= 4
    vectors = np.asarray(masks(jax.random.key(1), jnp.arange(400), (30,), rate=0.2, block_size=7)) == 0
    assert abs(vectors.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 12000)


def run(link, *, progress=1.0, index=None, params=1.0):
    x = jnp.asarray(np.random.default_rng(0).random((6, 8, 8, 4)), jnp.float32)
    made, w = pj.objective(MAPS, link, num_classes=4), jnp.float32(params)
    data = pj.batch(x, jnp.zeros(6, jnp.int32), index=index)
    return made(w, made.init(w, x), data, progress=progress)[1]


def test_the_rate_rises_linearly_over_training():
    ramp, constant = pj.dropblock(rate=0.4, block_size=3), lambda rate: pj.dropblock(rate=rate, block_size=3, ramp=False)
    plain = run(())
    np.testing.assert_array_equal(run(ramp, progress=0.0).losses, plain.losses)  # bit for bit
    half = run(ramp, progress=0.5)
    np.testing.assert_array_equal(half.losses, run(constant(0.2), progress=0.5).losses)
    np.testing.assert_array_equal(run(ramp).losses, run(constant(0.4), progress=0.0).losses)
    assert 0 < half.metrics["dropblock/dropped"] < run(ramp).metrics["dropblock/dropped"] < 0.5


def test_the_draws_follow_the_sample_not_its_place_in_the_batch():
    index, order = 10 + jnp.arange(6), np.array([3, 0, 5, 1, 4, 2])
    there, here = (np.asarray(masks(jax.random.key(2), i, (8, 8, 4), rate=0.2, block_size=3)) for i in (index, index[order]))
    np.testing.assert_array_equal(here, there[order])


def test_the_factor_is_of_the_batch_of_all_devices():
    mask = lambda index, axis_name=None: pj.dropblock_mask(
        jax.random.key(2), index, (6, 6, 2), rate=0.3, block_size=3, axis_name=axis_name
    )
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda index: mask(index, "d"), mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    index = jnp.arange(8)
    np.testing.assert_allclose(jax.jit(mapped)(index), mask(index), rtol=1e-6)
    assert len(np.unique(np.asarray(mask(index)))) == 2  # zero, and one factor for all


def test_a_batch_that_loses_everything_stays_finite():
    mask = masks(jax.random.key(0), jnp.arange(1), (2, 2, 1), rate=0.999, block_size=2)
    assert np.isfinite(np.asarray(mask)).all()


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="dropblock needs 0 <= rate <= 0.999, got -0.1"):
        pj.dropblock(rate=-0.1)
    with pytest.raises(ValueError, match="dropblock needs block_size >= 1, got 0"):
        pj.dropblock(block_size=0)
