"""perturbjax.activation.lpa_sites: which site is chosen, when, on which statistics, and what the others cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import perturbjax as pj
from perturbjax.activation.lpa_sites import comparing, layer_effect
from perturbjax.link import Where

C, B, D = 3, 8, 4
EXAMPLES = 2 * B  # two steps an epoch
SITES = ("stage1", "stage2")
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2], np.int32)


def problem(strong="stage2"):
    """Two tanh layers; what stands before the `strong` site is small, so that a shift of length ε moves the loss most there."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(D, n)).astype(np.float32) for name, n in (("a", D), ("b", D), ("c", C))}
    params["b" if strong == "stage2" else "c"] *= 0.05 if strong == "stage2" else 1.0
    return params, rng.normal(size=(B, D)).astype(np.float32)


PIECES = {
    "stage1": lambda w, x: x @ w["a"],
    "stage2": lambda w, x: jnp.tanh(x) @ w["b"],
    "logits": lambda w, x: jnp.tanh(x) @ w["c"],
}
LINKS = dict(bound=0.5, beta=1.0)


def see(site):
    return pj.Perturbation(site, lambda c: (), lambda flow, rest, s, c: (flow, s, {site: flow.value}), name="seen")


def objective(links, model=PIECES, **given):
    return pj.objective(model, links, num_classes=C, class_counts=np.array([2, 3, 3]), **{"num_examples": EXAMPLES, **given})


