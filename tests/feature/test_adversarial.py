"""perturbjax.feature.adversarial: one kernel for samples, classes and the corpus, its projections, its checks, and devices."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import perturbjax as pj
from perturbjax.training import init_state
from perturbjax.training.step import device_data
from tests.feature.problem import B, C, D, H, W, images, losses_of, slope_of, weights
from tests.training.problem import NUMBERS, dataset, recipe

Y = np.array([0, 2, 2, 0, 0, 2, 0, 0])  # class 1 is absent
PROJECTED = {"linf": lambda d, e: np.clip(d, -e, e), "l2": lambda d, e: d * min(1, e / max(np.linalg.norm(d), 1e-30))}


def jax_losses(w, y):
    return lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x.reshape(x.shape[0], -1) @ w), y[:, None], axis=1)[:, 0]


def numpy_ascent(w, x, y, delta, groups, *, bound, step_size, num_steps, norm, step, beta=np.inf, low=-np.inf, high=np.inf):
    """The definition, in float64 and loops."""
    delta = np.array(delta, np.float64)
    for _ in range(num_steps):
        slopes = slope_of(w, np.clip(x + delta[groups], low, high), y, beta)
        for g in set(groups.tolist()):
            mean = slopes[groups == g].mean(0)
            way = np.sign(mean) if step == "sign" else mean / max(np.linalg.norm(mean), 1e-30)
            delta[g] = PROJECTED[norm](delta[g] + step_size * way, bound)
    return delta


@pytest.mark.parametrize("norm, step, bound", [("linf", "sign", 0.1), ("l2", "unit", 0.3)])
@pytest.mark.parametrize("who", ["sample", "class", "corpus"])
def test_deltas_are_those_of_numpy_in_float64(who, norm, step, bound):
    w, x = weights(), images()
    groups = {"sample": np.arange(B), "class": Y, "corpus": np.zeros(B, int)}[who]
    number = {"sample": B, "class": C, "corpus": 1}[who]
    rng = np.random.default_rng(2)
    start = np.stack([PROJECTED[norm](d, bound) for d in rng.uniform(-bound, bound, (number, H, W))])
    settings = dict(bound=bound, step_size=0.07, num_steps=3, norm=norm, step=step)
    with jax.enable_x64(True):
        found = jax.jit(
            lambda x, d: pj.group_ascent(
                jax_losses(jnp.asarray(w), jnp.asarray(Y)), x, d, jnp.asarray(groups), value_range=(0.0, 1.0), **settings
            )
        )(x, start)
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, numpy_ascent(w, x, Y, start, groups, low=0, high=1, **settings), atol=1e-9)
    length = {"linf": np.abs(found).max((1, 2)), "l2": np.linalg.norm(found.reshape(number, -1), axis=1)}[norm]
    assert (length <= bound * (1 + 1e-9)).all()
    if who == "class":
        np.testing.assert_array_equal(found[1], start[1])  # absent: bit for bit


def test_l1_deltas_lie_in_the_ball_and_raise_the_losses():
    w, x = weights(), images()
    with jax.enable_x64(True):
        loss = jax_losses(jnp.asarray(w), jnp.asarray(Y))
        found = pj.group_ascent(
            loss,
            jnp.asarray(x),
            jnp.zeros([C, H, W]),
            jnp.asarray(Y),
            bound=0.5,
            step_size=0.3,
            num_steps=4,
            norm="l1",
            step="unit",
        )
    found = np.asarray(found)
    np.testing.assert_allclose(np.abs(found[[0, 2]]).sum((1, 2)), 0.5, rtol=1e-9)
    for c in (0, 2):
        assert losses_of(w, x + found[Y], Y)[Y == c].sum() > losses_of(w, x, Y)[Y == c].sum()


def test_groups_of_one_are_adversarial_training_and_one_group_is_the_corpus():
    """arange(B) gives pgd's own deltas (AT); one class gives what zeros give (UAT)."""
    w, x = jnp.asarray(weights(), jnp.float32), jnp.asarray(images(), jnp.float32)
    loss, settings = jax_losses(w, jnp.asarray(Y)), dict(bound=0.1, step_size=0.04, num_steps=3)
    start = jnp.zeros_like(x)
    ascent = jax.jit(lambda y, d, groups: pj.group_ascent(jax_losses(w, y), x, d, groups, **settings))
    alone = ascent(jnp.asarray(Y), start, jnp.arange(B))
    delta = jax.jit(lambda x: pj.pgd(loss, x, None, B, step="sign", norm="linf", value_range=(0.0, 1.0), **settings)[0])(x)
    np.testing.assert_allclose(alone, delta, atol=1e-6)
    corpus = ascent(jnp.full(B, 2), start[:1], jnp.zeros(B, jnp.int32))
    by_class = ascent(jnp.full(B, 2), start[:C], jnp.full(B, 2))
    np.testing.assert_array_equal(by_class[2], corpus[0])
    np.testing.assert_array_equal(by_class[:2], 0)


