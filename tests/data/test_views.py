"""perturbjax.data.views: the literature's counts, exact rates, nothing drawn twice, seeds that differ and repeat."""

import dataclasses
import inspect
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbjax import spec
from perturbjax.data import (
    VIEWS,
    Dataset,
    apply_views,
    check,
    labels,
    leave_out,
    load,
    longtail,
    longtail_counts,
    noise,
    shrink,
    thin,
    validation,
)  # fmt: skip

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
RATIO_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
RATIO_10 = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]


def fake(counts, names=(), seed=0, **extra):
    """counts[c] images of class c, shuffled; the first two pixels of each image hold its position in the set."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.arange(4 * len(labels), dtype=np.uint32).reshape(-1, 2, 2, 1)[:, :1, :1].view(np.uint8).reshape(-1, 2, 2, 1)
    test = np.arange(len(counts))
    return check(Dataset("fake", images, labels, images[test], test, tuple(names), **extra))


def same(a, b):
    for field in dataclasses.fields(Dataset):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def is_subset_of(view, source):
    """Every sample of the view is a different one of the source, with all that belongs to it, in source order."""
    assert (np.diff(view.train_index) > 0).all()
    for key in ("train_images", "true_labels"):
        np.testing.assert_array_equal(getattr(view, key), getattr(source, key)[view.train_index])
    same(dataclasses.replace(source, test_images=view.test_images, test_labels=view.test_labels), source)


@pytest.fixture(scope="module")
def cifar():
    return fake([5000] * 10, CIFAR10)


@pytest.fixture(scope="module")
def hundred():
    return fake([100] * 10, CIFAR10)


@pytest.mark.parametrize(("ratio", "counts"), [(100, RATIO_100), (10, RATIO_10), (1, [5000] * 10)])
def test_longtail_has_the_literatures_counts(cifar, ratio, counts):
    tail = longtail(ratio)(cifar, 0)
    np.testing.assert_array_equal(tail.class_counts, counts)
    assert len(tail.train_labels) == sum(counts)  # 12406, 20431, 50000
    is_subset_of(tail, cifar)


def test_longtail_totals_of_cifar100_and_of_its_long_tailed_file():
    for ratio, total in ((100, 10847), (10, 19573)):
        assert longtail_counts(np.full(100, 500), ratio).sum() == total
    cut = longtail_counts(np.full(100, 500), 10)  # what is left of CIFAR-100 in that file
    np.testing.assert_array_equal(longtail_counts(cut, 100), longtail_counts(np.full(100, 500), 100))
    np.testing.assert_array_equal(longtail_counts(cut, 10), cut)


def test_step_has_half_of_the_classes_rare(cifar):
    np.testing.assert_array_equal(longtail(100, "step")(cifar, 0).class_counts, [5000] * 5 + [50] * 5)
    np.testing.assert_array_equal(longtail_counts([98] * 3, 49, "step"), [98, 2, 2])  # 98 · (1/49) < 2 in floats


def test_unequal_classes_keep_the_profile():
    np.testing.assert_array_equal(longtail_counts([500, 40, 900], 4), [81, 40, 20])  # class 1 is the bottleneck
    np.testing.assert_array_equal(longtail_counts([7, 5, 6], 1), [5, 5, 5])
    np.testing.assert_array_equal(longtail_counts([20, 20, 20], 1000), [20, 1, 1])  # never empty


@given(st.lists(st.integers(1, 300), min_size=2, max_size=12), st.floats(1, 500), st.sampled_from(["exponential", "step"]))
@settings(deadline=None, max_examples=100)
def test_longtail_counts_are_the_largest_that_fit(available, ratio, kind):
    counts, C = longtail_counts(available, ratio, kind), len(available)
    share = [ratio ** (-c / (C - 1)) if kind == "exponential" else 1 if c < C // 2 else 1 / ratio for c in range(C)]
    rule = lambda n_max: [max(1, int(n_max * s + 1e-9)) for s in share]
    assert (counts >= 1).all() and (counts <= available).all() and (np.diff(counts) <= 0).all()
    np.testing.assert_array_equal(counts, rule(counts[0]))
    assert any(n > a for n, a in zip(rule(counts[0] + 1), available, strict=True))


@pytest.mark.parametrize("view", [longtail(10), noise("symmetric", 0.4), noise("pair", 0.3), validation(0.2), thin(30)])
def test_seeds_differ_and_repeat(hundred, view):
    same(view(hundred, 3), view(hundred, 3))
    hashes = {view(hundred, seed).subset_hash for seed in range(5)}
    assert len(hashes) == 5
    assert hundred.subset_hash not in hashes and hundred.views == () and not hundred.flipped.any()  # the source is as it was


def test_seeds_draw_other_samples(hundred):
    one, two = (set(longtail(10)(hundred, seed).train_index.tolist()) for seed in (0, 1))
    assert len(one) == len(two) and len(one & two) < 0.75 * len(one)  # 10 to 100 % of a class, at random


def test_a_longer_tail_is_a_subset(hundred):
    short, long = (longtail(ratio)(hundred, 0).train_index for ratio in (10, 100))
    assert np.isin(long, short).all()


@given(st.integers(0, 99), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_symmetric_noise_flips_exactly_its_share(percent, seed):
    d = fake([40] * 5)
    noisy = noise("symmetric", percent / 100)(d, seed)
    assert noisy.flipped.sum() == round(percent / 100 * 200)
    np.testing.assert_array_equal(noisy.true_labels, d.train_labels)
    np.testing.assert_array_equal(noisy.train_images, d.train_images)
    assert set(noisy.train_labels) <= set(range(5)) and noisy.train_labels.dtype == np.int32


def test_symmetric_noise_is_uniform_over_the_other_classes(cifar):
    noisy = noise("symmetric", 0.4)(cifar, 0)
    table = np.zeros([10, 10])
    np.add.at(table, (noisy.true_labels, noisy.train_labels), 1)
    off = ~np.eye(10, dtype=bool)
    np.testing.assert_allclose(table[off], 5000 * 0.4 / 9, atol=5 * np.sqrt(5000 * 0.4 / 9))  # 5 standard deviations
    np.testing.assert_allclose(np.diag(table), 3000, atol=5 * np.sqrt(5000 * 0.4 * 0.6))


def test_with_the_true_class_a_tenth_of_the_drawn_stays_right(cifar):
    noisy = noise("symmetric", 0.4, true_class=True)(cifar, 0)
    np.testing.assert_allclose(noisy.flipped.sum(), 0.9 * 20000, atol=5 * np.sqrt(20000 * 0.09))
    assert noisy.views == ("noise(kind=symmetric, rate=0.4, true_class=True) seed=0",)


def test_pair_noise_is_the_next_class(hundred):
    noisy = noise("pair", 0.3)(hundred, 0)
    assert noisy.flipped.sum() == 300
    np.testing.assert_array_equal(noisy.train_labels[noisy.flipped], (noisy.true_labels[noisy.flipped] + 1) % 10)


def test_asymmetric_noise_confuses_cifars_look_alikes_by_name(hundred):
    order = np.random.default_rng(0).permutation(10)
    for d in (hundred, fake([100] * 10, np.array(CIFAR10)[order])):
        noisy = noise("asymmetric", 0.4)(d, 0)
        names = np.array(d.class_names)
        moves = set(zip(names[noisy.true_labels[noisy.flipped]], names[noisy.train_labels[noisy.flipped]], strict=True))
        assert moves == {("truck", "automobile"), ("bird", "airplane"), ("deer", "horse"), ("cat", "dog"), ("dog", "cat")}
        assert noisy.flipped.sum() == 200  # 40 % of the five classes that can change


def test_a_lower_rate_flips_a_subset_to_the_same_labels(hundred):
    low, high = (noise("symmetric", rate)(hundred, 0) for rate in (0.2, 0.5))
    assert high.flipped[low.flipped].all()
    np.testing.assert_array_equal(high.train_labels[low.flipped], low.train_labels[low.flipped])


def test_noise_after_a_long_tail_keeps_the_samples(hundred):
    d = apply_views(hundred, [longtail(10), noise("symmetric", 0.2)], 7)
    np.testing.assert_array_equal(d.true_labels, hundred.train_labels[d.train_index])
    assert d.flipped.sum() == round(0.2 * len(d.train_labels))
    twice = noise("pair", 0.5)(d, 0)
    np.testing.assert_array_equal(twice.true_labels, d.true_labels)  # those before any noise


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_validation_splits_each_class(hundred, fraction):
    d = validation(fraction)(hundred, 0)
    np.testing.assert_array_equal(np.bincount(d.validation_labels), [round(100 * fraction)] * 10)
    np.testing.assert_array_equal(d.class_counts, [100 - round(100 * fraction)] * 10)
    is_subset_of(d, hundred)
    rest = np.setdiff1d(np.arange(1000), d.train_index)
    np.testing.assert_array_equal(d.validation_images, hundred.train_images[rest])
    np.testing.assert_array_equal(d.validation_labels, hundred.train_labels[rest])


def test_validation_splits_each_domain_and_spares_single_samples():
    d = fake([40, 40], train_domains=np.arange(80) % 4, domain_names="wxyz")
    split = validation(0.2)(d, 0)
    for domain in range(4):
        for c in range(2):
            n = ((d.train_labels == c) & (d.train_domains == domain)).sum()
            left = ((split.train_labels == c) & (split.train_domains == domain)).sum()
            assert left == n - max(round(0.2 * n), 1)
    lonely = validation(0.9)(fake([1, 10]), 0)
    np.testing.assert_array_equal(lonely.class_counts, [1, 1])


def test_noise_and_validation_with_one_seed_are_independent():
    d = fake([500] * 2)
    held = validation(0.3)(noise("pair", 0.3)(d, 0), 0)
    flips = 300 - held.flipped.sum()  # among the 300 validation samples; one stream for both would hold many more
    np.testing.assert_allclose(flips, 90, atol=5 * np.sqrt(300 * 0.3 * 0.7 * 0.7))


@given(st.integers(1, 60), st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_thin_keeps_at_most_so_many(per_class, seed):
    d = fake([50, 3, 20])
    thinned = thin(per_class)(d, seed)
    np.testing.assert_array_equal(thinned.class_counts, np.minimum([50, 3, 20], per_class))
    is_subset_of(thinned, d)


def test_shrink_averages_blocks_and_rounds_halves_to_even():
    image = np.array([[0, 1, 10, 10], [1, 0, 10, 12], [255, 255, 1, 2], [255, 254, 2, 1]], np.uint8)
    images = np.stack([image, image.T])
    want = np.array([[0, 10], [255, 2]], np.uint8)  # means 0.5, 10.5, 254.75, 1.5
    d = check(Dataset("x", images, [0, 1], images[:1], [0], validation_images=images[1:], validation_labels=[1]))
    small = shrink(2)(d, 0)
    np.testing.assert_array_equal(small.train_images[..., 0], [want, want.T])
    np.testing.assert_array_equal(small.test_images[..., 0], [want])
    np.testing.assert_array_equal(small.validation_images[..., 0], [want.T])
    assert small.train_images.dtype == np.uint8 and small.views == ("shrink(size=2)",)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shrink_is_the_mean_of_each_block(size):
    d, k = load("digits"), 8 // size
    small = shrink(size)(d, 0)
    blocks = d.train_images.astype(np.float64).reshape(-1, size, k, size, k, 1)
    np.testing.assert_allclose(small.train_images, blocks.mean((2, 4)), rtol=1e-6)
    assert small.image_shape == (size, size, 1) and small.test_images.dtype == np.float32
    assert check(small).subset_hash == d.subset_hash


def test_shrink_of_colour_images_keeps_channels_apart():
    images = np.random.default_rng(0).integers(0, 256, [6, 6, 12, 3], dtype=np.uint8)
    d = shrink(3)(check(Dataset("x", images, np.arange(6) % 2, images, np.arange(6) % 2)), 0)
    want = np.stack([images[..., c].reshape(6, 3, 2, 3, 4).mean((2, 4)) for c in range(3)], -1)
    np.testing.assert_array_equal(d.train_images, np.rint(want))


def test_a_chain_is_recorded_and_seeded_by_position(hundred):
    chain = [thin(50), noise("pair", 0.2), noise("pair", 0.2)]
    d = apply_views(hundred, chain, 5)
    by_hand = chain[2](chain[1](chain[0](hundred, (5, 0)), (5, 1)), (5, 2))
    same(d, by_hand)
    assert d.views == (
        "thin(per_class=50) seed=(5, 0)",
        "noise(kind=pair, rate=0.2) seed=(5, 1)",
        "noise(kind=pair, rate=0.2) seed=(5, 2)",
    )
    assert "; noise(kind=pair, rate=0.2) seed=(5, 1)" in repr(d)
    first, second = (set(np.flatnonzero(chain[1](d, (5, k)).train_labels != d.train_labels)) for k in (1, 2))
    assert first != second
    same(apply_views(hundred, [], 5), hundred)


def test_the_draws_do_not_depend_on_numpys_version(hundred):
    d = apply_views(load("digits"), [longtail(10), noise("symmetric", 0.2), validation(0.1)], 0)
    assert d.subset_hash == "74a92795e7cd"


def test_views_can_be_built_by_name(hundred, tmp_path):
    np.save(tmp_path / "x.npy", hundred.train_labels)
    settings = {"longtail": [10], "noise": ["pair", 0.1], "validation": [0.1], "thin": [5], "shrink": [1]}
    settings |= {"labels": [tmp_path / "x.npy"], "leave_out": [1], "drop_duplicates": []}
    assert set(settings) == set(VIEWS)
    source = dataclasses.replace(
        hundred, train_domains=np.arange(1000) // 10 % 2, test_domains=np.arange(10) // 5, domain_names=("x", "y")
    )
    for name, args in settings.items():
        d = VIEWS[name](*args)(source, 0)
        assert d.views[0].startswith(f"{name}(") and VIEWS[name].__name__ == name
        assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(VIEWS[name]).parameters.values())
        check(d)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: longtail(0.01), "longtail needs a ratio of at least 1, got 0.01. Write ratio=100:"),
        (lambda: longtail(-3), "got -3. Write ratio=100:"),
        (lambda: longtail(float("nan")), "got nan"),
        (lambda: longtail("100"), "got '100'"),
        (lambda: longtail(100, "linear"), "longtail needs kind to be one of exponential, step, got 'linear'"),
        (lambda: noise("random", 0.1), "noise needs kind to be one of symmetric, pair, asymmetric, onesided, got 'random'"),
        (lambda: noise("pair", 1.0), "noise needs a rate in [0, 1), got 1.0. Write rate=0.4 for 40 %"),
        (lambda: noise("pair", -0.1), "got -0.1"),
        (lambda: noise("pair", 40), "got 40"),
        (lambda: noise("pair", True), "got True"),
        (lambda: noise("pair", 0.1, true_class=True), "noise needs kind 'symmetric' with true_class, got 'pair'"),
        (lambda: validation(0), "validation needs a fraction between 0 and 1, got 0. Write fraction=0.1."),
        (lambda: validation(1.0), "got 1.0"),
        (lambda: thin(0), "thin needs a per_class that is a whole number of at least 1, got 0"),
        (lambda: thin(2.5), "got 2.5. Write per_class=1000."),
        (lambda: shrink(0), "shrink needs a size that is a whole number of at least 1, got 0. Write size=16."),
    ],
)
def test_settings_are_checked_where_they_enter(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("view", "source", "message"),
    [
        (noise("asymmetric", 0.1), fake([5, 5]), "got 0, 1. Write noise('pair', rate)"),
        (noise("asymmetric", 0.1), fake([1] * 12), "got 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."),
        (noise("pair", 0.99), fake([1, 99]), "got rate 0.99, after which class 1 ('1', 99 before) has none. Lower the rate"),
        (shrink(3), fake([5, 5]), "divides the images' 2x2 pixels, got 3. Write size=1; 1, 2 fit."),
        (validation(0.5), fake([1, 1]), "a class with 2 training samples, got at most 1"),
        (validation(0.5), validation(0.5)(fake([8, 8]), 0), "without a validation set, got 8 samples in one"),
    ],
)
def test_views_refuse_what_they_cannot_do(view, source, message):
    errors = []
    for seed in range(30):  # noise at 0.99 empties the class for some seeds only
        try:
            view(source, seed)
        except ValueError as error:
            errors.append(str(error))
    assert errors and all(message in error for error in errors)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", (), (0, -1), None])
def test_seeds_are_checked(hundred, seed):
    with pytest.raises(ValueError, match="seed of integers >= 0"):
        thin(5)(hundred, seed)


def test_a_chain_of_names_is_refused(hundred):
    with pytest.raises(
        TypeError, match=re.escape("apply_views needs views, got 'thin' at position 0. Write e.g. longtail(100)")
    ):
        apply_views(hundred, ["thin"], 0)


@pytest.fixture
def human(hundred, tmp_path):
    """Wrong labels for a tenth of `hundred`, and a function that writes a file of labels."""
    wrong = hundred.train_labels.copy()
    wrong[::10] = (wrong[::10] + 3) % 10

    def write(name, values=wrong, **arrays):
        path = tmp_path / name
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        elif path.suffix == ".npy":
            np.save(path, values)
        else:
            path.write_text("".join(f"{value}\n" for value in values))
        return path

    return wrong, write


def test_labels_from_every_form_of_file(hundred, human):
    wrong, write = human
    words = [CIFAR10[n] for n in wrong]
    files = [
        (write("a.npz", worse_label=wrong.astype(np.uint8), other=wrong[::-1]), "worse_label"),
        (write("one.npz", labels=wrong), None),
        (write("b.npy", wrong[:, None]), None),
        (write("c.npy", np.array(words)), None),
        (write("d.txt", wrong), None),
        (write("e.csv", wrong), None),
        (write("f.txt", words), None),
        (write("g.csv", [f'"{word}"' for word in words]), None),
    ]
    for file, key in files:
        d = labels(file, key)(hundred, 0)
        np.testing.assert_array_equal(d.train_labels, wrong)
        np.testing.assert_array_equal(d.true_labels, hundred.train_labels)
        assert d.train_labels.dtype == np.int32 and d.flipped.sum() == 100 and check(d).num_classes == 10
        where = f"{key!r} of {file.name!r}" if key else "'labels' of 'one.npz'" if file.suffix == ".npz" else f"{file.name!r}"
        assert d.notes == (f"Of the labels in {where}, 100 of 1000 (10.00%) are not the source's.",)
    assert labels(files[0][0], "worse_label")(hundred, 0).views == ("labels(file=a.npz, key=worse_label)",)
    assert labels(str(files[4][0]))(hundred, 0).views == ("labels(file=d.txt)",)


def test_names_are_the_same_however_their_accents_are_stored(human):
    d = fake([3, 3], ["caf\u00e9", "na\u00efve"])
    names = ["cafe\u0301", "nai\u0308ve", "caf\u00e9"] * 2
    np.testing.assert_array_equal(labels(human[1]("x.txt", names))(d, 0).train_labels, [0, 1, 0] * 2)


def test_class_names_that_are_numbers_are_names(human):
    d = fake([2, 2, 2], ["10", "20", "30"])
    _, write = human
    named = labels(write("x.txt", ["20", "20", "10", "10", "30", "30"]))(d, 0)
    np.testing.assert_array_equal(named.train_labels, [1, 1, 0, 0, 2, 2])
    numbered = labels(write("x.txt", ["1", "1", "0", "0", "2", "2"]))(d, 0)
    np.testing.assert_array_equal(numbered.train_labels, named.train_labels)


@pytest.mark.parametrize("order", ["first", "last"])
def test_labels_belong_to_the_source_before_and_after_a_long_tail(hundred, human, order):
    wrong, write = human
    view = labels(write("x.npy"))
    chain = [longtail(10), validation(0.1)]
    d = apply_views(hundred, [view, *chain] if order == "first" else [*chain, view], 3)
    np.testing.assert_array_equal(d.train_labels, wrong[d.train_index])
    np.testing.assert_array_equal(d.true_labels, hundred.train_labels[d.train_index])
    assert 0 < len(d.train_labels) < 1000 and d.flipped.any()


def test_labels_of_a_source_that_is_split_by_load(human):
    """A file may hold the labels of the whole source, or of the training samples as loaded."""
    from sklearn.datasets import load_digits

    digits, whole = load("digits"), load_digits().target
    _, write = human
    every = (whole + 1) % 10
    for chain in ([labels(write("x.npy", every))], [thin(20), labels(write("x.npy", every))]):
        d = apply_views(digits, chain, 0)
        np.testing.assert_array_equal(d.train_labels, every[d.train_index])
    loaded = write("y.npy", (digits.train_labels + 1) % 10)
    np.testing.assert_array_equal(labels(loaded)(digits, 0).train_labels, (digits.train_labels + 1) % 10)
    with pytest.raises(ValueError, match=r"of digits \(1797\), got 1258 in 'y.npy'. .* have to be the first view"):
        apply_views(digits, [thin(20), labels(loaded)], 0)


def test_labels_by_a_train_index_of_the_users_own(human):
    d = fake([3, 3])
    d = check(Dataset("part", d.train_images, d.train_labels, d.test_images, d.test_labels, train_index=np.arange(6) * 10))
    assert d.source_size is None
    _, write = human
    np.testing.assert_array_equal(labels(write("x.npy", np.arange(60) // 10 % 2))(d, 0).train_labels, [0, 1] * 3)
    np.testing.assert_array_equal(labels(write("x.npy", [1, 0] * 3))(d, 0).train_labels, [1, 0] * 3)  # as loaded
    with pytest.raises(ValueError, match=r"each sample of part \(at least 51, or 6, one for each training sample\), got 50 in"):
        labels(write("x.npy", np.zeros(50, int)))(d, 0)


def test_a_file_for_data_in_another_order_is_refused(hundred, human):
    wrong, write = human
    file = write("n.npz", worse_label=wrong, clean_label=hundred.train_labels)
    np.testing.assert_array_equal(labels(file, "worse_label")(hundred, 0).train_labels, wrong)
    tail = apply_views(hundred, [longtail(10), labels(file, "worse_label")], 0)
    np.testing.assert_array_equal(tail.train_labels, wrong[tail.train_index])
    clean = hundred.train_labels.copy()
    clean[[4, 9]] = (clean[[4, 9]] + 1) % 10
    with pytest.raises(ValueError, match=r"in the order of fake, .* for 2 of 1000 samples \(the first: training sample 4\)"):
        labels(write("n.npz", worse_label=wrong, clean_label=clean), "worse_label")(hundred, 0)


@pytest.mark.parametrize(
    ("name", "values", "key", "message"),
    [
        ("x.npy", np.zeros(999, int), None, "each sample of fake (1000, or 1000, one for each training sample), got 999 in 'x.npy'"),
        ("x.txt", [0] * 1001, None, "got 1001 in 'x.txt'. Give the labels of the whole set, in its order"),
        ("x.npy", np.arange(1000) % 11, None, "labels in 0..9, got 10 for sample 10 in 'x.npy' (90 such labels). Renumber"),
        ("x.csv", np.arange(1000) % 10 - 1, None, "labels in 0..9, got -1 for sample 0 in 'x.csv' (100 such labels)"),
        ("x.npy", np.zeros(1000), None, "integers or class names [N], got dtype float64 in 'x.npy'. Write labels.astype(np.int32)"),
        ("x.npy", np.where(np.arange(1000) % 500 == 3, np.nan, 0), None, "got nan in 2 rows (3, 503) of float64 in 'x.npy'. Drop them"),
        ("x.npy", np.eye(10, dtype=int), None, "got shape [10, 10] in 'x.npy'. Write labels.argmax(-1) for one-hot rows"),
        ("x.npy", np.tri(10, dtype=int), None, "got shape [10, 10] with several classes in 9 rows (1, 2, 3, 4, 5, 6, 7, 8, 9) in 'x.npy'"),
        ("x.npy", np.zeros(1000, bool), None, "got dtype bool in"),
        ("x.npy", np.array(["cat"], object), None, "plain arrays, got "),
        ("x.txt", ["label", *[3] * 1000], None, "got 'label' for sample 0 in 'x.txt'. Remove the heading. There are: airplane"),
        ("x.txt", ["cat"] * 7 + ["kat"], None, "got 'kat' for sample 7 in 'x.txt'. Did you mean 'cat'?"),
        ("x.txt", ["0", "", "1"], None, "got none for 1 sample (1) in 'x.txt'. Write their labels"),
        ("x.csv", ["0", "nan", "1", "N/A"], None, "got none for 2 samples (1, 3) in 'x.csv'"),
        ("x.txt", ["1", "2", "1.0"], None, "one way of writing each class, got '1' and '1.0' in 'x.txt'"),
        ("x.txt", ["cat", "Cat"], None, "got 'Cat' and 'cat' in 'x.txt'"),
        ("x.txt", ["0.0", "1.0", "1.0"], None, "the classes as the data has them, got '0.0' for sample 0 in 'x.txt' (1 such labels). Write '0'"),
        ("x.csv", ["dog", "Cat"], None, "got 'Cat' for sample 1 in 'x.csv' (1 such labels). Write 'cat'"),
        ("x.csv", ["1,cat", "2,dog"], None, "one label a line, got 2 columns in line 1 of 'x.csv', separated by commas. Keep"),
        ("x.csv", ["1;cat", "2;dog"], None, "got 2 columns in line 1 of 'x.csv', separated by semicolons. Keep the column"),
        ("x.csv", ["1\tcat", "2\tdog"], None, "separated by tabs"),
        ("x.txt", [3] * 1000, "worse", "a key for .npz files only, got 'worse' for 'x.txt'"),
        ("x.pt", [3] * 1000, None, "an .npz, .npy, .txt or .csv file, got '"),
    ],
)  # fmt: skip
def test_labels_that_are_none(hundred, human, name, values, key, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        labels(human[1](name, values), key)(hundred, 0)


def test_files_and_keys_are_checked_before_any_data(human, tmp_path):
    wrong, write = human
    file = write("n.npz", worse_label=wrong, aggre_label=wrong)
    message = "a key of 'n.npz', got none. Write labels(n.npz, worse_label); there are: aggre_label, worse_label."
    with pytest.raises(ValueError, match=re.escape(message)):
        labels(file)
    with pytest.raises(ValueError, match=re.escape("got 'worse'. Did you mean 'worse_label'? There are: aggre_label, worse")):
        labels(file, "worse")
    with pytest.raises(FileNotFoundError, match="labels needs a file, got .*nowhere.npz', where there is none"):
        labels(tmp_path / "nowhere.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="whole file of plain arrays, got .*n.npz' .* Copy or write the file again"):
        labels(file, "worse_label")
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="text in UTF-8, got 'x.txt'"):
        labels(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="damaged|whole file"):
        (tmp_path / "x.npy").write_bytes(b"")
        labels(tmp_path / "x.npy")


def pacs(**changes):
    """Three domains of unequal size, both classes in each; images hold their number."""
    domain = np.repeat([0, 1, 2], [8, 12, 4])
    images = np.arange(24, dtype=np.uint8)[:, None, None, None]
    test = np.arange(24) % 4 == 3
    fields = dict(
        name="pacs", train_images=images[~test], train_labels=(np.arange(24) % 2)[~test], test_images=images[test],
        test_labels=(np.arange(24) // 4 % 2)[test], train_domains=domain[~test], test_domains=domain[test],
        domain_names=("art", "photo", "sketch"), train_index=np.flatnonzero(~test), source_size=24,
    )  # fmt: skip
    return check(Dataset(**(fields | changes)))


@pytest.mark.parametrize("domain", ["photo", 1])
def test_leave_out_tests_on_a_domain_and_validates_on_the_others_test_samples(domain):
    source = pacs()
    d = check(leave_out(domain)(source, 0))
    train, test, held = (set(x[:, 0, 0, 0].tolist()) for x in (d.train_images, d.test_images, d.validation_images))
    assert test == set(range(8, 20)) and train == set(source.train_index) - test and held == {3, 7, 23}
    np.testing.assert_array_equal(d.train_index, d.train_images[:, 0, 0, 0])
    np.testing.assert_array_equal(d.train_labels, d.train_index % 2)
    assert set(d.train_domains) == {0, 2} and set(d.test_domains) == {1} and d.domain_names == source.domain_names
    label = dict(zip(source.train_images[:, 0, 0, 0], source.train_labels)) | dict(
        zip(source.test_images[:, 0, 0, 0], source.test_labels)
    )
    for part in ("train", "test", "validation"):
        np.testing.assert_array_equal(
            getattr(d, f"{part}_labels"), [label[n] for n in getattr(d, f"{part}_images")[:, 0, 0, 0].tolist()]
        )
    assert d.views == (f"leave_out(domain={domain})",)
    same(leave_out(domain)(source, 0), leave_out(domain)(source, 1))  # nothing is drawn


def test_leave_out_tests_on_true_labels():
    noisy = noise("pair", 0.9)(pacs(), 0)
    d = leave_out("photo")(noisy, 0)
    np.testing.assert_array_equal(d.test_labels, leave_out("photo")(pacs(), 0).test_labels)
    assert d.flipped.any()


def test_domain_names_that_are_numbers_go_before_positions():
    d = pacs(domain_names=("1960", "2", "1"))
    for domain, held in ((1960, 0), (2, 1), (1, 2), ("1", 2), (0, 0)):
        assert set(leave_out(domain)(d, 0).test_domains) == {held}


def test_every_domain_once():
    whole = [set(leave_out(name)(pacs(), 0).test_images.flat) for name in ("art", "photo", "sketch")]
    assert set.union(*whole) == set(range(24)) and sum(map(len, whole)) == 24


def test_a_domain_that_is_the_whole_test_set_already():
    """The PACS file of the data pack, with test_domains: the left-out domain changes nothing, another can't be left out."""
    source = pacs()
    held = source.train_domains != 2
    d = check(dataclasses.replace(
        source, train_images=source.train_images[held], train_labels=source.train_labels[held], true_labels=None,
        train_index=source.train_index[held], train_domains=source.train_domains[held],
        test_domains=np.full(len(source.test_labels), 2),
    ))  # fmt: skip
    out = leave_out("sketch")(d, 0)
    assert out.validation_images is None and len(out.train_labels) == len(d.train_labels)
    np.testing.assert_array_equal(out.test_images, d.test_images)
    message = "training samples of all other domains of pacs, got test samples only of 'sketch'. Write leave_out('sketch'), or"
    with pytest.raises(ValueError, match=re.escape(message)):
        leave_out("art")(d, 0)


