"""perturbjax.core: who acts when, what `rest` contains and costs, what is kept, what the final loss is, and how to add a method."""

import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy

B, D, C = 7, 4, 3  # an odd batch
rng = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in dict(a=[D, 5], b=[5, 6], c=[6, C]).items()}
INPUTS = rng.uniform(size=[B, D]).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0], np.int32)
WEIGHTS = np.array([1, 0.5, 2, 0, 1, 1, 3], np.float32)
quick = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run


def tanh_layer(name):
    return lambda w, x: jnp.tanh(x @ w[name])


PIECES = {"stage1": tanh_layer("a"), "stage2": tanh_layer("b"), "logits": lambda w, x: x @ w["c"]}
MODEL = pj.line(PIECES)


def batch(**fields):
    return pj.batch(INPUTS, LABELS, **fields)


def run(links=(), *, data=None, params=PARAMS, model=MODEL, states=None, settings=None, **options):
    """(loss, Output) of one pass."""
    made = pj.objective(model, links, **{"num_classes": C} | (settings or {}))
    data = batch() if data is None else data
    states = made.init(params, data.inputs, stats=options.get("stats")) if states is None else states
    return made(params, states, data, **dict(step=0, progress=0.0, epoch=0) | options)


def gradient(links=(), params=PARAMS, **options):
    return quick(jax.grad(lambda w: run(links, params=w, **options)[0]))(params)


def link(site, change, **fields):
    """A link without state that changes the flow: change(flow) -> Flow."""
    return pj.Perturbation(site, lambda context: (), lambda flow, rest, state, context: (change(flow), state, {}), **fields)


def shift(site, amount, **fields):
    return link(site, lambda flow: flow._replace(value=flow.value + amount), **fields)


def scale(site, factor, **fields):
    return link(site, lambda flow: flow._replace(value=flow.value * factor), **fields)


def searching(site, found, *, times=1, change=lambda value: value):
    """A link that runs the rest `times` times from changed values, and leaves the first losses in the list `found`."""

    def apply(flow, rest, state, context):
        for number in range(times):
            found.append(rest(change(flow.value) + number))
        return flow, state, {}

    return pj.Perturbation(site, lambda context: (), apply, search=True)


# An independent pass, in numpy.


def numpy_logits(x=INPUTS, at="input"):
    w = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    layers = [lambda x: np.tanh(x @ w["a"]), lambda x: np.tanh(x @ w["b"]), lambda x: x @ w["c"]]
    for layer in layers[("input", "stage1", "stage2", "logits").index(at) :]:
        x = layer(x)
    return x


def numpy_softmax(u):
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_losses(u, labels=LABELS):
    return -np.log(numpy_softmax(u))[np.arange(len(labels)), labels]


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6} | tolerance), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Order.


def test_links_act_in_the_order_of_the_line_and_those_at_one_site_in_the_order_given():
    order = []
    note = lambda name, site, **fields: link(site, lambda flow: order.append(name) or flow, **fields)
    sites = ("loss", "logit_gradient", "stage2", "label", "logits", "prediction", "stage1", "input")
    links = [note(f"{site} {k}", site, search=k == 1) for k in (0, 1) for site in sites]
    run(pj.chain(*(x for x in links if x.site != "logit_gradient"), note("late", "loss")))
    walk = ("input", "stage1", "stage2", "logits", "prediction", "label", "loss")
    assert order == [f"{site} {k}" for site in walk for k in (0, 1)] + ["late"]
    del order[:]
    run(pj.chain(*links))
    assert [x for x in order if x.startswith("logit_gradient")] == ["logit_gradient 0", "logit_gradient 1"]
    assert order[-2:] == ["logit_gradient 0", "logit_gradient 1"]


def test_the_value_passes_through_the_links_one_after_the_other():
    doubled_then_shifted = (INPUTS * 2 + 1) @ np.asarray(PARAMS["a"])
    shifted_then_doubled = ((INPUTS + 1) * 2) @ np.asarray(PARAMS["a"])
    for links, hidden in [
        ((shift("logits", 0.5), scale("input", 2.0), shift("input", 1.0)), doubled_then_shifted),
        ((shift("input", 1.0), shift("logits", 0.5), scale("input", 2.0)), shifted_then_doubled),
    ]:
        _, out = run(pj.chain(*links))
        close(out.logits, numpy_logits(np.tanh(hidden), at="stage1") + 0.5)


def test_a_chain_flattens_methods_of_several_links_and_chains():
    a, b, c = (shift("input", float(i)) for i in range(3))
    assert pj.chain(a, (b, c)) == pj.chain(pj.chain(a, b), c) == (a, b, c)
    assert pj.chain() == pj.ce() == ()


def test_the_trace_holds_values_after_their_links():
    seen = {}
    note = link("loss", lambda flow: seen.update(flow.trace) or flow)
    smoothed = np.full([B, C], 0.1) + 0.7 * np.eye(C)[LABELS]
    label = link("label", lambda flow: flow._replace(value=0.1 + 0.7 * flow.value))
    _, out = run(pj.chain(shift("input", 1.0), scale("stage1", 0.5), shift("logits", np.float32([[1, 0, 0]])), label, note))
    hidden = 0.5 * np.tanh((INPUTS + 1) @ np.asarray(PARAMS["a"]))
    logits = numpy_logits(hidden, at="stage1") + [[1, 0, 0]]
    log_p = np.log(numpy_softmax(logits))
    close(seen, {
        "input": INPUTS + 1, "stage1": hidden, "stage2": np.tanh(hidden @ np.asarray(PARAMS["b"])), "logits": logits,
        "prediction": log_p, "label": smoothed,
    })  # fmt: skip
    close((out.logits, out.losses), (logits, -(smoothed * log_p).sum(1)))


def test_a_link_at_the_prediction_changes_what_the_losses_are_made_of():
    half = link("prediction", lambda flow: flow._replace(value=0.5 * flow.value))
    close(run(half)[1].losses, 0.5 * numpy_losses(numpy_logits()))


