"""What every method promises, tested once for all of them: a method joins by being exported (it is found by its coordinates)."""

import functools
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import perturbjax as pj
from perturbjax import spec, taxonomy
from perturbjax.link import TAIL, clean_logits
from tests.methods import METHODS, PLUGINS, each

SWITCHABLE = [f for f in METHODS if f.off is not None]
ON = {"gradient_clipping": dict(bound=0.05), "mbls": dict(margin=0.1)}  # where the defaults do nothing to so small a problem
# Partners are drawn within the batch at hand, so per-device code mixes within each device's share: by nature, and documented.
MIX_WITHIN_THE_BATCH = {"mixup", "cutmix", "manifold_mixup", "domain_mixup"}


every_method = each(METHODS)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Most of the time here is XLA's: without its costly passes it takes half, and it computes what is written, operation by operation.

    With them it merges operations as it suits the processor: two programs that do the same differ in the last bit on some.
    """
    jax.config.update("jax_disable_most_optimizations", "[ada]" not in request.node.name)  # ADA's long steps blow rounding up
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CLASSES, BATCH, SIDE, DOMAINS = 5, 16, 4, 3
EXAMPLES = 115 + BATCH
EPOCH = EXAMPLES // BATCH  # steps


def normalised(x, running, train):
    """A bare BatchNorm: batch statistics in training, running ones otherwise; returns the new running mean."""
    mean = x.mean(0) if train else running
    return x - mean[None], 0.9 * running + 0.1 * jax.lax.stop_gradient(x.mean(0))


def stage(name):
    def run(w, x, stats, *, train, key):
        hidden, new = normalised(jnp.tanh(x.reshape(x.shape[0], -1) @ w[name]), stats[name], train)
        return hidden, {**stats, name: new}

    return run


LINE = pj.line(
    {
        "stage1": stage("a"),
        "stage2": stage("b"),
        "features": lambda w, x, stats, **_: (x, stats),
        "outputs": lambda w, x, stats, **_: (jnp.concatenate([x @ w["w"].T + w["b0"][None], x @ w["c0"]], axis=1), stats),
        "logits": lambda w, x, stats, **_: (x[:, :CLASSES], stats),
    },
    stateful=True,
    head=lambda w: (w["w"], w["b0"]),
    scale=30.0,  # for the methods that need a cosine head; nothing here depends on its being one
)


def problem(seed=0):
    """Parameters, BatchNorm statistics and a batch in which class 4 is absent, though the training set has it."""
    a, b, c, d, e = jax.random.split(jax.random.key(seed), 5)
    params = {
        "a": 0.5 * jax.random.normal(a, [SIDE * SIDE, 8]),
        "b": 0.5 * jax.random.normal(b, [8, 6]),
        "w": jax.random.normal(c, [CLASSES, 6]),
        "b0": jnp.zeros([CLASSES]),
        "c0": jnp.full([6, 1], 0.1, jnp.float32),  # of the output for abstention
    }
    stats = {"a": jnp.zeros([8]), "b": jnp.zeros([6])}
    labels = jax.random.randint(e, [BATCH], 0, CLASSES - 1)
    side = {"domain": jnp.arange(BATCH, dtype=jnp.int32) % DOMAINS}
    return params, stats, pj.batch(jax.random.uniform(d, [BATCH, SIDE, SIDE]), labels, index=100 + jnp.arange(BATCH), side=side)


COUNTS = np.array([50, 30, 20, 10, 5])


def parts(made):
    """A method as (chain, optimiser)."""
    if hasattr(made, "update"):
        return (), optax.chain(made, optax.sgd(0.1))
    return pj.chain(made), optax.chain(optax.identity(), optax.sgd(0.1))


def start(made, params, stats, batch):
    links, tx = parts(made)
    objective = pj.objective(
        LINE, links, num_classes=CLASSES, class_counts=COUNTS, num_examples=EXAMPLES, num_domains=DOMAINS, replays=8
    )
    # Buffers of their own: an init may hand out one array twice.
    states = jax.tree.map(jnp.array, objective.init(params, batch.inputs, stats=stats))
    return params, stats, states, tx.init(params)


def one_step(made, state, batch, key, *, axis_name=None, epoch=1):
    """One optimiser step with everything a trainer passes: (state, loss)."""
    params, stats, states, opt_state = state
    links, tx = parts(made)
    objective = pj.objective(
        LINE, links, num_classes=CLASSES, class_counts=COUNTS, num_examples=EXAMPLES, num_domains=DOMAINS, replays=8, axis_name=axis_name
    )  # fmt: skip

    def loss(params, weights=None):
        place = dict(key=key, step=EPOCH * epoch, progress=0.31 * jnp.float32(epoch + 1), epoch=epoch, stats=stats)
        return objective(params, states, batch, weights=weights, **place)

    average = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.pmean(tree, axis_name))
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    grad_fn = lambda p, *, weights=None: average(jax.grad(loss, has_aux=True)(p, weights)[0])
    given = dict(
        grad_fn=grad_fn,
        loss_fn=lambda p: loss(p)[1].losses,
        key=key,
        labels=batch.labels,
        num_classes=CLASSES,
        axis_name=axis_name,
    )
    updates, opt_state = tx.update(average(grads), opt_state, params, **given)
    return (optax.apply_updates(params, updates), average(out.stats), out.states, opt_state), average(value)


def run(make, *, settings=None, seed=0, steps=2):
    """`steps` jitted steps (the second in a later epoch, when epoch statistics are in use): states, losses."""
    params, stats, batch = problem(seed)
    made = make(**(settings or {})) if make is not pj.ce else ()
    state, losses = start(made, params, stats, batch), []
    step = jax.jit(lambda state, key, epoch: one_step(made, state, batch, key, epoch=epoch))
    for number in range(steps):
        state, loss = step(state, jax.random.key(number), jnp.int32(number))
        losses.append(loss)
    return state, losses


def stepper(made, **options):
    """One step of an epoch, with that epoch's own random draws: (state, batch, key, epoch) -> (state, loss)."""
    return lambda state, batch, key, epoch: one_step(made, state, batch, jax.random.fold_in(key, epoch), epoch=epoch, **options)


