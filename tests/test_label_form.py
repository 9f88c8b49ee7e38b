"""perturbjax.label_form: what is said of labels that are no integers, and that the line to write instead then works."""

import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import perturbjax as pj
from perturbjax.analysis import accuracy
from perturbjax.analysis.attack import clean_accuracy
from perturbjax.analysis.sharpness import data_loss
from perturbjax.data import Dataset, check
from perturbjax.label_form import folded, is_missing, numbered, positions, spellings, trouble

NAN = float("nan")
SEVERAL = "Several classes a sample is not what this library does"
OF_OBJECTS = "Drop it: keep = ~np.isnan(labels.astype(float)); labels[keep].astype(np.int32)"
CASES = {
    "text among numbers": (np.array([0, "", 1], object), "no label in 1 row (1)", "Drop these rows"),
    "one-hot": (np.eye(3)[[0, 2, 1, 0]], "shape [4, 3]", "Write labels.argmax(-1) for one-hot rows."),
    "several ones": ([[1, 0], [1, 1], [0, 1], [1, 1]], "shape [4, 2] with several classes in 2 rows (1, 3)", SEVERAL),
    "a row of none": (
        [[1, 0], [0, 0]],
        "shape [2, 2] with no class in 1 row (1)",
        "Keep the samples of one, keep = labels.sum(1) == 1",
    ),
    "probabilities": ([[0.3, 0.7], [1, 0]], "shape [2, 2] of probabilities", "Write labels.argmax(-1) for the likeliest"),
    "scores": ([[3, 7], [-1, 0]], "shape [2, 2] with several numbers a sample", "Write labels.argmax(-1) if these are scores"),
    "nan in a row": ([[1, 0], [NAN, 1]], "shape [2, 2] with nan in 1 row (1)", "keep = ~np.isnan(labels).any(1)"),
    "nan": ([0, NAN, 1, NAN], "nan in 2 rows (1, 3) of float64", "keep = ~np.isnan(labels); labels[keep].astype(np.int32)"),
    "None": (np.array([0, None, 1], object), "nan in 1 row (1) of float64", OF_OBJECTS),
    "pandas": (
        pandas.array([0, None, 1], dtype="Int64"),
        "nan in 1 row (1) of float64",
        "Drop it: keep = ~np.isnan(labels); labels[keep]",
    ),
    "names of pandas": (pandas.Series(["a", None, "b"], dtype="string"), "no label in 1 row (1)", "Drop these rows"),
    "infinity": ([0, np.inf], "infinity in 1 row (1) of float64", "Drop these rows."),
    "fractions": ([0, 0.5], "numbers with a fraction in 1 row (1), the first 0.5", "np.digitize(labels, edges)"),
    "floats": ([0.0, 1.0], "dtype float64", "Write labels.astype(np.int32)."),
    "bool": ([True, False], "dtype bool", "Write labels.astype(np.int32)."),
    "names": (["a", "b"], "dtype <U1", "Write np.unique(labels, return_inverse=True)[1] for names."),
    "bytes": (np.array([b"a", b"b"]), "dtype |S1", "np.unique(labels, return_inverse=True)[1]"),
    "names and numbers": (np.array(["a", 1], object), "dtype object", "np.unique(labels.astype(str), return_inverse=True)[1]"),
    "a name twice": (
        ["Good", "good", "bad"],
        "'Good' and 'good' as different classes",
        "[label.strip().lower() for label in labels]",
    ),
    "a number twice": (["1", "1.0"], "'1' and '1.0' as different classes", "labels.astype(float).astype(int)"),
    "a name with a space": (["good", " good"], "' good' and 'good' as different", "label.strip()"),
    "no name": (np.array(["a", None, "nan", ""], object), "no label in 3 rows (1, 2, 3)", "Drop these rows"),
    "lists": ([[0, 1], [1]], "lists of different lengths", SEVERAL),
    "a list": (np.array([[0, 1], None], object), "lists in 1 row (0)", SEVERAL),
    "too many axes": (np.zeros([2, 2, 2], int), "shape [2, 2, 2]", "Give one class for each sample"),
}


@pytest.mark.parametrize(("labels", "got", "fix"), CASES.values(), ids=CASES)
def test_what_labels_are_and_what_to_write_instead(labels, got, fix):
    found = trouble(labels)
    assert found[0].startswith(got) and fix in found[1]