@pytest.mark.parametrize("who", ["sample", "class", "corpus"])
def test_of_two_classes_the_delta_is_the_worst_corner_of_the_cube(who):
    """The loss of a linear net is convex in δ, so its maximum over ‖δ‖∞ ≤ ε is one of 2^D corners: all are tried."""
    w, x, y = weights(2, seed=3), images(), (np.arange(B) % 4 == 0).astype(int)
    groups = {"sample": np.arange(B), "class": y, "corpus": np.zeros(B, int)}[who]
    number = groups.max() + 1
    corners = 0.2 * np.array(list(itertools.product([-1, 1], repeat=D))).reshape(-1, H, W)
    every = np.stack([losses_of(w, x + corner[None], y) for corner in corners])  # [2^D, B]
    best = np.array([every[:, groups == g].sum(1).max() for g in range(number)])
    with jax.enable_x64(True):
        loss = jax_losses(jnp.asarray(w), jnp.asarray(y))
        delta = pj.group_ascent(
            loss, jnp.asarray(x), jnp.zeros([number, H, W]), jnp.asarray(groups), bound=0.2, step_size=0.05, num_steps=5
        )
    after = losses_of(w, x + np.asarray(delta)[groups], y)
    np.testing.assert_allclose([after[groups == g].sum() for g in range(number)], best, rtol=1e-9)


def test_lost_samples_do_not_pull():
    """β: the slope of min(ℓ, β) is zero above it."""
    w, x, corpus = weights(scale=8.0), images(), np.zeros(B, int)
    beta = np.median(losses_of(w, x, Y))
    settings = dict(bound=0.5, step_size=0.01, num_steps=1, step="unit", norm="l2")
    with jax.enable_x64(True):
        loss = jax_losses(jnp.asarray(w), jnp.asarray(Y))
        found = [
            pj.group_ascent(loss, jnp.asarray(x), jnp.zeros([1, H, W]), jnp.asarray(corpus), clip_loss=b, **settings)
            for b in (beta, np.inf, 0.5 * losses_of(w, x, Y).min())
        ]
    np.testing.assert_allclose(found[0], numpy_ascent(w, x, Y, np.zeros([1, H, W]), corpus, beta=beta, **settings), atol=1e-9)
    assert np.abs(found[0] - found[1]).max() > 1e-4
    np.testing.assert_array_equal(found[2], 0)  # everybody is lost