def steps_of(make):
    """Three: one that gathers an epoch's statistics, two in later epochs, which use them. ADA keeps none, and the long steps that it
    climbs by blow rounding up from step to step."""
    return 1 if make is pj.ada else 3


def walk(step, number, state, batch, key):
    """The last (state, loss) of so many steps, each in an epoch of its own."""
    for epoch in range(number):
        state, loss = step(state, batch, key, jnp.int32(epoch))
    return state, loss


@functools.cache
def plain_parameters(number, batch_norm=True):
    """Of the first problem, after so many steps of plain training; batch_norm: says only what `normalised` is at the moment."""
    params, stats, batch = problem()
    return walk(jax.jit(stepper(())), number, start((), params, stats, batch), batch, jax.random.key(3))[0][0]


def assert_it_acted(make, params, **given):
    """A method that can be switched off, switched on as it is here, has moved the parameters away from those of plain training."""
    if make.off is not None:
        plain = plain_parameters(steps_of(make), **given)
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, plain)
        assert max(jax.tree.leaves(apart)) > 1e-6, "nothing is compared: the method did nothing"


def assert_trees_close(a, b, **tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def test_the_first_wave_is_exported():
    names = {f.__name__ for f in METHODS}
    assert names >= {"mixup", "adversarial_training", "lpa", "dropout", "logit_adjustment", "lpl", "label_smoothing"}
    assert names >= {"bootstrapping", "focal", "class_weighting", "lpg", "gradient_clipping", "gradient_noise", "sam", "pugd"}
    assert names >= {"manifold_mixup", "isda"}
    assert set(taxonomy.registry()) >= {"ce", "la", "at", "ls", "bootstrap", "weighting", "clip", "noise"}


def documented(name, text):
    """Whether a docstring says what a setting is: as `name`, or in front of a colon, "name:" or "name, other:"."""
    return re.search(rf"`{name}\b[^`]*`|\b{name}\b(?=(?:, \w+)*:)", text) is not None


def test_a_setting_is_documented_by_its_name_and_not_by_its_letters():
    text = "On p. 3 of the paper, with `rate` = 0.1.\n\n    Args:\n      bound, step_size: of q; see eq. 2."
    assert all(documented(name, text) for name in ("rate", "bound", "step_size"))
    assert not any(documented(name, text) for name in ("p", "q", "on", "rat", "step", "size", "paper"))


@every_method
def test_conventions(make):
    for p in inspect.signature(make).parameters.values():
        assert p.default is not p.empty and p.kind is p.KEYWORD_ONLY, f"{make.__name__}({p.name})"
        assert p.annotation is not p.empty, f"{make.__name__}({p.name}) is not annotated"
        assert documented(p.name, make.__doc__), f"{make.__name__} doesn't say what {p.name} is"
    module = sys.modules[make.__module__].__doc__
    assert "Source:" in module and make.__doc__ and make.cite


@every_method
def test_a_step_is_finite_and_keeps_the_state_as_it_is(make):
    params, stats, batch = problem()
    before = start(make(), params, stats, batch)
    after, losses = run(make)
    assert np.isfinite(losses).all()
    for leaf in jax.tree.leaves(after):
        assert np.isfinite(np.asarray(leaf)).all()
    signature = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)
    assert signature(before) == signature(after)


