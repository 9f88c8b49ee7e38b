"""perturbjax.checks: what passes, what doesn't, and that the message says what was given and what to write instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.checks import check_choice, check_labels, check_logits_labels, check_number, is_traced, nearest
from perturbjax.parameter.amp import amp_project
from perturbjax.parameter.asam import asam_scale
from perturbjax.parameter.rts import rts_ascent


def message(check, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.3), np.array([0.0, 1.0]), jnp.array([0.2, 0.8]), None, [0, 1], True])
def test_numbers_inside_pass(value):
    check_number("f", low=0, high=1, x=value)


@pytest.mark.parametrize(
    "value, limits, rule, instead",
    [
        (-1, dict(low=0), "x >= 0, got -1", 0),
        (0.0, dict(low=0, open_low=True), "x > 0, got 0.0", 1),
        (-3, dict(low=2, open_low=True), "x > 2, got -3", 3),
        (1.5, dict(low=0, high=1), "0 <= x <= 1, got 1.5", 1),
        (0, dict(low=0, high=1, open_low=True), "0 < x <= 1, got 0", 1),
        (3, dict(high=2), "x <= 2, got 3", 2),
        (float("nan"), dict(), "a finite x, got nan", 1),
        (float("nan"), dict(low=0, high=0.5), "0 <= x <= 0.5, got nan", 0.5),
        (-np.inf, dict(low=0), "x >= 0, got -inf", 0),
        (-np.inf, dict(low=0, infinite=True), "x >= 0, got -inf", 0),
        (np.inf, dict(), "a finite x, got inf", 1),
        (-np.inf, dict(), "a finite x, got -inf", 1),
        (np.inf, dict(low=2), "a finite x, got inf", 2),
        (np.inf, dict(high=2, infinite=True), "x <= 2, got inf", 2),
        (float("nan"), dict(infinite=True), "a number x, got nan", 1),
    ],
)
def test_numbers_outside_don_t_and_the_message_has_the_rule_and_a_number_inside(value, limits, rule, instead):
    assert message(check_number, "f", **limits, x=value) == f"f needs {rule}. Write x={instead}."
    check_number("f", **limits, x=instead)


def test_a_flag_is_written_as_it_is_typed():
    assert message(check_number, "--seeds", low=1, seeds=0) == "--seeds needs seeds >= 1, got 0. Write --seeds 1."
    assert message(check_number, "--reach", low=0, reach="far").endswith("Write --reach 1.")


def test_one_element_outside_is_enough():
    assert "got [0.5 2. ]" in message(check_number, "f", low=0, high=1, x=np.array([0.5, 2.0]))
    assert "needs y >= 0" in message(check_number, "f", low=0, x=1, y=-1)


def test_no_number_at_all():
    assert message(check_number, "f", x="large") == "f needs a number for x, got 'large'. Write x=1."
    assert "a number for x" in message(check_number, "f", x=lambda step: step)


def test_infinity_passes_where_it_is_let():
    check_number("f", low=0, infinite=True, x=np.inf)
    check_number("f", infinite=True, x=np.array([-np.inf, 0.0]))


def test_settings_that_infinity_breaks_are_errors():
    """A factor of inf makes losses nan; as a radius, a rate or a temperature it means nothing."""
    for make, setting in [
        (pj.logit_adjustment, "tau"), (pj.zla, "tau"), (pj.zla, "ratio"), (pj.mixup, "alpha"), (pj.focal, "gamma"), (pj.sam, "radius"),
        (pj.pugd, "epsilon"), (pj.robust_lasso, "weight"), (pj.lpl, "step_size"), (pj.dp_sgd, "noise_multiplier"), (pj.varied, "eps"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"needs a finite {setting}, got inf"):
            make(**{setting: float("inf")})


def test_settings_in_which_infinity_says_no_bound_take_it():
    pj.gradient_clipping(bound=np.inf), pj.dp_sgd(bound=np.inf), pj.sam(p=np.inf), pj.ada(bound=np.inf), pj.lpa(bound=np.inf)
    pj.self_paced_logit(tau=np.inf), pj.self_paced(tau=np.inf), pj.uat(clip_loss=np.inf), pj.mixed_uat(clip_loss=np.inf)
    pj.d2l(tolerance=np.inf), pj.proselflc(turning=np.inf), pj.robust_clustering(weight=np.inf), pj.mixpert(tau=np.inf)
    pj.by_accuracy(tau=np.inf), pj.mbls(margin=np.inf), pj.svm(weight=np.inf)


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


U, Y, X = jnp.array([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1]), jnp.ones([2, 4])
BARE = {
    "lpl_delta": lambda u, y: pj.lpl_delta(u, y, direction=1.0, bound=0.1, step_size=0.1),
    "logpert_delta": lambda u, y: pj.logpert_delta(u, y, weight=0.3),
    "mixpert_delta": lambda u, y: pj.mixpert_delta(u, y, bound=1.0),
    "self_paced_logit_delta": lambda u, y: pj.self_paced_logit_delta(u, y, tau=1.0),
    "arcface_delta": lambda u, y: pj.arcface_delta(u, y, scale=30.0),
    "cosface_delta": lambda u, y: pj.cosface_delta(y, u.shape[1]),
    "lpg_delta": lambda u, y: pj.lpg_delta(u, y, direction=1.0, bound=0.1),
    "lpg_head_delta": lambda u, y: pj.lpg_head_delta(u, X, y, direction=1.0, bound=0.1),
    "lpg_full_delta": lambda u, y: pj.lpg_full_delta(u, y, lambda v: X.T @ v, direction=1.0, bound=0.1),
}
each_function = pytest.mark.parametrize("name", BARE)


@each_function
def test_bare_functions_say_what_is_wrong_with_numbers_and_labels(name):
    f = BARE[name]
    assert np.isfinite(f(U, Y)).all()
    for labels, found in ((jnp.array([0, 3]), 3), (jnp.array([0, -1]), -1)):
        with pytest.raises(ValueError, match=f"{name} needs labels in 0..2, got {found} at position 1"):
            f(U, labels)
    with pytest.raises(ValueError, match=f"{name} needs at least 2 classes, got 1"):
        f(U[:, :1], jnp.array([0, 0]))
    for bad in (jnp.nan, jnp.inf):
        if name != "cosface_delta":  # takes no logits
            with pytest.raises(ValueError, match=rf"{name} needs finite .*, got {bad} at \[0, 1\]"):
                f(U.at[0, 1].set(bad), Y)


@each_function
def test_within_jit_labels_outside_the_classes_are_padding(name):
    found = jax.jit(BARE[name])(U, jnp.array([0, -1]))
    assert np.isfinite(found).all() and (name == "mixpert_delta" or not np.asarray(found)[1].any())


def test_one_class_has_no_margin():
    with pytest.raises(ValueError, match="margins needs at least 2 classes, got 1"):
        pj.margins(jnp.ones([2, 1]))


def test_labels_outside_the_classes():
    check_labels("f", np.array([0, 2, 1], np.uint8), 3)
    check_labels("f", np.array([], np.int32), 3)
    assert message(check_labels, "f", [0, 1, 7, 3], 3) == (
        "f needs labels in 0..2, got 7 at position 2 (2 such labels). Drop these rows or set num_classes=8."
    )
    assert message(check_labels, "f", [0, 5, -1], 3).endswith("got 5 at position 1 (2 such labels). Drop these rows.")
    assert "got float64. Write labels.astype(np.int32)" in message(check_labels, "f", [0.0, 1.0], 3)


ONE = jnp.ones([2])


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: pj.noise_matrix("pear", 3, 0.2), "kind"),
        (lambda: pj.bootstrapped_targets(jnp.eye(2), jnp.log(jnp.full([2, 2], 0.5)), weight=0.1, kind="had"), "kind"),
        (lambda: pj.self_paced_losses(ONE, 1.0, kind="liner"), "kind"),
        (lambda: pj.class_weights(np.array([3, 1]), kind="balance"), "kind"),
        (lambda: amp_project({"w": ONE}, radius=1.0, norm="tenser"), "norm"),
        (lambda: rts_ascent({"w": ONE}, {"w": ONE}, ascent="gradiant"), "ascent"),
        (lambda: asam_scale({"w": ONE}, adaptive="weight"), "adaptive"),
    ],
)
def test_functions_refuse_names_they_do_not_know(call, name):
    """And don't take them for another one."""
    with pytest.raises(ValueError, match=rf"needs {name} to be one of its names, got '\w+'. Did you mean"):
        call()