def test_images_stay_in_their_range_and_a_zero_delta_changes_no_bit():
    x = jnp.asarray(images(low=0.0, high=1.0), jnp.float32)
    moved = pj.shifted(x, jnp.full([1, H, W], 0.3), jnp.zeros(B, jnp.int32), value_range=(0.0, 1.0))
    np.testing.assert_allclose(moved, np.clip(np.asarray(x) + 0.3, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(pj.shifted(x, jnp.zeros([C, H, W]), jnp.asarray(Y), value_range=(0.0, 1.0)), x)
    outside = pj.shifted(x, jnp.full([C, H, W], 0.3), jnp.full(B, C))  # padding belongs to no group
    np.testing.assert_array_equal(outside, x)
    assert pj.shifted(x.astype(jnp.bfloat16), jnp.full([1, H, W], 0.1), jnp.zeros(B, jnp.int32)).dtype == jnp.bfloat16


@pytest.mark.parametrize("count", [2, 8])
def test_devices_give_the_delta_of_one(count):
    """Sharded, and as per-device code with unequal shares of the classes."""
    w, x, y = jnp.asarray(weights(), jnp.float32), jnp.asarray(images(), jnp.float32), jnp.asarray(Y)
    delta = jnp.asarray(np.random.default_rng(5).uniform(-0.1, 0.1, (C, H, W)), jnp.float32)

    def ascent(x, y, axis_name=None):
        return pj.group_ascent(jax_losses(w, y), x, delta, y, bound=0.1, step_size=0.03, num_steps=2, axis_name=axis_name)

    one = ascent(x, y)
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    np.testing.assert_allclose(jax.jit(ascent)(jax.device_put(x, spread), jax.device_put(y, spread)), one, atol=1e-6)
    mapped = jax.shard_map(
        lambda x, y: ascent(x, y, "d"), mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec("d")), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(mapped)(x, y), one, atol=1e-6)


ALL = [pj.adversarial_training, pj.uat, pj.cuat, pj.mixed_uat]


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
class TestMessages:
    def test_grey_levels_where_pixels_are_in_0_1(self, make):
        with pytest.raises(
            ValueError, match=rf"{make.__name__} needs bound <= 1, got 8: .* Write bound=8/255 if you count in grey"
        ):
            make(bound=8)
        with pytest.raises(ValueError, match=rf"{make.__name__} needs step_size <= 1, got 2: .* Write step_size=2/255"):
            make(step_size=2)
        others = dict(universal_bound=4, universal_step_size=1) if make is pj.mixed_uat else {}
        assert make(bound=8, step_size=2, value_range=(0.0, 255.0), **others)
        assert make(bound=8, value_range=None) and make(bound=8, site="stem")

    def test_pixels_in_0_1_where_the_range_has_grey_levels(self, make):
        with pytest.raises(
            ValueError, match=r"needs bound in the units of value_range, \[0, 255\], got 0.0313725. Write bound=8."
        ):
            make(bound=8 / 255, value_range=(0.0, 255.0))

    def test_a_ball_longer_than_any_way_between_two_images(self, make):
        objective = pj.objective(lambda w, x: x.reshape(2, -1) @ w, make(bound=128.0, norm="l2", step="unit"), num_classes=C)
        with pytest.raises(ValueError, match=rf"{make.__name__} needs bound <= 2.44949, got 128"):  # √6 for 6 pixels
            objective.init(jnp.zeros([D, C]), jnp.zeros([2, H, W]))

    def test_names_and_signs(self, make):
        with pytest.raises(ValueError, match=f"{make.__name__} needs norm to be one of its names, got 'max'"):
            make(norm="max")
        with pytest.raises(ValueError, match=f"{make.__name__} needs step to be one of its names, got 'big'"):
            make(step="big")
        with pytest.raises(ValueError, match=f"{make.__name__} needs bound >= 0, got -1"):
            make(bound=-1)
        with pytest.raises(ValueError, match=r"needs value_range \(low, high\) with low < high, got \(1.0, 0.0\)"):
            make(value_range=(1.0, 0.0))

    def test_words_can_not_be_moved_a_little(self, make):
        made = pj.objective(lambda w, x: jnp.zeros([x.shape[0], C]) + w[None], make(), num_classes=C)
        x = jnp.zeros([2, 4], jnp.int32)
        with pytest.raises(
            ValueError, match=rf"{make.__name__} needs floating values at the site 'input', got int32. .*embedding"
        ):
            made(jnp.zeros(C), made.init(jnp.zeros(C), x), pj.batch(x, jnp.zeros(2, jnp.int32)))


GREY = dict(bound=8.0, step_size=2.0, value_range=(0.0, 255.0))
CLIPPING = {
    **{make.__name__: (make, GREY) for make in ALL if make is not pj.mixed_uat},
    "mixed_uat": (pj.mixed_uat, GREY | dict(universal_bound=4.0, universal_step_size=1.0)),
    "akd": (pj.akd, GREY),
    "regpert": (pj.regpert, dict(value_range=(0.0, 255.0))),
    "ada": (pj.ada, dict(value_range=(0.0, 255.0), features="input")),
    "mixpert": (partial(pj.mixpert, eps2=0.1), dict(eps2=8.0, value_range=(0.0, 255.0))),
}


@pytest.mark.parametrize(("name", "make", "grey"), [(name, *what) for name, what in CLIPPING.items()], ids=CLIPPING)
def test_images_in_other_units_than_the_range_are_told_at_init(name, make, grey):
    """They would be clipped to white, or hardly perturbed, without a word. In a trace and of shapes alone nothing can be seen."""

    def init(link, x):
        return pj.objective(lambda w, x: x.reshape(x.shape[0], -1) @ w, link, num_classes=C).init(jnp.zeros([D, C]), x)

    ours, levels = (
        jnp.asarray(images(4, low=0.0, high=1.0), jnp.float32),
        jnp.asarray(images(4, low=0.0, high=255.0), jnp.float32),
    )
    own = {"features": "input"} if name == "ada" else {}
    with pytest.raises(
        ValueError, match=rf"{name} needs inputs in value_range, \[0, 1\], got [\d.]+ to 2\d\d.*Write images / 255"
    ):
        init(make(**own), levels)
    with pytest.raises(
        ValueError, match=rf"{name} needs inputs in the units of value_range, \[0, 255\], .* Write value_range=\(0.0"
    ):
        init(make(**grey), ours)
    init(make(**own), ours), init(make(**grey), levels), init(make(**own), jax.ShapeDtypeStruct(levels.shape, levels.dtype))
    init(make(**own, value_range=None), levels), init(make(**grey), jnp.zeros_like(levels))
    jax.jit(lambda x: init(make(**own), x) and 0)(levels)


def test_the_trainer_s_images_are_in_0_1():
    """Grey levels on the command line end before training, also where the images are whole numbers up to 255."""
    build = lambda numbers: (pj.adversarial_training(bound=8, step_size=2, value_range=(0.0, 255.0)),)
    with pytest.raises(
        ValueError, match=r"adversarial_training needs inputs in the units of value_range, \[0, 255\], got none above 1"
    ):
        init_state(recipe(build), NUMBERS, device_data(dataset()), 0)


@pytest.mark.parametrize("make", ALL[1:], ids=lambda f: f.__name__)
def test_images_of_another_size_than_at_init_are_named(make):
    made = pj.objective(lambda w, x: x.mean((1, 2))[:, None] * w[None], make(), num_classes=C)
    w, y = jnp.ones(C), jnp.zeros(2, jnp.int32)
    states = made.init(w, jnp.zeros([2, H, W]))
    with pytest.raises(
        ValueError,
        match=rf"{make.__name__} needs values of one size at the site 'input', \({H}, {W}\) as at init, got \(5, 4\).* Resize them, or",
    ):
        made(w, states, pj.batch(jnp.zeros([2, 5, 4]), y))


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_embeddings_of_texts_are_moved_without_a_range(make):
    """site="input" means the embedding there; nothing is clipped to pixels."""
    model = {"embedding": lambda w, t: w["e"][t], "logits": lambda w, a: a.mean(1) @ w["h"]}
    rng = np.random.default_rng(0)
    w = {"e": jnp.asarray(rng.normal(0, 3, (5, 4)), jnp.float32), "h": jnp.asarray(rng.normal(size=(4, C)), jnp.float32)}
    see = pj.Perturbation("embedding", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(model, pj.chain(make(bound=0.5, step_size=0.5), see), num_classes=C)
    words, labels = jnp.asarray(rng.integers(0, 5, (6, 3)), jnp.int32), jnp.asarray([0, 1, 2, 0, 1, 2], jnp.int32)
    states = made.init(w, words)
    step = jax.jit(lambda states: made(w, states, pj.batch(words, labels))[1])
    for _ in range(2):
        out = step(states)
        states = out.states
    gap = np.asarray(out.metrics["seen/value"] - w["e"][words])
    assert np.abs(w["e"]).max() > 1 and 0.4 < np.abs(gap).max() <= 1.0 + 1e-5