@every_method
def test_all_numbers_of_a_structure_share_one_compilation(make):
    chain, tables = spec.parse_chain(make.alias or make.__name__), (taxonomy.registry(PLUGINS), taxonomy.helpers())
    structure, numbers = spec.split_numbers(chain, *tables)
    params, stats, batch = problem()
    state, traces = start(make(), params, stats, batch), []

    @jax.jit
    def step(state, numbers, key):
        traces.append(1)
        [made] = spec.build(structure, numbers, *tables)
        return one_step(made, state, batch, key)

    for number in range(3):
        scaled = tuple(jnp.float32(x * (1 - 0.1 * number)) for x in numbers)
        state, loss = step(state, scaled, jax.random.key(number))
        assert np.isfinite(loss)
    assert len(traces) == 1


@each(SWITCHABLE)
def test_switched_off_is_plain_training_bit_for_bit(make):
    (params, stats, _, _), losses = run(make, settings=make.off)
    (plain_params, plain_stats, _, _), plain_losses = run(pj.ce)
    if jax.__version_info__ >= (0, 10):
        jax.tree.map(np.testing.assert_array_equal, (losses, params, stats), (plain_losses, plain_params, plain_stats))
    else:  # older compilers fuse sums differently around a link that does nothing: equal to rounding there
        assert_trees_close((losses, params, stats), (plain_losses, plain_params, plain_stats), rtol=1e-5, atol=1e-6)


@each(SWITCHABLE)
def test_switched_on_is_not_plain_training(make):
    (params, _, _, _), _ = run(make, settings=ON.get(make.__name__), steps=3)
    (plain, _, _, _), _ = run(pj.ce, steps=3)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, plain))) > 1e-6


@every_method
def test_vmapped_seeds_are_single_seeds(make):
    seeds, made = range(3), make(**ON.get(make.__name__, {}))
    step = stepper(made)
    states = [start(made, *problem(s)) for s in seeds]
    batches, keys = [problem(s)[2] for s in seeds], jnp.stack([jax.random.key(s + 3) for s in seeds])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    together = walk(jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None))), steps_of(make), stack(states), stack(batches), keys)
    single = jax.jit(step)
    for s in seeds:
        alone = walk(single, steps_of(make), states[s], batches[s], keys[s])
        assert_trees_close(jax.tree.map(lambda x, s=s: x[s], together), alone, rtol=1e-4, atol=1e-5)
    assert_it_acted(make, jax.tree.map(lambda x: x[0], together[0][0]))


@every_method
def test_eight_devices_are_one_device(make):
    params, stats, batch = problem()
    made = make(**ON.get(make.__name__, {}))
    step = jax.jit(stepper(made))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
    key, replicated = jax.random.key(3), NamedSharding(mesh, PartitionSpec())
    state = start(made, params, stats, batch)
    out = walk(step, steps_of(make), jax.device_put(state, replicated), sharded, jax.device_put(key, replicated))
    assert_trees_close(out, walk(step, steps_of(make), state, batch, key), rtol=1e-4, atol=1e-5)
    assert_it_acted(make, out[0][0])


@every_method
def test_per_device_code_takes_class_statistics_over_all_devices(make, monkeypatch):
    if make.__name__ in MIX_WITHIN_THE_BATCH:
        assert "within each device's batch" in make.__doc__
        return
    # BatchNorm without synchronisation sees its own device's samples; that is not what is tested here.
    monkeypatch.setitem(globals(), "normalised", lambda x, running, train: (x, running))
    params, stats, batch = problem()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    P = PartitionSpec
    made = make(**ON.get(make.__name__, {}))
    mapped = jax.shard_map(
        stepper(made, axis_name="d"),
        mesh=mesh, in_specs=(P(), P("d"), P(), P()), out_specs=P(), check_vma=False,
    )  # fmt: skip
    state, given = start(made, params, stats, batch), (batch, jax.random.key(3))
    one = walk(jax.jit(stepper(made)), steps_of(make), state, *given)
    assert_trees_close(walk(jax.jit(mapped), steps_of(make), state, *given), one, rtol=1e-4, atol=1e-5)
    assert_it_acted(make, one[0][0], batch_norm=False)


DELTAS = {
    "adversarial_training": ("input", lambda: pj.adversarial_training(bound=0.1, step_size=0.05, random_starts=True)),
    "mixed_uat": ("input", lambda: pj.mixed_uat(bound=0.1, universal_bound=0.1, universal_step_size=0.05, step_size=0.05)),
    "lpa": ("stage2", lambda: pj.lpa(bound=0.5, direction=jnp.array([1.0, -1.0, 1.0, -1.0, 1.0]))),
}