# Rest: later links that compute are in it, later links that search are not.


def test_rest_holds_later_links_that_compute_and_none_that_search():
    found, none = [], []
    wrong = pj.Perturbation(
        "stage2", lambda c: (), lambda flow, rest, s, c: (flow._replace(value=flow.value + 9), s, {}), search=True
    )
    links = (
        shift("stage1", 0.3), searching("stage1", found), scale("stage1", 0.5), wrong, scale("logits", 2.0),
        searching("logits", none), scale("loss", 10.0),
    )  # fmt: skip
    _, out = run(pj.chain(*links))
    hidden = np.tanh(INPUTS @ np.asarray(PARAMS["a"])) + 0.3
    inner = 2 * numpy_logits(0.5 * hidden, at="stage1")  # the shift before it isn't applied again, the scaling after it is
    close(found[0], 10 * numpy_losses(inner))
    outer = 2 * (np.tanh(0.5 * hidden @ np.asarray(PARAMS["b"])) + 9) @ np.asarray(PARAMS["c"])
    close((out.logits, out.losses, none[0]), (outer, 10 * numpy_losses(outer), 10 * numpy_losses(outer)))


def test_a_link_that_only_looks_at_the_rest_is_not_in_it_itself():
    found = []
    look = pj.Perturbation("stage2", lambda c: (), lambda flow, rest, s, c: (found.append(rest(flow.value)) or flow, s, {}))
    _, out = run(pj.chain(look, scale("stage2", 0.5), searching("input", [])))
    equal(found[-1], out.losses)


def test_rest_flow_has_the_end_of_the_pass():
    ends = []

    def apply(flow, rest, state, context):
        ends.append(rest.flow(flow.value + 1))
        return flow, state, {}

    links = pj.chain(
        pj.Perturbation("stage2", lambda c: (), apply, search=True), scale("logits", 2.0), pj.label_smoothing(weight=0.3)
    )
    run(links, data=batch(weights=WEIGHTS))
    [(losses, end)] = ends
    logits = 2 * numpy_logits(np.tanh(np.tanh(INPUTS @ np.asarray(PARAMS["a"])) @ np.asarray(PARAMS["b"])) + 1, at="stage2")
    close(end.trace["logits"], logits)
    equal((end.value, end.weights), (losses, WEIGHTS))  # losses before the weights
    close(end.targets, 0.7 * np.eye(C)[LABELS] + 0.1)


def test_rest_flow_of_other_samples_has_their_labels():
    """And what is given as left behind by links before, of which there is nothing here."""
    ends = []
    lifted = lambda flow: flow._replace(value=flow.value + jax.nn.one_hot(flow.labels, C) * len(flow.extra))

    def apply(flow, rest, state, context):
        others = (flow.labels + 1) % C
        ends.extend([rest.flow(flow.value)[1], rest.flow(flow.value, labels=others, extra={"one": 1, "two": 2})[1]])
        return flow, state, {}

    run(pj.chain(pj.Perturbation("input", lambda c: (), apply, search=True), link("logits", lifted)))
    close(ends[1].trace["logits"], ends[0].trace["logits"] + 2 * np.eye(C)[(np.array(LABELS) + 1) % C])


def counting(names):
    """The model, noting which of its stretches run."""
    note = lambda name: lambda w, x: names.append(name) or PIECES[name](w, x)
    return pj.line({name: note(name) for name in PIECES})


def test_costs_add_up():
    """Each search reruns what stands behind its own site, and nobody else's search: 1 + 2, 1 + 2 + 3 and 1 + 2 + 3 + 4 runs."""
    ran = []
    links = [searching("input", [], times=2), searching("stage1", [], times=3), searching("stage2", [], times=4)]
    made = pj.objective(counting(ran), pj.chain(*links), num_classes=C)
    states = made.init(PARAMS, INPUTS)
    del ran[:]
    made(PARAMS, states, batch())
    assert [ran.count(name) for name in PIECES] == [3, 6, 10]


def test_methods_that_search_cost_what_they_say():
    ran = []
    links = pj.chain(pj.adversarial_training(num_steps=2), pj.lpa(site="stage1", num_steps=3), pj.lpl(), pj.focal(), pj.lpg())
    made = pj.objective(counting(ran), links, num_classes=C)
    states = made.init(PARAMS, INPUTS)
    del ran[:]
    jax.make_jaxpr(lambda w: made(w, states, batch(), epoch=0))(PARAMS)
    assert [ran.count(name) for name in PIECES] == [1 + 2, 1 + 2 + 3, 1 + 2 + 3]


def test_no_link_no_extra_pass():
    ran = []
    made = pj.objective(
        counting(ran), pj.chain(pj.mixup(), pj.logit_adjustment(), pj.lpg()), num_classes=C, class_counts=np.ones(C)
    )
    states = made.init(PARAMS, INPUTS)
    del ran[:]
    jax.make_jaxpr(lambda w: made(w, states, batch(), epoch=0))(PARAMS)
    assert ran == list(PIECES)


# What is kept.


def counter(site, **fields):
    """A link whose state and metric count how often it was applied for keeps."""
    apply = lambda flow, rest, state, context: (flow, state + 1, {"count": state + 1})
    return pj.Perturbation(site, lambda context: jnp.int32(0), apply, name="counter", **fields)


def test_states_and_metrics_come_from_the_outer_pass_alone():
    links = pj.chain(searching("input", [], times=3), counter("stage1"), counter("loss"), searching("logits", []), pj.lpg())
    _, out = run(links)
    assert [int(s) for s in out.states[1:3]] == [1, 1]
    assert out.metrics.pop("lpg/raised") == 0
    counts = {name: int(value) for name, value in out.metrics.items() if name.startswith("counter")}
    assert counts == {"counter/count@stage1": 1, "counter/count@loss": 1}
    _, again = run(links, states=out.states)
    assert [int(s) for s in again.states[1:3]] == [2, 2]


