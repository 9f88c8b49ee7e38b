"""perturbjax.data.domains: DomainBed's splits and batches, and what data they are made of."""

import dataclasses
import itertools

import numpy as np
import pytest

from perturbjax.data import Dataset, check, leave_out, noise, validation
from perturbjax.data.domains import domain_batches, missing_classes, pooled, split_domains

CLASSES, DOMAINS = 3, 3


def source(count=120, **changes):
    """`count` samples whose image is their number; a quarter is the test set."""
    number = np.arange(count)
    images = np.broadcast_to(number[:, None, None, None], (count, 2, 2, 1)).astype(np.uint8)
    labels, domains = number % CLASSES, number // CLASSES % DOMAINS
    test = number % 4 == 3
    fields = dict(class_names=("a", "b", "c"), domain_names=("art", "photo", "sketch"))
    made = Dataset(
        "mine",
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        train_domains=domains[~test],
        test_domains=domains[test],
        **fields,
    )
    return check(dataclasses.replace(made, **changes))


def test_the_pooled_set_has_every_sample_once_with_its_label_and_domain():
    d = pooled(source())
    number = d.train_images[:, 0, 0, 0]
    assert sorted(number) == list(range(120))
    np.testing.assert_array_equal(d.train_labels, number % CLASSES)
    np.testing.assert_array_equal(d.train_domains, number // CLASSES % DOMAINS)
    check(d)


def test_domains_without_samples_are_dropped():
    d = source()
    few = pooled(
        dataclasses.replace(d, train_domains=d.train_domains * 2, test_domains=d.test_domains * 2, domain_names=tuple("pqrst"))
    )
    assert few.domain_names == ("p", "r", "t")
    np.testing.assert_array_equal(few.train_domains, pooled(d).train_domains)


def test_every_domain_is_split_by_class_and_nothing_meets_the_left_out_one():
    d = pooled(source(count=180))
    for held in range(DOMAINS):
        s = split_domains(d, held, seed=0)
        assert s.names == tuple(n for i, n in enumerate(d.domain_names) if i != held)
        everything = np.concatenate([*s.train, *s.validation, s.test])
        assert len(set(everything)) == len(everything)
        for rows in (*s.train, *s.validation):
            assert held not in d.train_domains[rows] and len(set(d.train_domains[rows])) == 1
        assert set(d.train_domains[s.test]) == {held}
        for rows in s.validation:  # 20 of each class in each domain
            np.testing.assert_array_equal(np.bincount(d.train_labels[rows]), [4, 4, 4])
        np.testing.assert_array_equal(np.bincount(d.train_labels[s.test]), [16, 16, 16])


def test_the_split_of_a_domain_depends_on_the_seed_only():
    d = pooled(source())
    without_0, without_1 = (split_domains(d, held, seed=3) for held in (0, 1))
    np.testing.assert_array_equal(without_0.train[1], without_1.train[1])  # sketch, second in both
    np.testing.assert_array_equal(without_0.train[0], without_1.test)  # photo: what is trained on here is tested on there
    assert (split_domains(d, 0, seed=4).test != without_0.test).any()


def test_batches_have_the_same_share_of_every_domain_and_go_through_each():
    rows = [np.arange(10), np.arange(100, 125), np.arange(200, 204)]
    batches = list(itertools.islice(domain_batches(rows, 4, seed=0), 12))
    for batch in batches:
        assert [np.sum((batch >= low) & (batch < low + 100)) for low in (0, 100, 200)] == [4, 4, 4]
    for own, d, per_epoch in zip(rows, range(3), (2, 6, 1), strict=True):
        seen = [batch[4 * d : 4 * d + 4] for batch in batches]
        for epoch in range(12 // per_epoch):
            part = np.concatenate(seen[epoch * per_epoch : (epoch + 1) * per_epoch])
            assert len(set(part)) == len(part) and set(part) <= set(own)
    later = list(itertools.islice(domain_batches(rows, 4, seed=0, start=7), 5))
    np.testing.assert_array_equal(later, batches[7:])
    assert (np.concatenate(list(itertools.islice(domain_batches(rows, 4, seed=1), 12))) != np.concatenate(batches)).any()


def test_a_class_missing_in_a_domain_is_told_and_one_missing_in_all_others_is_an_error():
    d = pooled(source())
    away = lambda mask: dataclasses.replace(
        d, train_images=d.train_images[~mask], train_labels=d.train_labels[~mask], true_labels=None, train_domains=d.train_domains[~mask],
        train_index=None, source_size=None,
    )  # fmt: skip
    less = away((d.train_labels == 2) & (d.train_domains == 1))
    assert missing_classes(less) == ["The domain 'photo' has no samples of 'c'."] and missing_classes(d) == []
    assert 2 in less.train_labels[np.concatenate(split_domains(less, 1, seed=0).train)]
    only = away((d.train_labels == 2) & (d.train_domains != 1))
    with pytest.raises(
        ValueError, match="every class without the domain 'photo', got none of 'c'. Leave out other domains only"
    ):
        split_domains(only, 1, seed=0)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (source(train_domains=None, test_domains=None), "pooled needs domains of all samples of mine, got none. Give a folder"),
        (source(test_domains=None), "pooled needs domains of all samples of mine, got none"),
        (leave_out("art")(source(), 0), "pooled needs mine without a validation set, got one. Leave out leave_out"),
        (validation(0.2)(source(), 0), "pooled needs mine without a validation set"),
        (noise("symmetric", 0.5)(source(), 0), "pooled needs the true labels of mine, got"),
        (source(train_domains=np.zeros(90, int), test_domains=np.zeros(30, int)), r"at least 2 domains in mine, got 1 \(art\)"),
    ],
)  # fmt: skip
def test_unusable_data(dataset, message):
    with pytest.raises(ValueError, match=message):
        pooled(dataset)


def test_bad_batches_and_single_samples():
    with pytest.raises(ValueError, match=r"a batch of 1 to 3 samples of each domain .*got 4. Write --batch-size 3"):
        next(domain_batches([np.arange(9), np.arange(3)], 4, seed=0))
    d = pooled(source(count=18))  # one or two of each class in each domain
    single = dataclasses.replace(d, train_domains=np.where(np.arange(18) < 3, 2, d.train_domains % 2).astype(np.int32))
    single = dataclasses.replace(
        single, train_labels=np.where(np.arange(18) < 3, np.arange(18) % 3, d.train_labels).astype(np.int32)
    )
    with pytest.raises(ValueError, match="2 samples of a class in every domain, got single ones only in 'sketch'"):
        split_domains(single, 0, seed=0)
