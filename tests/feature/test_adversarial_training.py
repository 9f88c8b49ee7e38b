"""perturbjax.feature.adversarial_training: the ball and the pixel range, PGD in numpy, random starts, and no leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B = 3, 6
MODEL = {"stage1": lambda w, x: jnp.tanh(x.reshape(x.shape[0], -1) @ w["a"]), "logits": lambda w, x: x @ w["b"]}
STEP = {"linf": "sign", "l2": "unit", "l1": "unit"}
NORM = {"linf": lambda d: np.abs(d).max(1), "l2": lambda d: np.linalg.norm(d, axis=1), "l1": lambda d: np.abs(d).sum(1)}


def problem(low=0.0, high=1.0):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "b": jnp.asarray(rng.normal(size=(5, C)), jnp.float32)}
    return (
        params,
        jnp.asarray(rng.uniform(low, high, size=(B, 2, 3)), jnp.float32),
        jnp.asarray(rng.integers(0, C, B), jnp.int32),
    )


def forward(params, x):
    return MODEL["logits"](params, MODEL["stage1"](params, x))


def losses_of(params, x, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(forward(params, x)), y[:, None], axis=1)[:, 0]


def run(link, params, x, y, *, index=None, key=0):
    """(Output, gradients, what the perturbed value at the link's site is)."""
    see = pj.Perturbation(link.site, lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(MODEL, pj.chain(link, see), num_classes=C)
    grads, out = jax.grad(made, has_aux=True)(
        params, made.init(params, x), pj.batch(x, y, index=index), key=jax.random.key(key)
    )
    return out, grads, out.metrics["seen/value"]


@pytest.mark.parametrize("norm, bound", [("linf", 0.1), ("l2", 0.3), ("l1", 0.5)])
def test_delta_is_in_the_ball_the_image_in_its_range_and_the_loss_grows(norm, bound):
    params, x, y = problem()
    link = pj.adversarial_training(bound=bound, step_size=bound / 2, num_steps=3, norm=norm, step=STEP[norm])
    out, _, moved = run(link, params, x, y)
    length = NORM[norm](np.asarray(moved - x).reshape(B, -1))
    assert (length <= bound * (1 + 1e-5)).all() and (length > bound / 2).all()
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6
    assert (out.losses > losses_of(params, x, y)).all()
    assert out.metrics["adversarial_training/inner_evaluations"] == 3


@pytest.mark.parametrize("starts", [True, False])
def test_deltas_are_those_of_a_loop_in_numpy(starts):
    """δ⁰ ~ U(−ε, ε) or 0; δ ← clip(δ + α·sign ∇, ±ε), by finite differences of each sample's own loss."""
    params, x, y = problem(0.3, 0.7)  # the pixel range is not felt
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def losses(x):
        u = np.tanh(x.reshape(B, -1) @ w["a"]) @ w["b"]
        return np.log(np.exp(u).sum(1)) - u[np.arange(B), y]

    key = jax.random.fold_in(jax.random.key(0), 0)
    start = pj.random_start(key, jnp.arange(B), (2, 3), bound=0.1, norm="linf")
    clean, delta = np.asarray(x, np.float64), np.asarray(start, np.float64) * starts
    for _ in range(3):
        basis = 1e-6 * np.eye(6).reshape(6, 1, 2, 3)
        slope = np.stack([losses(clean + delta + e) - losses(clean + delta - e) for e in basis], axis=1).reshape(B, 2, 3)
        delta = np.clip(delta + 0.04 * np.sign(slope), -0.1, 0.1)
    _, _, moved = run(pj.adversarial_training(bound=0.1, step_size=0.04, num_steps=3, random_starts=starts), params, x, y)
    np.testing.assert_allclose(moved, clean + delta, atol=1e-6)


def test_it_is_pgd_with_every_sample_its_own_group():
    params, x, y = problem()
    kw = dict(bound=0.2, step_size=0.05, num_steps=4, norm="l2", step="unit")
    start = pj.random_start(jax.random.fold_in(jax.random.key(0), 0), jnp.arange(B), (2, 3), bound=0.2, norm="l2")
    delta = jax.jit(
        lambda x: pj.pgd(lambda v: losses_of(params, v, y), x, None, B, start=start, value_range=(0.0, 1.0), **kw)[0]
    )(x)
    _, _, moved = run(pj.adversarial_training(**kw), params, x, y)
    np.testing.assert_allclose(moved, x + delta, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_fill_the_ball_and_belong_to_the_position_in_the_data_set(norm):
    key, index = jax.random.key(3), jnp.array([5, 1, 9, 5])
    start = np.asarray(pj.random_start(key, index, (20,), bound=0.3, norm=norm))
    assert (NORM[norm](start) <= 0.3 * (1 + 1e-5)).all() and (NORM[norm](start) > 0.2).all()
    assert (start > 0).any() and (start < 0).any()
    np.testing.assert_array_equal(start[0], start[3])
    assert (start[0] != start[1]).any()
    again = pj.random_start(key, index[::-1], (20,), bound=0.3, norm=norm)
    np.testing.assert_array_equal(again, start[::-1])


def test_permuting_the_batch_permutes_the_deltas_and_keys_draw_anew():
    params, x, y = problem()
    link, index, order = pj.adversarial_training(num_steps=1), 10 * jnp.arange(B), np.array([3, 0, 5, 1, 4, 2])
    *_, moved = run(link, params, x, y, index=index)
    *_, permuted = run(link, params, x[order], y[order], index=index[order])
    np.testing.assert_allclose(permuted, moved[order], atol=1e-6)
    *_, other = run(link, params, x, y, index=index, key=1)
    assert np.abs(other - moved).max() > 1e-3


def test_no_gradient_leaks_through_the_perturbation():
    """The parameters' gradient is the one at the adversarial images held fixed."""
    params, x, y = problem()
    _, grads, moved = run(pj.adversarial_training(bound=0.2, step_size=0.1, num_steps=2, random_starts=False), params, x, y)
    fixed = jax.grad(lambda params: losses_of(params, moved, y).mean())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, fixed)


def test_inputs_that_are_no_pixels():
    """value_range=None: nothing is clipped; the default would pull standardised inputs into [0, 1], and says so."""
    params, x, y = problem(-3.0, 3.0)
    *_, moved = run(pj.adversarial_training(bound=0.0, num_steps=1, value_range=None), params, x, y)
    np.testing.assert_array_equal(moved, x)
    *_, moved = run(pj.adversarial_training(bound=2.0, step_size=1.0, num_steps=2, value_range=(-3.0, 3.0)), params, x, y)
    assert moved.min() >= -3 and moved.max() <= 3 and np.abs(moved).max() > 1
    with pytest.raises(ValueError, match=r"needs inputs in value_range, \[0, 1\], got -2.*Write .*value_range=None for inputs"):
        run(pj.adversarial_training(bound=0.0, num_steps=1), params, x, y)


def test_activations_are_not_clipped():
    params, x, y = problem()
    *_, moved = run(pj.adversarial_training(site="stage1", bound=3.0, step_size=1.0, num_steps=2), params, x, y)
    assert moved.min() < -1 and moved.max() > 1


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="adversarial_training needs bound <= 1, got 8"):
        pj.adversarial_training(bound=8)  # pixels are in [0, 1]: 8/255
    with pytest.raises(ValueError, match="adversarial_training needs bound >= 0, got -0.1"):
        pj.adversarial_training(bound=-0.1)
    with pytest.raises(ValueError, match="adversarial_training needs norm to be one of its names, got 'max'"):
        pj.adversarial_training(norm="max")
    with pytest.raises(ValueError, match="needs step to be one of its names, got 'big'"):
        pj.adversarial_training(step="big")


def test_fast_adversarial_training_is_one_long_step_from_a_random_start():
    """Wong et al.: δ ← clip(U(−ε, ε) + 1.25 ε · sign ∇, ±ε)."""
    params, x, y = problem(0.3, 0.7)
    start = pj.random_start(jax.random.fold_in(jax.random.key(0), 0), jnp.arange(B), (2, 3), bound=0.1, norm="linf")
    slope = jax.grad(lambda x: losses_of(params, x, y).sum())(x + start)
    _, _, moved = run(pj.adversarial_training(bound=0.1, step_size=0.125, num_steps=1), params, x, y)
    np.testing.assert_allclose(moved - x, np.clip(start + 0.125 * np.sign(slope), -0.1, 0.1), atol=1e-6)
