"""perturbjax.logit.isda: the closed form, the bound it is, the exact covariance, the ramp, and what it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, D, B = 3, 4, 8
MODEL = pj.line(
    {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, a: a @ w["w"].T + w["b"][None]},
    head=lambda w: (w["w"], w["b"]),
)


@pytest.fixture
def problem():
    """Parameters and three batches, in float64; class 2 is absent from the first batch."""
    rng = np.random.default_rng(1)
    params = dict(a=rng.normal(size=(5, D)), w=rng.normal(size=(C, D)), b=rng.normal(size=C))
    batches = [(rng.normal(size=(B, 5)), rng.integers(0, C - (i == 0), B).astype(np.int32)) for i in range(3)]
    with jax.enable_x64(True):
        yield params, batches


def by_loops(w, covariance):
    """(w_j − w_y)ᵀ Σ_y (w_j − w_y) for row y and column j, entry by entry."""
    shift = np.zeros((len(w), len(w)))
    for y in range(len(w)):
        for j in range(len(w)):
            gap = w[j] - w[y]
            shift[y, j] = sum(gap[a] * covariance[y, a, b] * gap[b] for a in range(w.shape[1]) for b in range(w.shape[1]))
    return shift


def spread(seed):
    """Random covariances [C, D, D]."""
    factor = np.random.default_rng(seed).normal(size=(C, D, D))
    return factor @ factor.swapaxes(1, 2) / D


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


def objective():
    return pj.objective(MODEL, pj.isda(strength=0.5), num_classes=C)


def features(params, x):
    return np.tanh(x @ params["a"])


def test_closed_form_is_the_double_sum(problem):
    w, covariance = problem[0]["w"], spread(0)
    ours = pj.isda_delta(jnp.asarray(w), jnp.asarray(covariance), strength=0.7)
    np.testing.assert_allclose(ours, 0.35 * by_loops(w, covariance), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.diagonal(ours), 0, atol=1e-12)
    assert (ours > -1e-12).all()


def test_it_is_the_bound_of_infinitely_many_gaussian_copies(problem):
    """E[ℓ] ≤ log E[exp ℓ] (Jensen), ℓ the loss of features a + e with e ~ N(0, λΣ_y); the closed form is the right-hand side."""
    (params, [(x, y), *_]), rng = problem, np.random.default_rng(2)
    a, covariance, strength = features(params, x), spread(1), 0.05
    noise = rng.normal(size=(20_000, B, D))
    noise = np.concatenate([noise, -noise]) * np.sqrt(strength)  # antithetic: odd terms drop out
    shaped = np.einsum("nbi,bji->nbj", noise, np.linalg.cholesky(covariance)[y])
    u = (a + shaped) @ params["w"].T + params["b"]
    sampled = cross_entropy(u.reshape(-1, C), np.tile(y, len(u))).reshape(-1, B)
    shift = np.asarray(pj.isda_delta(jnp.asarray(params["w"]), jnp.asarray(covariance), strength=strength))
    bound = cross_entropy(a @ params["w"].T + params["b"] + shift[y], y)
    assert (bound > sampled.mean(0)).all()
    np.testing.assert_allclose(bound, np.log(np.exp(sampled).mean(0)), atol=0.02)


def test_covariance_is_exact_over_all_batches_and_taken_in_before_use(problem):
    params, batches = problem
    made = objective()
    states = made.init(params, batches[0][0])
    for number, (x, y) in enumerate(batches):
        loss, out = made(params, states, pj.batch(x, y), progress=0.4)
        states = out.states
        seen = [features(params, np.concatenate([x for x, _ in batches[: number + 1]]))]
        labels = np.concatenate([y for _, y in batches[: number + 1]])
        covariance = np.zeros((C, D, D))
        for c in np.unique(labels):
            covariance[c] = np.cov(seen[0][labels == c].T, bias=True)
        np.testing.assert_allclose(states[0].covariance, covariance, rtol=1e-4, atol=1e-6)  # kept in float32
        np.testing.assert_array_equal(states[0].count, np.bincount(labels, minlength=C))
        u = features(params, x) @ params["w"].T + params["b"]
        shift = 0.4 * 0.5 / 2 * by_loops(params["w"], covariance)
        np.testing.assert_allclose(out.losses, cross_entropy(u + shift[y], y), rtol=1e-4)


def test_strength_is_ramped_by_progress(problem):
    params, [(x, y), *_] = problem
    made = objective()
    states = made.init(params, x)
    shift = [np.asarray(made(params, states, pj.batch(x, y), progress=t)[1].logits) for t in (0.0, 0.5, 1.0)]
    plain = features(params, x) @ params["w"].T + params["b"]
    np.testing.assert_allclose(shift[0], plain, rtol=1e-12)
    np.testing.assert_allclose(shift[2] - plain, 2 * (shift[1] - plain), rtol=1e-6, atol=1e-9)


def numpy_covariance(params, batches):
    """[C, D, D] of all features so far, divided by the count."""
    a, y = features(params, np.concatenate([x for x, _ in batches])), np.concatenate([y for _, y in batches])
    return np.array([np.cov(a[y == c].T, bias=True) if (y == c).any() else np.zeros((D, D)) for c in range(C)])


def run_through(params, batches, *, progress=0.4, epochs=None, **settings):
    """(the last step's Output, its plain logits) of one step per batch."""
    made = pj.objective(MODEL, pj.isda(**settings), num_classes=C)
    states = made.init(params, batches[0][0])
    for number, (x, y) in enumerate(batches):
        at = progress if np.isscalar(progress) else progress[number]
        _, out = made(params, states, pj.batch(x, y), progress=at, epoch=number if epochs is None else epochs[number])
        states = out.states
    return out, features(params, x) @ params["w"].T + params["b"]


def test_updated_after_use_the_shift_comes_from_the_batches_before(problem):
    params, batches = problem
    before, _ = run_through(params, batches, update="before")
    after, u = run_through(params, batches, update="after")
    y = batches[-1][1]
    shift = 0.4 * 0.5 / 2 * by_loops(params["w"], numpy_covariance(params, batches[:2]))
    np.testing.assert_allclose(after.logits, u + shift[y], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(after.states[0].covariance, before.states[0].covariance)
    first, u = run_through(params, batches[:1], update="after")
    np.testing.assert_allclose(first.logits, u, rtol=1e-12)


def test_a_decay_forgets_old_batches_exponentially(problem):
    """As if every sample of a batch k steps ago were there decay^k times; decay = 1 is the exact count."""
    params, batches = problem
    out, _ = run_through(params, batches, decay=0.6)
    a = [features(params, x) for x, _ in batches]
    for c in range(C):
        weight = np.concatenate([0.6 ** (2 - k) * (y == c) for k, (_, y) in enumerate(batches)])
        rows = np.concatenate(a)
        mean = weight @ rows / weight.sum()
        covariance = (weight[:, None] * (rows - mean)).T @ (rows - mean) / weight.sum()
        np.testing.assert_allclose(out.states[0].covariance[c], covariance, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(out.states[0].count[c], weight.sum(), rtol=1e-6)
    exact, _ = run_through(params, batches, decay=1.0)
    np.testing.assert_allclose(exact.states[0].covariance, numpy_covariance(params, batches), rtol=1e-4, atol=1e-6)


def test_the_authors_ramp_is_by_whole_epochs_and_zero_in_the_first(problem):
    """λ₀·epoch/epochs: with 10 epochs of 4 steps, progress at steps 2, 21 and 22 is 0.05, 0.525 and 0.55, and λ 0, 0.5 and 0.5."""
    params, batches = problem
    batches, progress, epochs = [batches[0]] * 5, [0.0, 0.05, 0.5, 0.525, 0.55], [0, 0, 5, 5, 5]
    factor = by_loops(params["w"], numpy_covariance(params, batches[:1]))[batches[0][1]] / 4  # λ₀/2
    for steps, ramped in ((2, 0.0), (3, 0.5), (5, 0.5)):
        out, u = run_through(params, batches[:steps], progress=progress, epochs=epochs, ramp="epoch")
        np.testing.assert_allclose(out.logits, u + ramped * factor, rtol=1e-4, atol=1e-6)
    out, u = run_through(params, batches, progress=progress, epochs=epochs, ramp="none")
    np.testing.assert_allclose(out.logits, u + factor, rtol=1e-4, atol=1e-6)
    out, u = run_through(params, batches, progress=progress, epochs=epochs)
    np.testing.assert_allclose(out.logits, u + 0.55 * factor, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_rows_but_not_the_covariance(problem):
    """To finite differences of the loss with Σ held at its value."""
    params, [(x, y), *_] = problem
    made = objective()
    states = made.init(params, x)
    grad, out = jax.grad(made, has_aux=True)(params, states, pj.batch(x, y), progress=0.8)
    covariance = np.asarray(out.states[0].covariance, np.float64)

    def loss(params):
        u = features(params, x) @ params["w"].T + params["b"]
        return cross_entropy(u + 0.8 * 0.25 * by_loops(params["w"], covariance)[y], y).mean()

    for name, value in params.items():
        numeric = np.zeros(value.size)
        for i, e in enumerate(1e-6 * np.eye(value.size).reshape(-1, *value.shape)):
            numeric[i] = (loss(params | {name: value + e}) - loss(params | {name: value - e})) / 2e-6
        np.testing.assert_allclose(grad[name], numeric.reshape(value.shape), atol=1e-8)


def test_every_loss_is_raised(problem):
    params, [(x, y), *_] = problem
    made, plain = objective(), pj.objective(MODEL, (), num_classes=C)
    _, out = made(params, made.init(params, x), pj.batch(x, y), progress=1.0)
    assert (out.losses > plain(params, (), pj.batch(x, y))[1].losses).all()


def test_it_needs_features_and_a_head():
    with pytest.raises(ValueError, match="isda needs 'features', got none. The model's sites are input, logits"):
        pj.objective(lambda w, x: x @ w, pj.isda(), num_classes=C)
    with pytest.raises(ValueError, match="isda needs 'head', got none"):
        pj.objective({"features": lambda w, x: x, "logits": lambda w, a: a @ w}, pj.isda(), num_classes=C)
    maps = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w}, head=lambda w: (w.T, 0))
    with pytest.raises(ValueError, match=r"isda needs features \[B, d\], got \(2, 3, 3, 4\)"):
        pj.objective(maps, pj.isda(), num_classes=C).init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
    with pytest.raises(ValueError, match="isda needs strength >= 0, got -1"):
        pj.isda(strength=-1.0)
    with pytest.raises(ValueError, match="isda needs 0 <= decay <= 1, got 1.1"):
        pj.isda(decay=1.1)
    with pytest.raises(ValueError, match="isda needs ramp .* got 'epochs'. Did you mean 'epoch'"):
        pj.isda(ramp="epochs")
    with pytest.raises(ValueError, match="isda needs update .* got 'behind'"):
        pj.isda(update="behind")