@pytest.mark.parametrize(
    ("domain", "source", "message"),
    [
        ("foto", pacs(), "a domain of pacs, got 'foto'. Did you mean 'photo'? There are: art, photo, sketch."),
        (3, pacs(), "a domain of pacs, got 3. There are: art, photo, sketch."),
        (-1, pacs(), "a domain of pacs, got -1. There"),
        (0, fake([5, 5]), "the training and the test samples of fake, got none. Give a folder FOLDER/domain/class/image, or"),
        (0, pacs(test_domains=None), "got those of one part only"),
        (0, validation(0.3)(pacs(), 0), "without a validation set, got 6 samples in one, of unknown domains. Put leave_out before"),
        (0, pacs(train_domains=np.zeros(18, int), test_domains=np.zeros(6, int)), "got 24 in it and 0 in others. Name another"),
        (3, pacs(domain_names=("art", "photo", "sketch", "clip")), "samples in 'clip' and in another domain of pacs, got 0 in it"),
    ],
)  # fmt: skip
def test_leave_out_errors(domain, source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        leave_out(domain)(source, 0)


@pytest.mark.parametrize("domain", [0.5, None, True, ["art"]])
def test_leave_out_takes_names_and_numbers(domain):
    with pytest.raises(ValueError, match=re.escape(f"leave_out needs a domain's name or number, got {domain!r}.")):
        leave_out(domain)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("labels(cifar10n.npz, worse_label)", {"file": "cifar10n.npz", "key": "worse_label"}),
        ("labels('some/folder-1/my.labels.csv')", {"file": "some/folder-1/my.labels.csv"}),
        ('labels(file="../x.npz", key=aggre_label)', {"file": "../x.npz", "key": "aggre_label"}),
        ("leave_out(art_painting)", {"domain": "art_painting"}),
        ("leave_out(2)", {"domain": 2}),
        ("drop_duplicates", {}),
    ],
)
def test_views_as_typed_on_the_command_line(text, settings):
    (call,) = spec.resolve(spec.parse_chain(text), VIEWS)
    assert dict(call.kwargs) == settings


@pytest.mark.slow
@pytest.mark.parametrize(("key", "rate"), [("worse_label", 0.4021), ("aggre_label", 0.0901), ("random_label1", 0.1723)])
def test_cifar10n_on_the_real_labels(key, rate):
    pack = pathlib.Path(__file__).parents[3] / "shared" / "data"
    if not (pack / "cifar10n.npz").is_file():
        pytest.skip("no data pack beside the repository")
    with np.load(pack / "cifar10.npz") as file:
        train = file["train_labels"].astype(int)
    d = check(Dataset("cifar10", np.zeros([50000, 1, 1, 1], np.uint8), train, np.zeros([1, 1, 1, 1], np.uint8), [0], CIFAR10))
    noisy = labels(pack / "cifar10n.npz", key)(d, 0)
    np.testing.assert_allclose(noisy.flipped.mean(), rate, atol=5e-5)  # the published one