@pytest.mark.parametrize("per_device", [False, True], ids=["jit", "shard_map"])
@pytest.mark.parametrize("name", DELTAS)
def test_the_perturbations_are_the_same_on_one_two_and_eight_devices(name, per_device, monkeypatch):
    """δ itself [B, ...], of the second step: mixed UAT has one for all samples by then."""
    monkeypatch.setitem(globals(), "normalised", lambda x, running, train: (x, running))
    (site, make), (params, stats, batch) = DELTAS[name], problem()
    see = lambda key: pj.Perturbation(site, lambda c: (), lambda flow, rest, s, c: (flow, s, {key: flow.value}))
    P = PartitionSpec

    def deltas(devices):
        shape = dict(num_classes=CLASSES, class_counts=COUNTS, num_examples=EXAMPLES)
        made = pj.objective(
            LINE, (see("before"), make(), see("after")), axis_name="d" if per_device and devices else None, **shape
        )

        def run(states, batch):
            out = made(params, states, batch, stats=stats, key=jax.random.key(3))[1]
            return out.states, out.metrics["after"] - out.metrics["before"]

        states, given, run = made.init(params, batch.inputs, stats=stats), batch, run
        if devices:
            mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
            given = jax.device_put(batch, NamedSharding(mesh, P("d")))
            states = jax.device_put(states, NamedSharding(mesh, P()))
            if per_device:
                run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P(), P("d")), check_vma=False)
        run = jax.jit(run)
        return np.asarray(run(run(states, given)[0], given)[1])

    one = deltas(None)
    assert np.abs(one).reshape(BATCH, -1).max(1).min() > 1e-2
    for devices in (2, 8):
        np.testing.assert_allclose(deltas(devices), one, rtol=1e-4, atol=1e-6)


def seen():
    """A link behind all others at the logits that keeps what it is told are the clean ones."""
    keep = lambda flow, rest, state, context: (flow, clean_logits(flow, flow.value), {})
    return pj.Perturbation("logits", lambda context: jnp.zeros([BATCH, CLASSES]), keep)


# Trained on attacked inputs, a net has no clean pass: what classes are measured by is how it stands the attack.
ATTACKED = (pj.adversarial_training, pj.cuat, pj.mixed_uat, pj.regpert)
BEFORE_THE_TAIL = [
    f for f in METHODS if f not in ATTACKED and any(link.site not in TAIL for link in parts(f() if f is not pj.ce else ())[0])
]


@each(BEFORE_THE_TAIL)
def test_what_later_links_take_for_clean_logits_knows_nothing_of_the_labels(make):
    """Statistics of the classes come from there: a method that puts the label into the logits, or searches with it, leaves others behind."""
    params, stats, batch = problem()
    links = pj.chain(make(), seen())
    objective = pj.objective(
        LINE, links, num_classes=CLASSES, class_counts=COUNTS, num_examples=EXAMPLES, num_domains=DOMAINS, replays=8
    )

    @jax.jit
    def step(states, labels, epoch):
        place = dict(
            key=jax.random.key(0), step=EPOCH * epoch, progress=0.31 * jnp.float32(epoch + 1), epoch=epoch, stats=stats
        )
        return objective(params, states, batch._replace(labels=labels), **place)[1]

    others = (batch.labels + 1) % CLASSES
    before = step(objective.init(params, batch.inputs, stats=stats), batch.labels, 0).states
    found, changed = (step(before, labels, 1) for labels in (batch.labels, others))
    assert np.abs(found.losses - changed.losses).max() > 1e-3
    np.testing.assert_allclose(found.states[-1], changed.states[-1], rtol=1e-5, atol=1e-6)


@every_method
def test_every_method_is_in_the_table_once_for_each_of_its_targets_and_granularities(make):
    at, name = make.coordinates, f"{make.alias or make.__name__}{taxonomy.sign(make.coordinates.direction)}"
    found = [
        (row["target"], row["granularity"]) for row in taxonomy.table(taxonomy.methods(PLUGINS)) if name in row[at.inference]
    ]
    assert sorted(found) == sorted((t, g) for t in at.target for g in at.granularity)


def test_the_short_names_of_the_command_line_say_what_they_are_called_in_python():
    short = {name: factory for name, factory in taxonomy.registry().items() if name not in vars(pj)}
    assert {"la", "at", "ls", "erm"} <= set(short)
    for name, factory in short.items():
        with pytest.raises(AttributeError, match=rf"^perturbjax has no '{name}'\. Write pj\.{factory.__name__}\.$"):
            getattr(pj, name)
        assert getattr(pj, factory.__name__) is factory
    with pytest.raises(AttributeError, match="module 'perturbjax' has no attribute 'lppl'"):
        pj.lppl  # noqa: B018
