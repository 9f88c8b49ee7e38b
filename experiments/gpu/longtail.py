"""CIFAR-10-LT by LDAM's recipe, method by method: the part longtail."""

import dataclasses
import time
from functools import partial

from experiments import compare, shared
from experiments.gpu.check import Check, chosen, with_conv
from experiments.shared import many
from perturbjax.data import Dataset
from perturbjax.training import History


def long_tail(check: Check) -> None:
    """Part (d): the comparison on the long tail, method by method."""
    settings, data = datasets(check)
    methods = shared.parse_methods(settings.methods)
    shared.check_runs(settings, data[0], methods)
    claim(check, settings, data)
    conv, together = way_to_train(check)
    check.say(f"longtail: {data[0]}; {conv} convolutions, seeds {'side by side' if together else 'one after the other'}")
    for typed, what in methods.items():
        check.measure(("longtail", "methods"), typed, partial(trained, check, settings, data, {typed: what}, conv, together))


def check_settings(check: Check) -> None:
    """Raises ValueError or FileNotFoundError for data, a view or methods that can't be."""
    shared.parse_methods(datasets(check)[0].methods)


def datasets(check: Check) -> tuple[compare.CompareSettings, list[Dataset]]:
    """Settings and training sets of the long tail. Data that is long-tailed already is taken as it is: then all seeds share it."""
    flags, sizes = check.flags, check.sizes
    name = flags.data or sizes.long_data
    view = flags.view
    if view is None:
        counts = shared.source(name).class_counts
        view = "none" if counts.max() >= 5 * counts.min() else "longtail(10)" if flags.tiny else "longtail(100)"
    settings = compare.CompareSettings(
        data=name, view=view, model=sizes.long_model, methods=flags.methods, seeds=flags.seeds, cost_rounds=0, devices=1,
        **shared.flags_of_recipe("ldam", flags.epochs),
    )  # fmt: skip
    if view == "none":
        return settings, [shared.load_view(settings, 0)] * flags.seeds
    return settings, [shared.load_view(settings, seed) for seed in range(flags.seeds)]


def claim(check: Check, settings: compare.CompareSettings, data: list[Dataset]) -> None:
    """Writes down what is trained on, or compares it: accuracies of different settings don't belong in one table."""
    first, entry = data[0], check.entry("longtail")
    wanted = {
        "model": settings.model, "recipe": settings.recipe, "epochs": settings.epochs, "batch_size": settings.batch_size,
        "seeds": settings.seeds, "view": settings.view, "train_size": len(first.train_labels), "test_size": len(first.test_labels),
        "class_counts": [int(n) for n in first.class_counts], "subset_hash": [d.subset_hash for d in data],
    }  # fmt: skip
    if (found := entry.setdefault("settings", wanted)) != wanted:
        key = next(key for key in wanted if found.get(key) != wanted[key])
        raise ValueError(
            f"gpu_check needs the long tail's settings that --out was begun with, got {key} {wanted[key]} instead of {found.get(key)}. "
            "Give the same flags and data, or name another --out."
        )


def way_to_train(check: Check) -> tuple[str, bool]:
    """(the kind of convolutions, whether seeds train side by side): what the part vmap found fastest; a rehearsal rehearses that."""
    found = {conv: row for conv, row in check.report.get("vmap", {}).items() if "ratio" in row}
    if not found or check.flags.tiny:
        return "canonical" if check.flags.conv == "auto" else check.flags.conv, True
    best = {conv: min(row["seconds_a_run_of_many"], row["seconds_one"]) for conv, row in found.items()}
    conv = chosen(check, best["lax"] / best["canonical"]) if len(found) == 2 else next(iter(found))
    return conv, found[conv]["seconds_a_run_of_many"] <= found[conv]["seconds_one"]


def trained(
    check: Check, settings: compare.CompareSettings, data: list[Dataset], method: dict, conv: str, together: bool
) -> dict:
    """One method with all its seeds: results.json's numbers, and the time."""
    planned = [
        dataclasses.replace(one, recipe=with_conv(one.recipe, conv)) for one in many.plan(settings, data, method, check.out)
    ]
    # Runs that an earlier call finished are read; the others train, and go on from their checkpoints.
    histories = {one.folder: History.load(end) for one in planned if (end := one.folder / "finished.npz").exists()}
    left = [one for one in planned if one.folder not in histories]
    clock, every = [], max(1, settings.epochs // 10)

    def tick(epoch, found):
        clock.append(time.perf_counter())
        if (epoch + 1) % every == 0:
            check.say(
                f"{planned[0].typed}: epoch {epoch + 1}, loss {found['loss']:.3f}, accuracy {100 * found['accuracy']:.2f}"
            )

    for group in [left] if together and left else [[one] for one in left]:
        clock.clear()
        histories |= many.train_group(settings, group, check.out, tick)
    # Between the ends of two epochs lie training and evaluation, but no compilation.
    epoch = (clock[-1] - clock[0]) / (len(clock) - 1) if len(clock) > 1 else None
    at_once = len(left) if together else 1
    found = shared.record([histories[one.folder] for one in planned], data)
    found["timing"] = {
        "seconds_a_run": None if epoch is None else epoch * settings.epochs / at_once,
        "training_seconds_a_run": found["seconds"] / len(planned), "conv": conv, "side_by_side": at_once,
    }  # fmt: skip
    return found
