"""perturbjax.checks: what passes, what doesn't, and that the message says what was given and what to write instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.checks import check_choice, check_labels, check_logits_labels, check_number, is_traced, nearest


def message(check, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.3), np.array([0.0, 1.0]), jnp.array([0.2, 0.8]), None, [0, 1], True])
def test_numbers_inside_pass(value):
    check_number("f", low=0, high=1, x=value)


@pytest.mark.parametrize(
    "value, limits, rule",
    [
        (-1, dict(low=0), "x >= 0, got -1"),
        (0.0, dict(low=0, open_low=True), "x > 0, got 0.0"),
        (1.5, dict(low=0, high=1), "0 <= x <= 1, got 1.5"),
        (0, dict(low=0, high=1, open_low=True), "0 < x <= 1, got 0"),
        (3, dict(high=2), "x <= 2, got 3"),
        (float("nan"), dict(), "a finite x, got nan"),
        (float("nan"), dict(low=0, high=1), "0 <= x <= 1, got nan"),
        (-np.inf, dict(low=0), "x >= 0, got -inf"),
    ],
)
def test_numbers_outside_don_t_and_the_message_has_the_rule(value, limits, rule):
    assert message(check_number, "f", **limits, x=value) == f"f needs {rule}."


def test_one_element_outside_is_enough():
    assert "got [0.5 2. ]" in message(check_number, "f", low=0, high=1, x=np.array([0.5, 2.0]))
    assert "needs y >= 0" in message(check_number, "f", low=0, x=1, y=-1)


def test_no_number_at_all():
    assert message(check_number, "f", x="large") == "f needs a number for x, got 'large'."
    assert "a number for x" in message(check_number, "f", x=lambda step: step)


def test_infinity_passes_where_there_is_no_limit():
    check_number("f", low=0, x=np.inf)


def test_traced_numbers_pass_unseen():
    @jax.jit
    def f(x):
        assert is_traced(x) and is_traced({"a": (1, x)}) and not is_traced((1, np.ones(2)))
        check_number("f", low=0, x=x)
        check_labels("f", x.astype(jnp.int32), 2)
        return x

    assert f(-1.0) == -1


def test_the_nearest_name_and_all_names():
    assert nearest("acuracy", ["variance", "accuracy"]) == "Did you mean 'accuracy'? There are: accuracy, variance."
    assert nearest("zzz", ["variance", "accuracy"]) == "There are: accuracy, variance."


def test_choices():
    check_choice("f", "norm", "l2", ("l1", "l2"))
    expected = "f needs norm to be one of its names, got 'l3'. Did you mean "
    assert message(check_choice, "f", "norm", "l3", ("l1", "l2")).startswith(expected)
    assert "got 3" in message(check_choice, "f", "norm", 3, ("l1", "l2"))
    assert "got ['l1']" in message(check_choice, "f", "norm", ["l1"], ("l1", "l2"))


def test_logits_and_labels():
    check_logits_labels("f", jnp.ones([3, 2]), jnp.zeros([3], jnp.int32))
    check_logits_labels("f", np.ones([3, 2]), np.zeros([3], np.uint8))
    for logits, labels in [((3, 4, 2), (3, 4)), ((3, 2), (4,)), ((3,), (3,))]:
        found = message(check_logits_labels, "f", jnp.ones(logits), jnp.zeros(labels, jnp.int32))
        assert f"got {logits} and {labels}" in found and "logits.reshape(-1, C)" in found
    assert "got float32" in message(check_logits_labels, "f", jnp.ones([3, 2]), jnp.zeros([3]))


def test_logits_and_labels_are_checked_in_a_trace():
    with pytest.raises(ValueError, match=re.escape("got (3, 2) and (4,)")):
        jax.jit(lambda u, y: check_logits_labels("f", u, y))(jnp.ones([3, 2]), jnp.zeros([4], jnp.int32))


def test_labels_outside_the_classes():
    check_labels("f", np.array([0, 2, 1], np.uint8), 3)
    check_labels("f", np.array([], np.int32), 3)
    assert message(check_labels, "f", [0, 1, 7, 3], 3) == (
        "f needs labels in 0..2, got 7 at position 2 (2 such labels). Drop these rows or set num_classes=8."
    )
    assert message(check_labels, "f", [0, 5, -1], 3).endswith("got 5 at position 1 (2 such labels). Drop these rows.")
    assert "labels.astype('int32')" in message(check_labels, "f", [0.0, 1.0], 3)