def test_links_that_share_a_state_see_it_as_the_one_before_left_it():
    """One place in the states, the first one's; another method of the same kind has its own; a link that shares none keeps its own."""

    def method(start):
        init = lambda context: jnp.int32(start)
        add = lambda flow, rest, state, context: (flow, state + 1, {context.site: state})
        return tuple(pj.Perturbation(site, init, add, name=f"m{start}", shared=True) for site in ("stage2", "input", "loss"))

    links = pj.chain(method(10), counter("stage1"), method(20))
    _, out = run(links)
    seen = {name: int(value) for name, value in out.metrics.items() if name.startswith("m")}
    assert seen == {f"m{n}/{site}": n + i for n in (10, 20) for i, site in enumerate(("input", "stage2", "loss"))}
    assert jax.tree.map(int, out.states) == (13, (), (), 1, 23, (), ())
    _, again = run(links, states=out.states)
    assert jax.tree.map(int, again.states) == (16, (), (), 2, 26, (), ())


def test_metrics_carry_the_method_s_name_and_inner_evaluations_add_up():
    links = pj.chain(
        pj.adversarial_training(num_steps=2), pj.adversarial_training(num_steps=3, site="stage1"), pj.lpg(direction=1.0)
    )
    metrics = quick(lambda: run(links)[1].metrics)()
    assert int(metrics["adversarial_training/inner_evaluations"]) == 5
    assert int(metrics["lpg/raised"]) == C
    nameless = pj.Perturbation("loss", lambda c: (), lambda flow, rest, s, c: (flow, s, {"found": jnp.ones([])}))
    assert set(run(nameless)[1].metrics) == {"found"}


def reports(site, value, **fields):
    """A link that reports a value, and as many evaluations."""
    apply = lambda flow, rest, state, context: (flow, state, {"found": jnp.int32(value), "inner_evaluations": jnp.int32(value)})
    return pj.Perturbation(site, lambda context: (), apply, name="m", **fields)


def test_metrics_of_two_methods_of_one_name_keep_apart_by_their_sites():
    """None is lost, alone a method keeps its plain names, and evaluations add up under the plain name in any case."""
    metrics = lambda *links: {name: int(value) for name, value in run(pj.chain(*links))[1].metrics.items()}
    assert metrics(reports("stage1", 1)) == {"m/found": 1, "m/inner_evaluations": 1}
    assert metrics(reports("stage2", 2), reports("stage1", 1), reports("stage2", 3), reports("stage2", 4)) == {
        "m/found@stage1": 1, "m/found@stage2": 2, "m/found@stage2#2": 3, "m/found@stage2#3": 4,
        "m/inner_evaluations": 10, "m/inner_evaluations@stage1": 1, "m/inner_evaluations@stage2": 2,
        "m/inner_evaluations@stage2#2": 3, "m/inner_evaluations@stage2#3": 4,
    }  # fmt: skip


def test_links_that_share_a_state_report_as_one_method():
    """The last one for all of them; beside another such method, by all sites of each."""

    def method(values):
        init = lambda context: ()
        return tuple(reports(site, value, shared=True)._replace(init=init) for site, value in zip(("stage1", "stage2"), values))

    found = lambda *links: {k: int(v) for k, v in run(pj.chain(*links))[1].metrics.items() if "found" in k}
    assert found(method((1, 2))) == {"m/found": 2}
    assert found(method((1, 2)), reports("stage1", 5)) == {"m/found@stage1+stage2": 2, "m/found@stage1": 5}
    assert found(method((1, 2)), method((3, 4))) == {"m/found@stage1+stage2": 2, "m/found@stage1+stage2#2": 4}


def stateful(noise=0.0):
    """The model with a running mean per stage, and noise of its own drawn from the pass's key."""

    def piece(name):
        def call(w, x, stats, *, train, key):
            value = PIECES[name](w, x)
            drawn = noise * jax.random.normal(jax.random.fold_in(key, len(name)), value.shape) if noise and train else 0.0
            return value + drawn, {**stats, name: {"runs": stats[name]["runs"] + 1, "mean": value.mean(0)}}

        return call

    return pj.line({name: piece(name) for name in PIECES}, stateful=True)


STATS = {name: {"runs": jnp.int32(0), "mean": jnp.zeros([n])} for name, n in dict(stage1=5, stage2=6, logits=C).items()}


def test_batch_norm_statistics_come_from_the_outer_pass_once():
    links = pj.chain(
        searching("input", [], times=2), shift("input", 0.5), searching("stage1", []), scale("logits", 2.0), pj.lpg()
    )
    _, out = run(links, model=stateful(), stats=STATS)
    assert {name: int(s["runs"]) for name, s in out.stats.items()} == dict(stage1=1, stage2=1, logits=1)
    close(out.stats["stage1"]["mean"], np.tanh((INPUTS + 0.5) @ np.asarray(PARAMS["a"])).mean(0))
    close(out.stats["logits"]["mean"], numpy_logits(INPUTS + 0.5).mean(0))


# Randomness.


def test_one_key_one_draw_in_rest_and_in_the_outer_pass():
    """Of links and of the model; another key to rest.flow gives another draw."""
    found = []

    def apply(flow, rest, state, context):
        found.extend([rest(flow.value), rest(flow.value), rest.flow(flow.value, key=jax.random.key(9))[0]])
        return flow, state, {}

    search = pj.Perturbation("input", lambda c: (), apply, search=True)
    for links, noise in ((pj.chain(search, pj.dropout(site="stage1")), 0.0), (search, 1.0)):
        del found[:]
        options = dict(model=stateful(noise), stats=STATS)
        _, out = run(links, key=jax.random.key(1), **options)
        equal(found[:2], [out.losses, out.losses])
        assert np.abs(found[2] - found[0]).max() > 1e-3
        equal(run(links, key=jax.random.key(1), **options)[1].losses, out.losses)
        assert np.abs(run(links, key=jax.random.key(2), **options)[1].losses - out.losses).max() > 1e-3


