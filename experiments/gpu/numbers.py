"""Steps on the device against steps on the CPU, from the same state: the parts numbers and others."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import shared
from experiments.gpu.check import Check, with_conv
from experiments.gpu.sizes import TOLERANCE, Sizes
from experiments.shared.many import PLAIN
from perturbjax import taxonomy
from perturbjax.data import Dataset
from perturbjax.models.blocks import CONVOLUTIONS
from perturbjax.training import device_data, init_state, sample_data
from perturbjax.training.devices import from_host, to_host
from perturbjax.training.feed import stacked
from perturbjax.training.step import as_arrays, compiled_step


def numbers(check: Check) -> None:
    """Part (a): steps on the device and on the CPU, of methods that cover every target."""
    dataset, sizes, plain = patches(check.sizes), check.sizes, shared.parse_methods(PLAIN)[PLAIN]
    for methods, both in ((sizes.first_methods, True), (sizes.more_methods, False)):
        for name, what in shared.parse_methods(methods).items():
            check.measure(("numbers", "methods"), name, partial(compare_steps, check, dataset, what, both))
    check.measure(("numbers", "methods"), f"{PLAIN}, 2 seeds vmapped", partial(compare_vmapped, check, dataset, plain))
    check.measure(("numbers",), "convolutions", partial(compare_convolutions, check, dataset, plain))


def others(check: Check) -> None:
    """The same for all other methods."""
    dataset, sizes = patches(check.sizes), check.sizes
    asked = {"zla": "zla(share=0.5)"}  # the patches are balanced: their counts don't tell the unseen classes
    known = ", ".join(asked.get(name, getattr(factory, "alias", None) or name) for name, factory in taxonomy.methods().items())
    done = shared.parse_methods(f"{sizes.first_methods}, {sizes.more_methods}")
    for name, what in shared.parse_methods(sizes.other_methods or known).items():
        if name not in done:
            check.measure(("others", "methods"), name, partial(compare_steps, check, dataset, what, False))


def patches(sizes: Sizes) -> Dataset:
    """One batch of coloured, noisy patches. An epoch is one step: then statistics over epochs are in use at the second step."""
    rng, count, edge = np.random.default_rng(0), sizes.number_batch, sizes.number_image // 4
    images = rng.integers(0, 192, (count, 4, 4, 3)).repeat(edge, 1).repeat(edge, 2)
    images = (images + rng.integers(0, 64, images.shape)).astype(np.uint8)
    labels = (np.arange(count) % 10).astype(np.int32)
    return Dataset("patches", images, labels, images[:16], labels[:16], tuple(map(str, range(10))))


class Step(NamedTuple):
    """A training step, on the host."""

    before: Any  # TrainState
    after: Any
    loss: float


class Stepper:
    """Single steps of one method on any device, from and to states on the host."""

    def __init__(self, check: Check, dataset: Dataset, method: tuple, model: str, head: str = "linear"):
        sizes, self.check, self.dataset = check.sizes, check, dataset
        settings = shared.Settings(
            model=model, width=sizes.width, head=head, batch_size=sizes.number_batch, epochs=max(8, method[0].replays)
        )
        self.recipe, self.settings = shared.make_recipe(settings, dataset, method[0]), shared.make_numbers(settings, method[1])
        self.numbers, self.index = as_arrays(self.settings), np.arange(sizes.number_batch, dtype=np.int32)[None]
        self.like = self._init(0)

    def _init(self, seed: int) -> Any:
        with jax.default_device(self.check.cpu):
            return init_state(self.recipe, self.settings, sample_data(self.dataset), seed)

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        return to_host(self._init(seed))

    def __call__(self, host: Any, device: Any, precision: str | None = "highest") -> Step:
        """One step on this device; precision: of products and convolutions, None for the device's default."""
        with jax.default_device(device), jax.default_matmul_precision(precision):
            given = (from_host(host, self.like), self.numbers, device_data(self.dataset), self.index)
            # Put there by hand: arguments that are bound to a device decide where the step is compiled and runs.
            state, metrics, _ = compiled_step(self.recipe)(*jax.device_put(given, device))
            return Step(host, to_host(state), float(metrics["loss"][0]))

    def side_by_side(self, hosts: list, device: Any) -> list[Step]:
        """The same for several states at once, vmapped."""
        count = len(hosts)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            state = stacked([from_host(host, self.like) for host in hosts])._replace(step=jnp.asarray(hosts[0].step))
            given = (state, stacked([self.numbers] * count), device_data(self.dataset), np.stack([self.index] * count))
            state, metrics, _ = compiled_step(self.recipe, vmapped="shared")(*jax.device_put(given, device))
            after = to_host(state)
        own = lambda s: jax.tree.map(lambda x: x[s], after._replace(step=None))._replace(step=after.step)
        return [Step(hosts[s], own(s), float(metrics["loss"][s, 0])) for s in range(count)]


def compare_steps(check: Check, dataset: Dataset, method: tuple, both: bool) -> dict:
    """The method's trials, judged; with the cosine head if it needs that, skipped if it has no default for something else."""
    reasons = []
    for head in ("linear", "cosine"):
        try:
            step = Stepper(check, dataset, method, check.sizes.number_model, head)
            return {"head": head, **judged(steps_of_seeds(check, step, both))}
        except ValueError as error:  # what the library says to settings that can't be
            reasons.append(f"{head} head: {str(error)[:300]}")
    return {"skipped": reasons}