def walk(links, steps, params, x, drift=0.0):
    """Outputs of so many steps at fixed parameters, and the states after them; inputs grow by `drift` a step."""
    made = objective(links)
    states, found = made.init(params, x), []

    @jax.jit
    def one(states, step):
        grown = x * (1 + drift * step.astype(jnp.float32))
        return made(params, states, pj.batch(grown, jnp.asarray(LABELS)), step=step, epoch=step // 2)[1]

    for step in range(steps):
        out = one(states, jnp.int32(step))
        states = out.states
        found.append(out)
    return found, states


def effects(params, x, **settings):
    """Eq. 13 by an LPA at each site alone."""
    plain = objective(())(params, (), pj.batch(x, jnp.asarray(LABELS)))[1].losses
    found = []
    for site in SITES:
        losses = walk(pj.lpa(site=site, **{**LINKS, **settings}), 1, params, x)[0][0].losses
        found.append(sum(abs(float((losses - plain)[LABELS == c].mean())) for c in range(C)))
    return np.array(found)


@pytest.mark.parametrize("strong, winner", [("stage2", 1), ("stage1", 0)])
def test_the_site_with_the_largest_loss_change_is_taken(strong, winner):
    params, x = problem(strong)
    if strong == "stage1":
        params["b"] *= 4.0
    wanted = effects(params, x, direction=1.0)
    found, states = walk(pj.lpa(site=SITES, direction=1.0, **LINKS), 2, params, x)
    assert wanted.argmax() == winner and abs(wanted[0] - wanted[1]) > 0.02
    np.testing.assert_allclose(states[0].effects, wanted, rtol=1e-4)
    assert [int(out.metrics["lpa/site"]) for out in found] == [winner, winner]
    alone = walk(pj.lpa(site=SITES[winner], direction=1.0, **LINKS), 1, params, x)[0][0]
    np.testing.assert_allclose(found[1].losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(
        found[0].losses, objective(())(params, (), pj.batch(x, jnp.asarray(LABELS)))[1].losses, rtol=1e-6
    )


def test_only_the_chosen_site_moves_and_only_it_is_paid_for():
    params, x = problem()
    found, _ = walk(pj.chain(see("stage1"), pj.lpa(site=SITES, direction=1.0, num_steps=2, **LINKS)), 2, params, x)
    before = np.asarray(found[1].metrics["seen/stage1"])
    links = pj.chain(pj.lpa(site=SITES, direction=1.0, num_steps=2, **LINKS), see("stage1"), see("stage2"))
    found, _ = walk(links, 2, params, x)
    np.testing.assert_array_equal(found[1].metrics["seen/stage1"], before)
    length = np.linalg.norm(found[1].metrics["seen/stage2"] - np.tanh(before) @ params["b"], axis=1)
    np.testing.assert_allclose(length, 0.5, rtol=1e-3)
    assert [int(out.metrics["lpa/inner_evaluations"]) for out in found] == [4, 2]


def test_an_inactive_site_runs_no_search():
    """Counted while it runs: the layer after stage1 runs once for the pass, T times more only where stage1 searches."""
    params, x = problem()
    ran = []
    note = lambda name: lambda w, v: (jax.debug.callback(lambda: ran.append(name)), PIECES[name](w, v))[1]
    made = objective(pj.lpa(site=SITES, direction=1.0, **LINKS), {name: note(name) for name in PIECES})
    states = made.init(params, x)
    run = jax.jit(lambda states, step: made(params, states, pj.batch(x, jnp.asarray(LABELS)), step=step)[1])
    counts = []
    for step in range(2):
        del ran[:]
        out = jax.block_until_ready(run(states, jnp.int32(step)))
        jax.effects_barrier()
        states = out.states
        counts.append([ran.count(name) for name in PIECES])
    assert counts == [[1, 1 + 3 + 1, 1 + 3 + 1 + 3 + 1], [1, 1, 1 + 3]]


def test_sites_are_compared_at_the_start_of_the_first_second_and_every_later_e_th_epoch():
    due = lambda every: [
        s for s in range(14) if comparing(pj.Context(C, num_examples=17, batch_size=8, where=Where(step=s)), every)
    ]
    assert due(1) == [0, 2, 4, 6, 8, 10, 12]
    assert due(2) == [0, 2, 6, 10]
    assert due(3) == [0, 2, 8]


def test_before_there_are_accuracies_the_first_site_stands():
    """Epoch 0 leaves every class alone (Algorithm 1), at its end there are directions and the sites are told apart."""
    params, x = problem()
    found, states = walk(pj.lpa(site=SITES, every=5, **LINKS), 4, params, x)
    assert [int(out.metrics["lpa/site"]) for out in found] == [0, 0, 1, 1]
    assert [int(out.metrics["lpa/raised"]) for out in found][:2] == [0, 0]
    assert int(found[3].metrics["lpa/raised"]) + int(found[3].metrics["lpa/lowered"]) == C
    assert float(states[0].effects[1]) > float(states[0].effects[0]) > 0


@pytest.mark.parametrize("update", ["epoch", "step"])
def test_each_batch_counts_once_in_the_statistics_however_many_sites_look_at_it(update):
    """The accuracies are those of LPA at one site: of clean logits, though the site changes on the way."""
    params, x = problem()
    split = pj.by_accuracy(measure="top1" if update == "epoch" else "probability", update=update)
    _, states = walk(pj.lpa(site=SITES, split=split, **LINKS), 4, params, x, drift=0.7)
    _, alone = walk(pj.lpa(site="stage2", split=split, **LINKS), 4, params, x, drift=0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states[0].split, alone[0])


def test_the_bound_is_that_of_the_chosen_layer():
    params, x = problem()
    kw = dict(bound=0.5, beta=0.5, direction=1.0)
    _, states = walk(pj.lpa(site=SITES, **kw), 1, params, x)
    np.testing.assert_allclose(states[0].effects, effects(params, x, **kw), rtol=1e-4)


def test_two_adaptive_methods_keep_apart():
    params, x = problem()
    up, down = (pj.lpa(site=SITES, direction=s, **LINKS) for s in (1.0, -1.0))
    _, states = walk(pj.chain(up, down), 1, params, x)
    np.testing.assert_allclose(states[0].effects, effects(params, x, direction=1.0), rtol=1e-4)
    np.testing.assert_allclose(states[2].effects, effects(params, x, direction=-1.0), rtol=1e-4)
    assert states[1] == states[3] == ()


def test_switched_off_it_is_plain_training_bit_for_bit():
    params, x = problem()

    def gradients(links, step):
        made = objective(links)
        loss = lambda w, states, x: made(w, states, pj.batch(x, jnp.asarray(LABELS)), step=step)[0]
        return jax.jit(jax.value_and_grad(loss))(params, made.init(params, x), x)

    for step in (0, 1):
        off = gradients(pj.lpa(site=SITES, bound=0.0, direction=1.0), step)
        jax.tree.map(np.testing.assert_array_equal, off, gradients((), step))


def test_vmapped_seeds_choose_for_themselves():
    """Two nets, one strongest at each site: the same losses as one by one."""
    one, x = problem("stage2")
    two = one | {"b": one["b"] * 80}
    made = objective(pj.lpa(site=SITES, direction=1.0, **LINKS))
    batch = pj.batch(x, jnp.asarray(LABELS))
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    run = lambda params, states, number: (lambda out: (out.states, out.losses))(made(params, states, batch, step=number)[1])
    fresh = made.init(one, x)
    params, states = stack(one, two), stack(fresh, fresh)
    together = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))
    for number in (0, 1):
        states, losses = together(params, states, jnp.int32(number))
    assert sorted(np.argmax(np.asarray(states[0].effects), axis=1)) == [0, 1]
    for i, own in enumerate((one, two)):
        alone = walk(pj.lpa(site=SITES, direction=1.0, **LINKS), 2, own, x)[0][1]
        np.testing.assert_allclose(losses[i], alone.losses, rtol=1e-4)


