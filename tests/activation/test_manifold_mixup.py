"""perturbjax.activation.manifold_mixup: one site a batch, drawn anew, mixed as mixup would; the rest of the line untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B = 3, 6
MODEL = {
    "stage1": lambda w, x: jnp.tanh(x @ w["a"]),
    "stage2": lambda w, x: jnp.tanh(x @ w["b"]),
    "logits": lambda w, x: x @ w["c"],
}
SITES = ("input", "stage1", "stage2")


def problem():
    a, b, c, d, e = jax.random.split(jax.random.key(0), 5)
    params = {name: jax.random.normal(key, [4, n]) for name, key, n in (("a", a, 4), ("b", b, 4), ("c", c, C))}
    return params, pj.batch(jax.random.normal(d, [B, 4]), jax.random.randint(e, [B], 0, C))


def watch(site, when):
    """A link that reports the value and the targets at a site, before or behind the links between."""
    see = lambda flow, rest, state, context: (flow, state, {"value": flow.value, "targets": flow.targets})
    return pj.Perturbation(site, lambda context: (), see, name=f"{when} {site}")


def watched(sites):
    """key -> Output of one pass, with the values before and behind the mixing at every site in its metrics."""
    params, batch = problem()
    before, behind = ([watch(site, when) for site in SITES] for when in ("before", "behind"))
    made = pj.objective(MODEL, pj.chain(*before, pj.manifold_mixup(sites=sites), *behind), num_classes=C)
    states = made.init(params, batch.inputs)
    return lambda key: made(params, states, batch, key=key)[1]


@functools.cache
def run():
    """Outputs of one batch under 90 keys."""
    keys = jax.random.split(jax.random.key(1), 90)
    return jax.device_get(jax.jit(jax.vmap(watched(SITES)))(keys)), problem()[1]


def changed(metrics, site):
    """Whether the link at this site changed the value: [keys]."""
    return np.abs(metrics[f"behind {site}/value"] - metrics[f"before {site}/value"]).max((-2, -1)) > 0


def test_exactly_one_site_is_mixed_and_every_site_gets_its_turn():
    out, _ = run()
    mixed = np.stack([changed(out.metrics, site) for site in SITES])
    np.testing.assert_array_equal(mixed.sum(0), 1)  # [site, key]: no key leaves all alone, none mixes two
    assert (mixed.sum(1) > 15).all()  # 30 expected, standard deviation 4.5


def test_values_and_targets_are_mixed_by_the_same_weight_and_pairs():
    out, batch = run()
    onehot = np.eye(C)[np.asarray(batch.labels)]
    for k in range(12):
        weights = set()
        for site in SITES:
            before, behind = (out.metrics[f"{when} {site}/value"][k] for when in ("before", "behind"))
            targets = [out.metrics[f"{when} {site}/targets"][k] for when in ("before", "behind")]
            if (before == behind).all():
                np.testing.assert_array_equal(*targets)
                continue
            np.testing.assert_allclose(targets[0], onehot, atol=1e-6)
            # Least squares over λ and partners: behind = λ·before + (1 − λ)·before[partner] holds exactly for one choice.
            grid = np.linspace(0.5, 1, 2001)
            towards = before[None] - before[:, None]  # [i, j]: x_j − x_i
            moved = behind - before
            fit = np.abs((1 - grid)[:, None, None, None] * towards[None] - moved[None, :, None]).sum(-1)  # [λ, i, j]
            best = fit.min(2).sum(1).argmin()
            weight, partner = grid[best], fit[best].argmin(1)
            assert fit[best].min(1).max() < 5e-3 and sorted(partner) == list(range(B))
            np.testing.assert_allclose(targets[1], weight * onehot + (1 - weight) * onehot[partner], atol=1e-3)
            weights.add(weight)
        assert len(weights) == 1


def test_with_one_site_it_is_mixup_there():
    """The same λ and pairs for the same key of the mixing: mixup's own functions, at the drawn site."""
    params, batch = problem()
    made = pj.objective(MODEL, pj.manifold_mixup(sites=("stage1",)), num_classes=C)
    loss, _ = made(params, made.init(params, batch.inputs), batch, key=jax.random.key(5))
    mix_key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))[1]
    weight, partner = pj.draw_mixing(mix_key, B, alpha=2.0)
    hidden = pj.mix(jnp.tanh(batch.inputs @ params["a"]), weight, partner)
    log_p = jax.nn.log_softmax(jnp.tanh(hidden @ params["b"]) @ params["c"])
    targets = pj.mix(jax.nn.one_hot(batch.labels, C), weight, partner)
    np.testing.assert_allclose(loss, -(targets * log_p).sum(1).mean(), rtol=1e-6)