@pytest.mark.parametrize("labels", [[0, 1], np.array([[1], [0]], np.uint8), jnp.array([2, 0]), np.zeros(0, np.int64)])
def test_integers_are_labels(labels):
    assert trouble(labels) is None


def test_the_lines_to_write_give_labels():
    for labels in (np.array([2, None, 1], object), np.array([2, NAN, 1], object)):
        keep = ~np.isnan(labels.astype(float))
        assert labels[keep].astype(np.int32).tolist() == [2, 1]
    labels = np.array([2.0, NAN, 1.0])
    keep = ~np.isnan(labels)
    assert trouble(labels[keep].astype(np.int32)) is None
    labels = np.array([[1, 0], [1, 1], [0, 1]])
    keep = labels.sum(1) == 1
    assert trouble(labels[keep].argmax(-1)) is None and labels[keep].argmax(-1).tolist() == [0, 1]
    labels = np.array(["1", "1.0", "0"])
    assert labels.astype(float).astype(int).tolist() == [1, 1, 0]
    labels = ["Good", " good", "bad"]
    assert not spellings([label.strip().lower() for label in labels])


def test_positions_are_counted_and_cut():
    assert positions(np.arange(30) % 2 == 1) == "15 rows (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...)"
    assert numbered([1], "sample") == "1 sample (1)"


def test_different_classes_stay_different():
    assert (
        spellings(
            [
                "a",
                "b",
                "1",
                "2",
                "1.5",
                "10",
                "-1",
                "nan",
                "1_0",
                "1/2",
                "2/4",
                "v1",
                "v1.0",
                "12345678901234567891",
                "12345678901234567890",
            ]
        )
        == []
    )
    assert folded("1_000") != folded("1000") and folded("1e3") == folded("1000.0") == folded("01000")
    assert not is_missing("none") and not is_missing("NA") and is_missing(" NaN ") and is_missing("N/A")


@pytest.mark.parametrize("name", ["several ones", "nan", "fractions", "a name twice", "lists"])
def test_they_are_said_wherever_labels_come_in(name):
    labels, got, fix = CASES[name]
    images = np.zeros([len(labels), 4, 4], np.uint8)
    fine = np.zeros(len(labels), int)
    for given in (dict(train_labels=labels, test_labels=fine), dict(train_labels=fine, test_labels=labels)):
        with pytest.raises(ValueError) as error:
            check(Dataset("x", train_images=images, test_images=images, **given))
        assert got in str(error.value) and fix in str(error.value)


def test_one_hot_labels_of_an_objective_are_targets_and_several_ones_are_refused():
    loss = pj.objective(lambda w, x: x @ w, (), num_classes=2)
    x, w = jnp.ones([3, 2]), jnp.ones([2, 2])
    with pytest.raises(ValueError, match=r"Write labels.argmax\(1\), and the rows themselves as targets="):
        loss(w, (), pj.batch(x, jnp.eye(2)[jnp.array([0, 1, 1])]))
    with pytest.raises(ValueError, match=SEVERAL):
        loss(w, (), pj.batch(x, jnp.ones([3, 2])))


def test_nan_in_labels_is_named_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"batch needs integer labels, got nan in 1 row \(1\) of float"):
        pj.batch(jnp.ones([2, 2]), np.array([0, NAN]), num_classes=2)
    with pytest.raises(ValueError, match=r"needs integer labels, got nan in 1 row \(1\) of float64. Drop it"):
        pj.lpl_delta(jnp.ones([2, 2]), np.array([0, NAN]), direction=1.0, bound=1.0, step_size=0.1)
    with pytest.raises(TypeError, match=r"accuracy needs integer labels, got nan in 1 row \(1\)"):
        accuracy(np.ones([2, 2]), np.array([0, NAN]))


def test_measuring_a_net_names_them_too():
    labels = np.array([0, NAN])
    with pytest.raises(ValueError, match=r"data_loss needs integer labels, got nan in 1 row \(1\)"):
        data_loss(lambda w, x: x @ w, np.eye(2, dtype=np.float32), labels)
    with pytest.raises(ValueError, match=r"clean_accuracy needs labels 0, 1, 2, …, got nan in 1 row \(1\) of float64"):
        clean_accuracy(lambda x: x, np.zeros([2, 2], np.float32), labels)
