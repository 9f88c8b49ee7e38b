"""perturbjax.logit.zla: the two-level prior in numpy, its limits, and how the groups are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, COUNTS = 5, np.array([10, 60, 0, 30, 4])
LOGITS = pj.line(lambda w, u: u + w[None])  # the inputs are the logits
UNSEEN = np.array([0, 0, 1, 0, 1], bool)


def prior(counts, unseen, ratio):
    p = np.where(unseen, 1 / max(unseen.sum(), 1), counts / counts[~unseen].sum())
    return p * np.where(unseen, 1, ratio) / (1 + ratio)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(link, counts=COUNTS):
    rng = np.random.default_rng(0)
    u, y = rng.normal(size=(7, C)), rng.integers(0, C, 7).astype(np.int32)
    made, w = pj.objective(LOGITS, link, num_classes=C, class_counts=counts), np.zeros(C)
    return np.asarray(made(w, made.init(w, u), pj.batch(jnp.asarray(u), jnp.asarray(y)))[1].logits) - u


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1000.0])
def test_it_is_the_log_of_a_prior_on_two_levels(ratio):
    found = pj.zla_delta(COUNTS, UNSEEN, ratio=ratio)
    np.testing.assert_allclose(found, np.log(prior(COUNTS, UNSEEN, ratio)), rtol=1e-9)
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-9)
    shift = run(pj.zla(ratio=ratio, unseen=(2, 4)))
    np.testing.assert_allclose(shift, np.tile(found, [7, 1]), rtol=1e-7, atol=1e-9)  # the same vector for all samples
    np.testing.assert_allclose(run(pj.zla(ratio=ratio, unseen=(2, 4), tau=0.5)), shift / 2, rtol=1e-7, atol=1e-9)


def test_with_one_group_it_is_la():
    counts = COUNTS + 1
    la = run(pj.logit_adjustment(tau=1.3), counts)
    for one in (dict(unseen=()), dict(share=1.0)):
        zla = run(pj.zla(tau=1.3, **one), counts)
        np.testing.assert_allclose(zla - zla[:, :1], la - la[:, :1], atol=1e-7)  # to a constant, which no softmax feels


def test_without_names_the_rare_classes_are_the_unseen_ones():
    expected = np.log(prior(COUNTS, np.array([1, 0, 1, 0, 1], bool), 50))
    np.testing.assert_allclose(run(pj.zla(ratio=50.0, share=0.4)), np.tile(expected, [7, 1]), rtol=1e-6)
    np.testing.assert_allclose(run(pj.zla(ratio=50.0)), np.tile(expected, [7, 1]), rtol=1e-6)  # ⌊0.5·5⌋ = 2 too


@pytest.mark.parametrize("counts", [[20] * C, [142, 139, 145, 143, 140], [50, 40, 30, 20, 20]])
def test_where_counts_do_not_tell_the_unseen_classes_it_asks_for_them(counts):
    """On balanced data half of the classes would be taken for unseen, and hardly be learnt."""
    counts = np.array(counts)
    with pytest.raises(
        ValueError, match=r"^zla needs to know which classes are unseen, got counts .* Write zla\(unseen=\[\d, \.\.\.\]\), or"
    ):
        run(pj.zla(), counts)
    share = np.log(prior(counts, np.argsort(np.argsort(-counts, kind="stable")) >= 2, 1000.0))
    np.testing.assert_allclose(run(pj.zla(share=0.5), counts), np.tile(share, [7, 1]), rtol=1e-6)  # asked for, it is done
    named = np.log(prior(counts, np.arange(C) == 1, 1000.0))
    np.testing.assert_allclose(run(pj.zla(unseen=(1,)), counts), np.tile(named, [7, 1]), rtol=1e-6)


def test_a_large_ratio_favours_the_seen_classes_in_training_and_so_raises_the_losses_of_the_unseen():
    shift = run(pj.zla(ratio=1000.0, unseen=(2, 4)))[0]
    assert shift[~UNSEEN].min() > shift[UNSEEN].max()
    assert np.log(1000) == pytest.approx(np.log(np.exp(shift[~UNSEEN]).sum() / np.exp(shift[UNSEEN]).sum()), rel=1e-6)


def test_wrong_groups_and_settings():
    with pytest.raises(
        ValueError, match=r"zla needs at least one sample of every seen class, got none of class 2.*unseen=\[2\]"
    ):
        run(pj.zla(unseen=(4,)))
    with pytest.raises(ValueError, match="zla needs unseen classes in 0..4, got 7"):
        run(pj.zla(unseen=(7,)))
    with pytest.raises(ValueError, match="zla needs ratio > 0, got 0.0"):
        pj.zla(ratio=0.0)
    with pytest.raises(ValueError, match="zla needs 0 <= share <= 1, got 1.5"):
        pj.zla(share=1.5)
    with pytest.raises(ValueError, match="zla needs a finite tau, got nan"):
        pj.zla(tau=float("nan"))
    with pytest.raises(ValueError, match="zla needs 'class_counts', got none"):
        pj.objective(LOGITS, pj.zla(), num_classes=C)