def test_the_order_in_which_sites_are_named_is_no_matter():
    out = [watched(("stage2", "input"))(jax.random.key(seed)).metrics for seed in range(6)]
    mixed = np.array([[changed(metrics, site) for site in SITES] for metrics in out])
    np.testing.assert_array_equal(mixed.sum(1), 1)
    np.testing.assert_array_equal(mixed.any(0), [True, False, True])


def test_a_search_behind_it_sees_the_mixed_pass():
    """LPL's residual is that of the mixed targets: its search starts from the pass that manifold mixup made."""
    params, batch = problem()
    key = jax.random.key(4)
    chained = pj.objective(MODEL, pj.chain(pj.manifold_mixup(), pj.lpl(bound=0.3, direction=1.0)), num_classes=C)
    alone = pj.objective(MODEL, pj.manifold_mixup(), num_classes=C)
    states = lambda made: made.init(params, batch.inputs)
    out = chained(params, states(chained), batch, key=key)[1]
    mixed = alone(params, states(alone), batch, key=key)[1]
    assert (out.losses - mixed.losses).mean() > 1e-3


def test_errors_say_what_to_write():
    for sites in ((), "stage1"):
        with pytest.raises(
            ValueError, match=r"manifold_mixup needs a tuple of sites, got .* Write sites=\('input', 'stage1'\)"
        ):
            pj.manifold_mixup(sites=sites)
    with pytest.raises(ValueError, match="got 'stage3'"):
        pj.objective(MODEL, pj.manifold_mixup(sites=("stage3",)), num_classes=C)
    with pytest.raises(ValueError, match="manifold_mixup needs alpha > 0"):
        pj.manifold_mixup(alpha=-1.0)


def test_the_binary_loss_is_that_of_the_code():
    """binary_cross_entropy(softmax(u), ỹ), mean over classes, in float64 with its logarithms held at −100."""
    rng = np.random.default_rng(0)
    u, y = 3 * rng.normal(size=(8, C)), rng.dirichlet(np.ones(C), size=8)
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    expected = -(y * np.maximum(np.log(p), -100) + (1 - y) * np.maximum(np.log1p(-p), -100)).mean(1)
    log_p = jax.nn.log_softmax(jnp.float32(u))
    np.testing.assert_allclose(pj.softmax_binary_cross_entropy(log_p, jnp.float32(y)), expected, rtol=1e-5)
    with jax.enable_x64(True):  # the gradient by the logits: Σ_c (p_c − y_c)/(C (1 − p_c)) · ∂u_c-terms, by differences
        loss = lambda u: pj.softmax_binary_cross_entropy(jax.nn.log_softmax(u), jnp.asarray(y)).sum()
        grad, step = jax.grad(loss)(jnp.asarray(u)), 1e-5 * np.eye(C)[0][None]
        np.testing.assert_allclose(grad[:, 0].sum(), (loss(u + step) - loss(u - step)) / 2e-5, rtol=1e-6)


def test_the_binary_loss_stays_finite_where_a_probability_is_one():
    value, grad = jax.value_and_grad(
        lambda u: pj.softmax_binary_cross_entropy(jax.nn.log_softmax(u), jnp.array([[1.0, 0, 0], [0, 1.0, 0]])).sum()
    )(jnp.array([[200.0, 0, 0], [200.0, 0, 0]]))
    assert np.isfinite(value) and np.isfinite(grad).all() and value > 50


def test_manifold_mixup_trains_on_the_binary_loss_if_told_to():
    params, batch = problem()
    made = [pj.objective(MODEL, pj.manifold_mixup(loss=loss), num_classes=C) for loss in ("ce", "binary")]
    ce, binary = (m(params, m.init(params, batch.inputs), batch, key=jax.random.key(5))[1] for m in made)
    np.testing.assert_array_equal(ce.logits, binary.logits)  # the same mixtures
    see = watch("loss", "behind")
    m = pj.objective(MODEL, pj.chain(pj.manifold_mixup(loss="binary"), see), num_classes=C)
    targets = m(params, m.init(params, batch.inputs), batch, key=jax.random.key(5))[1].metrics["behind loss/targets"]
    expected = pj.softmax_binary_cross_entropy(jax.nn.log_softmax(binary.logits), targets)
    np.testing.assert_allclose(binary.losses, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="manifold_mixup needs loss to be one of its names, got 'bce'"):
        pj.manifold_mixup(loss="bce")
