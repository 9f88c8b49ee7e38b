"""sync_perturbation=False (m-sharpness), in all links that climb: each device's own perturbation, on 2 and on 8 devices, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.parameter.problem import Problem, added, as_numpy, assert_close, enable_x64, inner, make, norm, unit

LINKS = {
    "sam": (pj.sam, dict(radius=0.5)),
    "asam": (pj.asam, dict(radius=0.5)),
    "gsam": (pj.gsam, dict(radius=0.5, alpha=0.4)),
    "amp": (pj.amp, dict(radius=0.05, step_size=0.6)),
    "looksam": (pj.looksam, dict(radius=0.5)),
    "esam": (pj.esam, dict(radius=0.5, beta=1.0, gamma=1.0)),
    "pugd": (pj.pugd, dict(radius=0.7)),
    "rts": (pj.rts, dict(radius=0.7, scale=0.5)),
}
each_link = pytest.mark.parametrize("name", LINKS)


def climb(name, w, g):
    """The step up along one device's gradient."""
    if name == "asam":
        T = {n: np.abs(v) + 0.01 for n, v in w.items()}
        return {n: 0.5 * T[n] ** 2 * g[n] / norm({m: T[m] * g[m] for m in g}) for n in g}
    if name == "amp":
        return {n: v * min(0.6, 0.05 / norm(g)) for n, v in g.items()}
    if name in ("pugd", "rts"):
        return {n: 0.7 * v for n, v in unit({n: np.abs(w[n]) * g[n] for n in g}).items()}
    return {n: 0.5 * v for n, v in unit(g).items()}


def wanted(name, w, own, gradients):
    """own: the devices' gradients at w; gradients: those at any point."""
    mean = lambda trees: {n: np.mean([t[n] for t in trees], 0) for n in w}
    g = mean(own)
    above = mean([gradient(added(w, climb(name, w, mine))) for mine, gradient in zip(own, gradients, strict=True)])
    if name == "gsam":
        return added(above, added(g, above, -inner(g, above) / inner(above, above)), -0.4)
    if name in ("pugd", "rts"):
        return unit(added(above, g, 1.0 if name == "pugd" else 0.5))
    return above


@pytest.fixture
def problem():
    """16 samples."""
    with enable_x64(True):
        rng, small = np.random.default_rng(3), make()
        yield Problem(small.params, rng.normal(size=(16, 4)), np.eye(3)[rng.integers(0, 3, 16)])


def per_device(problem, count, **more):
    """The first update of every link, each on `count` devices that have an equal share of the samples: {name: leaves [count, ...]}."""
    params = jax.tree.map(jnp.asarray, problem.params)

    def updates(x, y):
        part = problem._replace(x=x, y=y)
        mean = lambda tree: jax.lax.pmean(tree, "d")
        losses = lambda p: -(y * jax.nn.log_softmax(jnp.tanh(x @ p["kernel"] + p["bias"][None]) @ p["head"])).sum(1)
        grad_fn, own, found = lambda p, weights=None: mean(part.slope(p)), part.slope(params), {}
        given = dict(grad_fn=grad_fn, local_grads=own, loss_fn=losses, key=jax.random.key(0), axis_name="d")
        for name, (link, settings) in LINKS.items():
            made = link(**settings, **more)
            found[name] = made.update(mean(own), made.init(params), params, **given)[0]
        return found

    split = lambda a: a.reshape(count, -1, *a.shape[1:])
    return jax.pmap(updates, "d", devices=jax.devices()[:count])(split(problem.x), split(problem.y))


@pytest.mark.parametrize("count", [2, 8])
def test_every_device_climbs_along_its_own_gradient_and_all_take_the_mean_there(problem, count):
    parts = [problem._replace(x=x, y=y) for x, y in zip(np.split(problem.x, count), np.split(problem.y, count), strict=True)]
    own = [part.gradient(problem.params) for part in parts]
    apart, together = per_device(problem, count, sync_perturbation=False), per_device(problem, count)
    for name in LINKS:
        expected = wanted(name, problem.params, own, [part.gradient for part in parts])
        whole = wanted(name, problem.params, [problem.gradient(problem.params)], [problem.gradient])
        for device in range(count):  # the parameters stay the same everywhere
            take = lambda tree, device=device: as_numpy(jax.tree.map(lambda leaf: leaf[device], tree))
            assert_close(take(apart[name]), expected, rtol=1e-9, atol=1e-12)
            assert_close(take(together[name]), whole, rtol=1e-9, atol=1e-12)
        assert norm(added(expected, whole, -1)) > 1e-4 * norm(whole), name


@each_link
def test_on_one_device_there_is_no_difference(problem, name):
    link, settings = LINKS[name]
    g, params = problem.slope(problem.params), problem.params
    given = dict(grad_fn=lambda p, weights=None: problem.slope(p), loss_fn=lambda p: jnp.zeros(16), key=jax.random.key(0))
    update = lambda made, **more: made.update(g, made.init(params), params, **given, **more)[0]
    ours = update(link(**settings, sync_perturbation=False), local_grads=g)
    assert_close(as_numpy(ours), as_numpy(update(link(**settings))), rtol=0)


@each_link
def test_without_a_gradient_of_ones_own_it_is_an_error_that_names_the_way(name):
    link, settings = LINKS[name]
    made, w = link(**settings, sync_perturbation=False), jnp.ones(2)
    given = dict(grad_fn=lambda p: p, loss_fn=lambda p: p, key=jax.random.key(0))
    with pytest.raises(ValueError, match=f"{name} needs `local_grads` .* got none.* Write --parallel pmap"):
        made.update(w, made.init(w), w, **given)


def test_amp_climbs_one_step_only_along_a_device_s_own_gradient():
    with pytest.raises(ValueError, match="amp needs num_steps=1 for sync_perturbation=False, got 2"):
        pj.amp(num_steps=2, sync_perturbation=False)


@pytest.mark.optax_promotes
@each_link
def test_an_injected_radius_that_turns_negative_becomes_nan_and_not_a_step_down(name):
    """optax.inject_hyperparams under jit: the factory sees arrays, whose values it can't check."""
    link, settings = LINKS[name]
    settings = settings | dict(radius=optax.linear_schedule(0.5, -0.5, 2)) | (dict(every=1) if name == "looksam" else {})
    injected = optax.inject_hyperparams(link, static_args=("num_steps",) if name == "amp" else ())(**settings)
    params, grad_fn = jnp.array([1.0, -2.0]), lambda p, weights=None: p**3
    given = dict(grad_fn=grad_fn, loss_fn=lambda p: p, key=jax.random.key(0))
    update = jax.jit(lambda state: injected.update(grad_fn(params), state, params, **given))
    state, found = injected.init(params), []
    for _ in range(3):
        updates, state = update(state)
        found.append(np.asarray(updates))
    np.testing.assert_array_equal(state.hyperparams["radius"], -0.5)
    assert np.isfinite(found[:2]).all() and np.isnan(found[2]).all()