def test_each_link_has_its_own_key_by_its_position():
    keys = []
    note = lambda site: pj.Perturbation(site, lambda c: (), lambda flow, rest, s, c: (keys.append(c.key) or flow, s, {}))
    key = jax.random.key(4)
    run(pj.chain(note("logits"), note("input"), note("logit_gradient")), key=key)
    expected = [jax.random.fold_in(key, position) for position in (1, 0, 2)]
    equal([jax.random.key_data(k) for k in keys[:2]], [jax.random.key_data(k) for k in expected[:2]])
    equal(jax.random.key_data(keys[-1]), jax.random.key_data(expected[-1]))


def per_device(run, devices, *arguments):
    """run(*arguments), the last one [D·B, ...] spread over the devices, the others everywhere; its results stand one after the other."""
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (*(P() for _ in arguments[1:]), P("d"))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=False))(*arguments)


def test_the_model_s_own_draws_are_independent_on_every_device():
    """Equal samples everywhere: the losses of no two devices agree. The first device's are those of one device alone."""
    model, same = stateful(noise=1.0), np.tile(INPUTS[:2], (4, 1))
    labels = jnp.zeros([8], jnp.int32)

    def losses(links=(), axis_name="d"):
        made = pj.objective(model, links, num_classes=C, axis_name=axis_name)
        states = ((),) * len(links)
        one = lambda key, x: made(PARAMS, states, pj.batch(x, labels[: len(x)]), key=key, stats=STATS)[1].losses
        if axis_name is None:
            return np.asarray(one(jax.random.key(5), same[:2]))
        return np.asarray(per_device(one, 4, jax.random.key(5), same)).reshape(4, 2)

    found = losses()
    assert min(np.abs(found[i] - found[j]).max() for i in range(4) for j in range(i)) > 1e-2
    np.testing.assert_allclose(found[0], losses(axis_name=None), rtol=1e-6)

    def apply(flow, rest, state, context):
        return flow._replace(extra={"before": rest(flow.value)}), state, {}

    search = pj.Perturbation(
        "input", lambda c: (), apply, search=True
    )  # the rest draws what the outer pass does, on each device
    change = link("loss", lambda flow: flow._replace(value=flow.value - flow.extra.get("before", 0.0)))
    np.testing.assert_allclose(losses(pj.chain(search, change)), 0, atol=1e-6)


def test_four_equal_samples_on_two_devices_have_four_masks_of_the_model_s_dropout():
    from perturbjax.models import create

    x, labels = np.tile(np.linspace(0, 1, 27, dtype=np.float32).reshape(1, 3, 3, 3), (4, 1, 1, 1)), jnp.zeros([2], jnp.int32)
    net = create("mlp", num_classes=C, mean=(0.5,) * 3, std=(0.2,) * 3, width=16, dropout=0.5)
    params = net.init(jax.random.key(0), x)["params"]
    made = pj.objective(net, num_classes=C, axis_name="d")
    losses = per_device(
        lambda params, key, x: made(params, (), pj.batch(x, labels), key=key)[1].losses, 2, params, jax.random.key(1), x
    )
    assert np.diff(np.sort(losses)).min() > 1e-4


def test_no_key_is_key_zero():
    links = pj.dropout(site="stage1")
    equal(run(links)[0], run(links, key=jax.random.key(0))[0])


def test_noise_per_sample_follows_its_index():
    keys = jax.random.key_data(pj.per_sample_keys(jax.random.key(0), jnp.array([5, 7, 5])))
    equal(keys[0], keys[2])
    assert (keys[0] != keys[1]).any()
    equal(keys[1], jax.random.key_data(jax.random.fold_in(jax.random.key(0), 7)))


# The final loss.


def test_the_loss_is_the_mean_of_weight_times_loss_plus_penalty():
    penalty = np.arange(B, dtype=np.float32)
    add = link("stage2", lambda flow: flow._replace(penalty=flow.penalty + penalty))
    extra = np.array([1, 1, 0.5, 1, 1, 2, 1], np.float32)
    loss, out = run(pj.chain(add, pj.focal(gamma=2.0)), data=batch(weights=WEIGHTS), weights=extra)
    p = numpy_softmax(numpy_logits())[np.arange(B), LABELS]
    expected = WEIGHTS * extra * (1 - p) ** 2 * -np.log(p) + penalty  # the penalty is not weighted
    close((loss, out.losses), (expected.mean(), expected))


def test_targets_may_be_given():
    targets = numpy_softmax(rng.normal(size=[B, C])).astype(np.float32)
    close(run(data=batch(targets=targets))[1].losses, -(targets * np.log(numpy_softmax(numpy_logits()))).sum(1))


def test_plain_cross_entropy_and_its_gradient():
    close(run()[0], numpy_losses(numpy_logits()).mean())
    assert run()[1].metrics == {} and run()[1].states == ()
    expected = np.tanh(np.tanh(INPUTS @ np.asarray(PARAMS["a"])) @ np.asarray(PARAMS["b"]))
    close(gradient()["c"], expected.T @ (numpy_softmax(numpy_logits()) - np.eye(C)[LABELS]) / B)


# The logit gradient.


def note_logit_gradient(found, delta=0.0):
    return link("logit_gradient", lambda flow: found.append(flow.value) or flow._replace(value=flow.value + delta))


def numpy_slopes(losses_of, u, eps=1e-6):
    """∂ losses_i/∂ u_i [B, C] by central differences."""
    return np.stack([(losses_of(u + eps * e) - losses_of(u - eps * e)) / (2 * eps) for e in np.eye(C)], axis=1)


def smoothed(u, weight=0.3):
    return -(((1 - weight) * np.eye(C)[LABELS] + weight / C) * np.log(numpy_softmax(u))).sum(1)


def focal(u):
    p = numpy_softmax(u)[np.arange(B), LABELS]
    return -((1 - p) ** 2) * np.log(p)