def test_eight_devices_are_one_device():
    params, x = problem()
    made = objective(pj.lpa(site=SITES, direction=1.0, **LINKS))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    run = jax.jit(lambda states, batch, step: made(params, states, batch, step=step)[1])
    data = jax.device_put(pj.batch(x, jnp.asarray(LABELS)), NamedSharding(mesh, PartitionSpec("d")))
    states = made.init(params, x)
    for number in (0, 1):
        out = run(states, data, jnp.int32(number))
        states = out.states
    alone = walk(pj.lpa(site=SITES, direction=1.0, **LINKS), 2, params, x)[0][1]
    np.testing.assert_allclose(out.losses, alone.losses, rtol=1e-5)


def test_per_device_code_agrees_on_the_site():
    P = PartitionSpec
    params, x = problem()
    links = pj.lpa(site=SITES, direction=1.0, **LINKS)
    made, one = objective(links, axis_name="d"), objective(links)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    run = lambda states, batch, step: (lambda out: (out.states, out.losses))(made(params, states, batch, step=step)[1])
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=(P(), P("d")), check_vma=False))
    states = one.init(params, x)
    for number in (0, 1):
        states, losses = mapped(states, pj.batch(x, jnp.asarray(LABELS)), jnp.int32(number))
    alone, kept = walk(links, 2, params, x)
    np.testing.assert_allclose(losses, alone[1].losses, rtol=1e-5)
    np.testing.assert_allclose(states[0].effects, kept[0].effects, rtol=1e-4)


def test_the_effect_is_the_sum_over_classes_of_absolute_mean_changes():
    clean, after = np.array([1.0, 1.0, 2.0, 5.0]), np.array([2.0, 4.0, 0.5, 5.0])
    assert float(layer_effect(jnp.float32(clean), jnp.float32(after), jnp.array([0, 0, 2, 2]), 4)) == 2.0 + 0.75


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(site=()), r"lpa needs one site or several different ones, got \(\)"),
        (dict(site=("stage1", "stage1")), "lpa needs one site or several different ones"),
        (dict(site=SITES, every=0), "lpa needs every >= 1, got 0"),
    ],
)
def test_errors_say_what_was_given(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.lpa(**settings)


def test_it_needs_the_number_of_examples_and_known_sites():
    params, x = problem()
    with pytest.raises(ValueError, match="lpa needs num_examples to know when an epoch begins, got none"):
        objective(pj.lpa(site=SITES), num_examples=None).init(params, x)
    with pytest.raises(ValueError, match="got 'stage9'"):
        objective(pj.lpa(site=("stage1", "stage9")))
    with pytest.raises(ValueError, match="the channels at the site 'stage1', got 5"):
        objective(pj.lpa(site=SITES, rank=5)).init(params, x)


def test_one_site_in_a_list_is_that_site():
    assert pj.lpa(site=("stage1",)).site == pj.lpa(site="stage1").site