def steps_of_seeds(check: Check, step: "Stepper", both: bool) -> dict[str, list]:
    """Two steps for each seed, each from the CPU's state: on the device, and on the CPU from parameters changed by some roundings."""
    trials: dict[str, list] = {"highest": [], "nudged": []} | ({"default": []} if both else {})
    for seed in range(check.sizes.trials):
        host, rows = step.start(seed), {name: [] for name in trials}
        for _ in range(2):
            wanted = step(host, check.cpu)
            found = {"highest": step(host, check.device), "nudged": step(nudged(host, seed), check.cpu)}
            found |= {"default": step(host, check.device, None)} if both else {}
            for name, row in rows.items():
                row.append(differences(found[name], wanted))
            host = wanted.after
        for name, row in rows.items():
            trials[name].append(row)
    return trials


def compare_vmapped(check: Check, dataset: Dataset, method: tuple) -> dict:
    """One step of two seeds side by side on the device, against the CPU's steps one by one."""
    step, trials = Stepper(check, dataset, method, check.sizes.number_model), {"highest": [], "nudged": []}
    for seed in range(check.sizes.trials):
        hosts = [step.start(2 * seed), step.start(2 * seed + 1)]
        wanted, found = [step(host, check.cpu) for host in hosts], step.side_by_side(hosts, check.device)
        rows = [differences(f, w) for f, w in zip(found, wanted, strict=True)]
        trials["highest"].append([{key: max(row[key] for row in rows) for key in rows[0]}])
        trials["nudged"].append([differences(step(nudged(hosts[0], seed), check.cpu), wanted[0])])
    return judged(trials)


def compare_convolutions(check: Check, dataset: Dataset, method: tuple) -> dict:
    """Canonical against lax convolutions on the device; what doesn't repeat itself can't be bit-equal to something else."""
    steps, found = {conv: Stepper(check, dataset, method, check.sizes.conv_model) for conv in CONVOLUTIONS}, {}
    for conv, step in steps.items():
        step.recipe = with_conv(step.recipe, conv)
    host = steps["canonical"].start(0)
    for name, precision in (("highest", "highest"), ("default", None)):
        canonical, again = (steps["canonical"](host, check.device, precision) for _ in range(2))
        lax = steps["lax"](host, check.device, precision)
        update = plain_number(differences(lax, canonical)["update"])
        found[name] = {"bit_equal": same(lax, canonical), "repeats": same(canonical, again), "update": update}
    return found


def nudged(host: Any, seed: int) -> Any:
    """The state with its parameters changed by about ten roundings: how much does any change grow in a step?"""
    rng = np.random.default_rng(seed)
    return host._replace(
        params=jax.tree.map(lambda x: (x * (1 + 1e-6 * rng.standard_normal(x.shape))).astype(x.dtype), host.params)
    )


def same(a: Any, b: Any) -> bool:
    """Whether all leaves are equal, bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def differences(found: Step, wanted: Step) -> dict[str, float]:
    """Relative differences: of the loss, of the step's update as a whole, and the largest over parameters and over states."""
    flat = lambda tree: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
    update = lambda step: flat(step.after.params) - flat(step.before.params)
    states = lambda step: (step.after.stats, step.after.opt_state, step.after.states)
    largest = lambda a, b: float(np.max([apart(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))
    return {
        "loss": apart(found.loss, wanted.loss),
        "update": apart(update(found), update(wanted)),
        "params": largest(found.after.params, wanted.after.params),
        "states": largest(states(found), states(wanted)),
    }


def apart(a: Any, b: Any) -> float:
    """‖a − b‖/‖b‖ in float64. Where b is all but zero (root mean square below 1e-6), so small an a is as good as b."""
    a, b = (np.ravel(np.asarray(x)).astype(np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6 * b.size**0.5)) if b.size else 0.0


def judged(trials: dict[str, list[list[dict[str, float]]]]) -> dict:
    """Typical differences (the smallest over the seeds, the largest over a run's steps), and whether they are as small as they should be.

    A ReLU or a sign of a gradient that turns for a rounding changes the update by a thousandth or more, in a step here and there;
    an error of the program is there in every step. So the smallest counts, and it has to be below the tolerance, or below ten
    times what ten roundings do on the CPU alone; no number may be nan or infinite.
    """
    typical = {
        name: {key: float(np.max(np.min([[row[key] for row in rows] for rows in found], axis=0))) for key in TOLERANCE}
        for name, found in trials.items()
    }
    everything = [row[key] for rows in trials["highest"] for row in rows for key in row]
    limits = {key: max(limit, 10 * typical["nudged"][key]) for key, limit in TOLERANCE.items()}
    passed = np.isfinite(everything).all() and all(typical["highest"][key] <= limit for key, limit in limits.items())
    plain = {name: {key: plain_number(x) for key, x in row.items()} for name, row in typical.items()}
    worst = np.max([row["update"] for rows in trials["highest"] for row in rows])
    return {**plain, "worst_update": plain_number(worst), "passed": bool(passed)}


def plain_number(x: Any) -> float | str:
    """A number for JSON, which has no nan and no infinity: those become text."""
    return float(x) if np.isfinite(x) else str(x)