TAILS = {
    "cross entropy": ((), numpy_losses),
    "label smoothing": (pj.label_smoothing(weight=0.3), smoothed),
    "focal": (pj.focal(gamma=2.0), focal),
}


@pytest.mark.parametrize("tail", TAILS)
def test_the_logit_gradient_is_taken_per_example_after_the_loss_links(tail):
    links, losses = TAILS[tail]
    found = []
    run(pj.chain(note_logit_gradient(found), links, scale("logits", 2.0)), data=batch(weights=WEIGHTS))
    close(found[0], numpy_slopes(losses, 2 * numpy_logits()), atol=1e-5)


def test_a_search_in_the_tail_takes_part_in_the_logit_gradient():
    found = []
    search = pj.Perturbation(
        "loss", lambda c: (), lambda flow, rest, s, c: (flow._replace(value=3 * rest(flow.value)), s, {}), search=True
    )
    run(pj.chain(search, note_logit_gradient(found)))
    close(found[0], 3 * numpy_slopes(numpy_losses, numpy_logits()), atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_perturbed_logit_gradient_keeps_the_loss_and_reaches_the_network_with_the_sample_s_share(tail):
    """h + δ, scaled by w_i/B, beside gradients that don't pass through the logits (a penalty)."""
    delta = rng.normal(size=[B, C]).astype(np.float32)
    penalty = link("stage2", lambda flow: flow._replace(penalty=flow.penalty + 0.1 * jnp.sum(flow.value**2, axis=1)))
    before, after = pj.chain(penalty, TAILS[tail][0]), pj.chain(penalty, TAILS[tail][0], note_logit_gradient([], delta))
    options = dict(data=batch(weights=WEIGHTS))
    both = [quick(jax.value_and_grad(lambda w: run(links, params=w, **options)[0]))(PARAMS) for links in (before, after)]
    (value, plain), (perturbed_value, perturbed) = both
    equal(perturbed_value, value)
    equal(run(after, **options)[0], run(before, **options)[0])
    logits_of = lambda w: MODEL.slice(w, INPUTS, "input", "logits", stats=None, train=True, key=None)[0]
    [added] = jax.vjp(logits_of, PARAMS)[1](jnp.asarray(WEIGHTS)[:, None] * delta / B)
    close(perturbed, jax.tree.map(jnp.add, plain, added))
    assert float(jnp.abs(added["a"]).max()) > 1e-2


def test_several_links_at_the_logit_gradient_act_one_after_the_other():
    twice = link("logit_gradient", lambda flow: flow._replace(value=2 * flow.value))
    close(gradient(pj.chain(twice, twice)), jax.tree.map(lambda g: 4 * g, gradient()))


def test_no_gradient_flows_through_what_a_link_makes_of_the_logit_gradient():
    """δ = u/10 is a constant: what is added is Jᵀu/10, and not the derivative of ⟨u, u⟩/10."""
    along = link("logit_gradient", lambda flow: flow._replace(value=flow.value + 0.1 * flow.trace["logits"]))
    features = np.tanh(np.tanh(INPUTS @ np.asarray(PARAMS["a"])) @ np.asarray(PARAMS["b"]))
    close(gradient(along)["c"], gradient()["c"] + features.T @ (0.1 * numpy_logits()) / B)


# Errors.


def test_an_optax_link_in_a_chain_is_an_error_that_says_where_it_belongs():
    for wrong in (optax.sgd(0.1), optax.chain(optax.sgd(0.1)), pj.sam(), pj.gradient_clipping()):
        with pytest.raises(ValueError, match=r"chain needs perturbations of the loss.*optax.chain\(link, optax.sgd"):
            pj.chain(pj.mixup(), wrong)
    with pytest.raises(ValueError, match="got function"):
        pj.chain(lambda: 0)


def test_an_unknown_site_lists_those_there_are():
    with pytest.raises(ValueError, match="got 'stage3'. Did you mean 'stage[12]'. There are: input, logits, stage1, stage2"):
        pj.objective(MODEL, shift("stage3", 1.0), num_classes=C)


@pytest.mark.parametrize(
    "links, expected",
    [
        (pj.logit_adjustment(), "logit_adjustment needs 'class_counts', got none. Pass class_counts="),
        (pj.isda(), "isda needs 'features', got none. The model's sites are input, stage1, stage2, logits"),
        (shift("loss", 1.0, needs=("head",)), "link needs 'head', got none. Give pj.line(..., head="),
        (shift("loss", 1.0, needs=("stem",)), "link needs 'stem', got none. The model's sites are"),
    ],
)
def test_what_a_link_needs_is_checked_before_anything_runs(links, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        pj.objective(MODEL, links, num_classes=C)


def test_needs_that_are_met_pass():
    made = pj.line(PIECES, head=lambda w: (w["c"].T, jnp.zeros(C)))
    needs = ("head", "class_counts", "stage2", "prediction")
    pj.objective(made, shift("loss", 1.0, needs=needs), num_classes=C, class_counts=np.ones(C))


def test_wrong_numbers_of_classes():
    with pytest.raises(ValueError, match=re.escape("needs logits [B, num_classes] = (7, 4), got (7, 3) from the model")):
        run(settings=dict(num_classes=4))
    with pytest.raises(ValueError, match="num_classes >= 2, got 1"):
        pj.objective(MODEL, num_classes=1)
    with pytest.raises(ValueError, match=re.escape("class_counts of shape (3,), got (4,)")):
        pj.objective(MODEL, num_classes=C, class_counts=np.ones(4))


def test_a_site_without_one_row_per_sample_is_an_error_that_names_it():
    """Words or patches as rows (2B), one row for all: only where a link acts or reads, as a model may fold rows elsewhere."""
    for fold, shape in ((lambda x: x.reshape(-1, 2), (2 * 6, 2)), (lambda x: x.reshape(1, -1), (1, 24))):
        pieces = {
            "stage1": lambda w, x, fold=fold: fold(x @ w["a"]),
            "features": lambda w, x: jnp.tanh(x.reshape(6, 4)),
            "logits": lambda w, x: x @ w["b"],
        }
        params = {"a": jnp.ones([D, 4]), "b": jnp.ones([4, C])}
        init = lambda links: pj.objective(pieces, links, num_classes=C).init(params, INPUTS[:6])
        for links in (pj.lpa(site="stage1", direction=1.0), shift("loss", 0.0, needs=("stage1",), name="lpa")):
            with pytest.raises(
                ValueError,
                match=re.escape(f"lpa needs one row per sample at the site 'stage1', [B, ...] with B = 6, got {shape}"),
            ):
                init(links)
        init(pj.chain(pj.lpa(site="features"), pj.lpl(), pj.adversarial_training(value_range=None)))


def test_the_objective_says_which_labels_are_none_unless_they_have_no_weight():
    wrong = np.array(LABELS)
    wrong[2] = C
    for label, weights in ((C, None), (C, np.ones(B, np.float32))):
        with pytest.raises(ValueError, match=re.escape(f"objective needs labels in 0..{C - 1}, got {label} at position 2")):
            run(data=pj.batch(INPUTS, wrong, weights=weights))
    run(data=pj.batch(INPUTS, wrong, weights=(wrong < C).astype(np.float32)))  # padding
    jax.jit(lambda y: run(data=pj.batch(INPUTS, y))[0])(wrong)  # can't be seen


@pytest.mark.parametrize(
    "fields, weights, message",
    [
        (dict(labels=LABELS[:, None]), None, f"labels [B] = ({B},), got ({B}, 1). Write labels[:, 0]."),
        (dict(labels=np.eye(C)[LABELS]), None, f"labels [B] = ({B},), got ({B}, {C}). Write labels.argmax(1), and the rows"),
        (dict(labels=LABELS[:-1]), None, f"labels [B] = ({B},), got ({B - 1},). Give one entry for each sample."),
        (dict(weights=np.ones([B, 1])), None, f"weights [B] = ({B},), got ({B}, 1). Write weights[:, 0]."),
        (dict(), np.ones([B, 1]), f"weights= [B] = ({B},), got ({B}, 1)"),
        (dict(targets=np.ones([B])), None, f"targets [B, C] = ({B}, {C}), got ({B},)"),
        (dict(index=np.arange(B + 1)), None, f"index [B] = ({B},), got ({B + 1},)"),
    ],
)
def test_a_batch_is_of_b_samples(fields, weights, message):
    """[B, 1] beside [B] would broadcast to the losses of all pairs."""
    given = dict(labels=LABELS) | fields
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=re.escape(f"objective needs {message}")):
        run(data=pj.batch(INPUTS, given.pop("labels"), **given), weights=weights)


def test_labels_are_checked_where_they_can_be_seen():
    with pytest.raises(ValueError, match=re.escape("batch needs labels in 0..2, got 3 at position 1")):
        pj.batch(INPUTS[:2], [0, 3], num_classes=C)
    with pytest.raises(ValueError, match=r"batch needs indices in 0\.\.9, got 10 at position 1"):
        pj.batch(INPUTS[:2], [0, 1], index=np.array([9, 10]), num_examples=10)


# A link that changes the number of samples.


def two_views(site):
    """Every sample twice, the copy shifted, in all per-sample fields."""
    double = lambda x: jnp.concatenate([x, x])

    def change(flow):
        side = jax.tree.map(double, flow.side)
        fields = dict(labels=flow.labels, targets=flow.targets, weights=flow.weights, index=flow.index, penalty=flow.penalty)
        value = jnp.concatenate([flow.value, flow.value + 0.1])
        return flow._replace(value=value, side=side, **{k: double(v) for k, v in fields.items()})

    return link(site, change)


@pytest.mark.parametrize("site", ["input", "stage1", "logits"])
def test_a_link_may_change_the_number_of_samples(site):
    tail = pj.chain(pj.adversarial_training(site="stage2", num_steps=2, random_starts=False), pj.lpl(), pj.focal(), pj.lpg())
    side = {"domain": jnp.arange(B)}
    seen = []
    note = link("loss", lambda flow: seen.append(flow.side["domain"]) or flow)
    if site == "logits":
        tail = tail[1:]
    loss, out = quick(lambda: run(pj.chain(two_views(site), tail, note), data=batch(weights=WEIGHTS, side=side)))()
    assert out.losses.shape == (2 * B,) and out.logits.shape == (2 * B, C) and seen[0].shape == (2 * B,)
    np.testing.assert_allclose(loss, out.losses.mean(), rtol=1e-6)  # B of the final flow
    if site == "input":
        both = pj.batch(
            np.concatenate([INPUTS, INPUTS + 0.1]),
            np.tile(LABELS, 2),
            weights=np.tile(WEIGHTS, 2),
            side={"domain": jnp.arange(2 * B)},
        )
        expected, other = quick(lambda: run(pj.chain(tail, note), data=both))()
        close((loss, out.losses), (expected, other.losses))


# Padding.


@pytest.mark.parametrize(
    "links, label",
    [(pj.ce(), -1), (pj.lpl(), C), (pj.lpa(direction=1.0), -1), (pj.lpg(direction=1.0), C)],
    ids=["ce", "lpl", "lpa", "lpg"],
)
def test_padding_with_zero_weight_changes_nothing(links, label):
    pad = lambda x, value: np.concatenate([x, np.full((2, *x.shape[1:]), value, x.dtype)])
    padded = pj.batch(pad(INPUTS, 0.5), pad(LABELS, label), weights=pad(np.ones(B, np.float32), 0))
    step = lambda data: jax.value_and_grad(lambda w: run(links, params=w, data=data), has_aux=True)(PARAMS)
    (loss, out), grads = step(batch())
    (padded_loss, padded_out), padded_grads = step(padded)
    share = B / (B + 2)
    close((padded_loss, padded_grads), (loss * share, jax.tree.map(lambda g: g * share, grads)))
    assert links == () or float(jnp.abs(grads["c"] - gradient()["c"]).max()) > 1e-4, "the method did nothing"
    close((padded_out.states, padded_out.losses[:B]), (out.states, out.losses))
    equal(padded_out.losses[B:], np.zeros(2))


# Several methods in one chain.


@pytest.mark.parametrize(
    "links",
    [
        pj.chain(pj.mixup(), pj.adversarial_training(num_steps=2)),
        pj.chain(pj.adversarial_training(num_steps=2), pj.mixup()),
        pj.chain(pj.manifold_mixup(), pj.adversarial_training(num_steps=2, site="stage1"), pj.lpl(), pj.lpg()),
        pj.chain(pj.logit_adjustment(), pj.lpl(), pj.label_smoothing(), pj.focal(), pj.class_weighting()),
    ],
)
def test_methods_combine(links):
    options = dict(settings=dict(class_counts=np.array([3, 2, 2])), key=jax.random.key(0))
    (loss, out), grads = jax.value_and_grad(lambda w: run(links, params=w, **options), has_aux=True)(PARAMS)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out.losses, grads)))
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-4
    assert abs(float(loss - run()[0])) > 1e-4


def test_lpl_after_logit_adjustment_searches_on_the_adjusted_logits():
    """u + log π + δ, with δ one raw step from u + log π."""
    counts = np.array([30, 20, 10])
    _, out = run(
        pj.chain(pj.logit_adjustment(), pj.lpl(bound=0.1, step_size=0.1, direction=1.0)), settings=dict(class_counts=counts)
    )
    adjusted = numpy_logits() + np.log(counts / 60)
    residual = numpy_softmax(adjusted) - np.eye(C)[LABELS]
    delta = np.stack([0.1 * residual[LABELS == c].mean(0) for c in range(C)])
    close(out.logits, adjusted + delta[LABELS])


def test_adversarial_training_after_mixup_searches_on_the_mixed_pair():
    loss, out = run(
        pj.chain(pj.mixup(), pj.adversarial_training(num_steps=3, bound=0.1, step_size=0.05)), key=jax.random.key(3)
    )
    weight, partner = pj.draw_mixing(jax.random.fold_in(jax.random.key(3), 0), B, alpha=1.0)
    mixed = pj.batch(pj.mix(INPUTS, weight, partner), LABELS, targets=pj.mix(jnp.eye(C)[LABELS], weight, partner))
    plain = run(data=mixed)[1].losses
    assert (out.losses > plain).all()


# Numbers.


def test_float64_in_is_float64_out(monkeypatch):
    """To 1e-12 from numpy: mixup (of a known pair), label smoothing and focal, with weights and a link at the logit gradient."""
    weight, partner = 0.7, np.roll(np.arange(B), 1)
    monkeypatch.setattr(sys.modules["perturbjax.feature.mixup"], "draw_mixing", lambda key, size, *, alpha: (weight, partner))
    with jax.enable_x64(True):
        params = {k: jnp.asarray(np.asarray(v), jnp.float64) + 1e-3 for k, v in PARAMS.items()}
        x, weights = np.random.default_rng(1).uniform(size=[B, D]), np.random.default_rng(2).uniform(size=B)
        links = pj.chain(pj.mixup(), pj.label_smoothing(weight=0.1), pj.focal(gamma=2.0), pj.lpg(bound=0.25, direction=1.0))
        loss, out = quick(lambda w: run(links, data=pj.batch(x, LABELS, weights=weights), params=w))(params)
    w = {k: np.asarray(v) for k, v in params.items()}
    mixed, y = (weight * v + (1 - weight) * v[partner] for v in (x, np.eye(C)[LABELS]))
    p = numpy_softmax(np.tanh(np.tanh(mixed @ w["a"]) @ w["b"]) @ w["c"])
    losses = -((0.9 * y + 0.1 / C) * np.log(p)).sum(1) * (1 - p[np.arange(B), LABELS]) ** 2
    assert out.losses.dtype == out.logits.dtype == loss.dtype == jnp.float64
    np.testing.assert_allclose(out.losses, weights * losses, rtol=1e-12)


def test_bfloat16_logits_become_float32_and_integer_inputs_pass():
    narrow = pj.line(lambda w, x: x.astype(jnp.bfloat16) @ jnp.ones([D, C], jnp.bfloat16))
    data = pj.batch(np.arange(B * D, dtype=np.uint8).reshape(B, D), LABELS)
    loss, out = run(pj.chain(pj.label_smoothing(), pj.lpl()), data=data, model=narrow, params={})
    assert out.logits.dtype == out.losses.dtype == loss.dtype == jnp.float32


# Context.


def test_links_know_where_training_stands():
    seen = {}

    def init(context):
        seen["init"] = context
        return ()

    def apply(flow, rest, state, context):
        seen["apply"] = context
        return flow, state, {}

    made = pj.line(PIECES, head=lambda w: (w["c"].T, jnp.zeros(C)))
    settings = dict(class_counts=np.arange(1, 4), num_examples=99, num_domains=2)
    run(
        pj.Perturbation("last_stage", init, apply),
        model=made,
        settings=settings,
        step=5,
        progress=0.25,
        epoch=2,
        validation="clean",
    )
    for context in seen.values():
        assert (context.num_classes, context.num_examples, context.num_domains, context.batch_size) == (C, 99, 2, B)
        assert context.site == "stage2" and context.level("stage2") == 2 and context.level("logits") == 3
        equal(context.class_counts, np.arange(1, 4))
    assert seen["init"].site_shapes == {"input": (B, D), "stage1": (B, 5), "stage2": (B, 6), "logits": (B, C)}
    now = seen["apply"]
    assert (now.step, now.progress, now.epoch, now.validation) == (5, 0.25, 2, "clean")
    assert now.variables is PARAMS
    equal(now.head()[0], PARAMS["c"].T)


def test_a_place_in_training_that_was_not_told_is_an_error_for_those_who_follow_it():
    for method, name in [
        (pj.lpg(), "epoch"),
        (pj.online_label_smoothing(), "epoch"),
        (pj.proselflc(), "progress"),
        (pj.gce(truncate=0.5), "progress"),
        (pj.lpl(bound=pj.linear(first=1.0, last=0.0), direction=1.0), "progress"),
        (pj.lpl(bound=lambda step: 0.1 * step, direction=1.0, max_steps=3), "step"),
        (pj.class_weighting(weights=(1.0, 2.0, 3.0), start=0.5), "progress"),
    ]:
        told = dict(step=1, progress=0.5, epoch=1)
        run(method, **told)
        with pytest.raises(ValueError, match=f"^{method.name} needs {name!r}, got none. Pass {name}="):
            run(method, **told | {name: None})


def test_methods_that_follow_nothing_need_no_place():
    for method in (
        pj.lpl(),
        pj.gce(),
        pj.class_weighting(weights=(1.0, 2.0, 3.0)),
        pj.lpg(direction=1.0),
        pj.lpa(direction=1.0),
    ):
        told = run(method, step=9, progress=0.9, epoch=9)
        jax.tree.map(np.testing.assert_array_equal, run(method, step=None, progress=None, epoch=None), told)


def test_side_information_index_and_extra_travel_along():
    seen = []
    leave = link("input", lambda flow: flow._replace(extra={**flow.extra, "note": flow.index * 2}))
    take = link("loss", lambda flow: seen.append((flow.extra, flow.side, flow.index)) or flow)
    run(pj.chain(leave, take), data=batch(index=jnp.arange(B) + 10, side={"group": jnp.ones(B)}))
    equal(seen[0][0]["note"], 2 * (np.arange(B) + 10))
    equal(seen[0][1]["group"], np.ones(B))
    run(take)
    equal(seen[1][2], np.arange(B))


def test_evaluation_mode_reaches_the_model():
    modes = []
    note = lambda name: lambda w, x, stats, *, train, key: modes.append(train) or (PIECES[name](w, x), stats)
    made = pj.objective(pj.line({name: note(name) for name in PIECES}, stateful=True), num_classes=C)
    del modes[:]
    made(PARAMS, (), batch(), train=False)
    made(PARAMS, (), batch())
    assert modes == [False] * 3 + [True] * 3


# A method of one's own.

OWN = '''
"""Shakes the logits. Source: nobody, 2024."""
import jax.numpy as jnp
from jax.typing import ArrayLike

import perturbjax as pj


@pj.method(target="logit", direction=(+1,), inference="prior", granularity="corpus", cite="Nobody 2024", off=dict(size=0.0), alias="sh")
def shaken(*, size: ArrayLike = 0.5) -> pj.Perturbation:
    """Adds `size` to the first logit."""
    def apply(flow, rest, state, context):
        return flow._replace(value=flow.value.at[:, 0].add(size)), state, {"size": jnp.asarray(size, jnp.float32)}

    return pj.Perturbation("logits", lambda context: (), apply)
'''


@pytest.fixture
def shaken(tmp_path):
    (tmp_path / "shaken.py").write_text(OWN)
    where = importlib.util.spec_from_file_location("shaken_of_a_test", tmp_path / "shaken.py")
    module = importlib.util.module_from_spec(where)
    sys.modules[where.name] = module
    where.loader.exec_module(module)
    yield module.shaken
    del sys.modules[where.name]


def test_a_method_in_one_file_of_one_s_own_works_in_a_chain(shaken):
    _, out = run(pj.chain(shaken(size=0.25), pj.focal()))
    close(out.logits, numpy_logits() + [0.25, 0, 0])
    assert float(out.metrics["shaken/size"]) == 0.25
    assert shaken.coordinates == (("logit",), (1,), "prior", ("corpus",))
    assert (shaken.cite, shaken.off, shaken.alias, shaken.__name__) == ("Nobody 2024", {"size": 0.0}, "sh", "shaken")
    equal(run(shaken(**shaken.off))[0], run()[0])


def test_a_method_of_one_s_own_works_in_a_spec_and_in_the_table(shaken):
    registry = taxonomy.registry() | {"shaken": shaken}
    chain = spec.parse_chain("ls(0.1) + shaken(0.25)")
    structure, numbers = spec.split_numbers(chain, registry, taxonomy.helpers())
    assert list(numbers) == [0.1, 0.25]
    loss = quick(lambda numbers: run(pj.chain(*spec.build(structure, numbers, registry, taxonomy.helpers())))[1].losses)
    for size in (0.25, 0.75):
        expected = run(pj.chain(pj.label_smoothing(weight=0.1), shaken(size=size)))[1].losses
        close(loss(jnp.array([0.1, size])), expected)
    rows = taxonomy.table(taxonomy.methods() | {"shaken": shaken})
    assert [row["prior"] for row in rows if (row["target"], row["granularity"]) == ("logit", "corpus")][0][-1] == "sh+"


def test_a_method_of_several_links_names_them_all():
    make = pj.method(target=("logit", "loss"), direction=(), inference="prior", granularity="sample", cite="x", off=None)

    @make
    def pair(*, nested: bool = False):
        links = shift("logits", 1.0), counter("loss")
        return (links[0], (links[1],)) if nested else links

    assert [x.name for x in pj.chain(pair())] == [x.name for x in pj.chain(pair(nested=True))] == ["pair", "pair"]
    assert set(run(pair())[1].metrics) == {"pair/count"}


def test_coordinates_out_of_the_taxonomy_are_an_error():
    good = dict(target="logit", direction=(), inference="prior", granularity="sample", cite="x", off=None)
    for wrong in (dict(target="logits"), dict(inference="guess"), dict(granularity=("sample", "world"))):
        with pytest.raises(ValueError, match="method needs coordinates out of"):
            pj.method(**good | wrong)
