"""The GPU check, rehearsed on the CPU: without what a bare GPU machine lacks, cut off and gone on, and its verdicts."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import gpu_check, shared
from experiments.gpu import longtail, numbers, page
from experiments.gpu.check import Check
from experiments.gpu.sizes import LONG_TAIL, TINY, TOLERANCE, Sizes
from perturbjax import spec, taxonomy
from perturbjax.method import TARGETS

pytestmark = pytest.mark.optax_promotes  # schedules

ROOT = pathlib.Path(__file__).parents[2]
MISSING = ["tyro", "tensorflow_datasets", "array_record", "importlib_resources", "imagecodecs", "matplotlib", "tensorboardX"]
PART_KEYS = {"numbers": {"methods", "convolutions"}, "bench": {"mlp", "data"}, "vmap": {"canonical", "lax"}}


def rehearse(out, *more):
    """The script in a process of its own, in which importing any of MISSING fails."""
    block = f"import sys, runpy; sys.modules.update(dict.fromkeys({MISSING})); sys.argv = {['gpu_check.py', '--tiny', '--out', str(out), *more]}"
    code = f"{block}; runpy.run_path('experiments/gpu_check.py', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def check_at(out, device=None, **flags):
    """A Check as main makes it, for parts of it to be called here."""
    given = dict(out=str(out), copy=None, data=None, view=None, conv="auto", seeds=2, epochs=2, methods="ce", tiny=True)
    report = {
        "tiny": True,
        "sessions": [{"date": "", "device": "cpu", "platform": "cpu", "versions": {"jax": ""}, "commit": "", "command": ""}],
    }
    cpu = jax.devices("cpu")[0]
    return Check(argparse.Namespace(**given | flags), TINY, report, device or cpu, cpu)


def test_it_runs_on_a_bare_machine_and_goes_on_where_it_ended(tmp_path):
    flags = ["--parts", "longtail", "--copy", str(tmp_path / "copy")]
    done = rehearse(tmp_path / "out", *flags, "--methods", "ce")
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout and "| ce |" in done.stdout
    first = json.loads((tmp_path / "out" / "gpu.json").read_text())
    row = first["longtail"]["methods"]["ce"]
    assert {"accuracy", "best_epoch_accuracy", "head", "medium", "tail", "seconds", "timing", "session"} <= set(row)
    assert len(row["accuracy"]["values"]) == 2 and row["timing"]["side_by_side"] == 2 and row["timing"]["seconds_a_run"] > 0
    assert len(set(first["longtail"]["settings"]["subset_hash"])) == 2 and first["longtail"]["settings"]["recipe"] == "ldam"
    for name in ("gpu.json", "gpu.md"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    # On a fresh machine only gpu.json is there: what it holds stays as it is.
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "gpu.json").write_text(json.dumps(first))
    gpu_check.main(["--tiny", "--out", str(tmp_path / "fresh"), "--parts", "longtail", "--methods", "ce, la"])
    second = json.loads((tmp_path / "fresh" / "gpu.json").read_text())
    assert second["longtail"]["methods"]["ce"] == row and second["longtail"]["methods"]["la"]["session"] == 1
    assert (
        "| la |" in (tmp_path / "fresh" / "gpu.md").read_text()
        and not (tmp_path / "fresh" / "runs").joinpath("ce-e64c").exists()
    )


@pytest.mark.slow  # half a minute on an idle machine
def test_the_whole_rehearsal(tmp_path):
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert found["tiny"] and set(found) == {"tiny", "sessions", *gpu_check.PARTS}
    for part, keys in PART_KEYS.items():
        assert set(found[part]) == keys
    methods = found["numbers"]["methods"]
    assert set(methods) == {"ce", "lpa(site=stage1)", "cosface", "ce, 2 seeds vmapped"}
    assert all(row["passed"] for row in methods.values()) and methods["cosface"]["head"] == "cosine"
    assert set(methods["ce"]["highest"]) == set(TOLERANCE) and "default" in methods["ce"]
    assert found["numbers"]["convolutions"]["highest"] | {"repeats": True} == {
        "bit_equal": True,
        "repeats": True,
        "update": 0.0,
    }
    row = found["bench"]["mlp"]
    assert set(row["ratios"]) == {"lpa(site=stage1)", "sam"} and row["ratios"]["sam"]["ideal"] == 2.0 and not row["left_out"]
    assert row["trainer"] > 0 and row["noise"] > 0 and row["lax_over_canonical"] > 0
    assert len(found["bench"]["data"]["images_a_second"]) == 6 and found["bench"]["data"]["checkpoint"] > 0
    for row in found["vmap"].values():
        assert (
            row["ratio"] == pytest.approx(1 / row["speed_up"]) and row["runs"] == 2 and len(row["one"]) == len(row["many"]) == 2
        )
    assert set(found["longtail"]["methods"]) == {"ce", "lpl(bound=0.5)"}
    for line in (
        "| ce | 0.0e+00 |",
        "| sam |",
        "A hand-written loop's step",
        "| canonical |",
        "| lpl(bound=0.5) |",
        "rehearsal",
    ):
        assert line in text


def test_the_methods_of_the_first_part_cover_every_target():
    registry, sizes = taxonomy.registry(), Sizes()
    typed = [chain for _, chain in spec.parse_list(f"{sizes.first_methods}, {sizes.more_methods}")]
    covered = {target for [call] in typed if call.name != "ce" for target in registry[call.name].coordinates.target}
    there = {
        target for factory in registry.values() if hasattr(factory, "coordinates") for target in factory.coordinates.target
    }
    assert covered == there <= set(TARGETS)


def test_every_method_of_the_long_tail_can_be_built():
    assert list(shared.parse_methods(LONG_TAIL))[:2] == ["ce", "la"]


# A step of the check ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    check = check_at(tmp_path_factory.mktemp("steps"), jax.devices()[1])
    data, method = numbers.patches(check.sizes), shared.parse_methods("lpg(split=accuracy)")["lpg(split=accuracy)"]
    return numbers.Stepper(check, data, method, "mlp")


def test_a_step_runs_on_the_device_it_is_given_and_leaves_its_state_alone(stepper, monkeypatch):
    host = stepper.start(0)
    kept, placed = jax.tree.map(np.copy, host), []
    to_host = numbers.to_host

    def spy(state):
        placed.append({device for x in jax.tree.leaves(state) for device in x.devices()})
        return to_host(state)

    monkeypatch.setattr(numbers, "to_host", spy)
    steps = [stepper(host, device) for device in (stepper.check.cpu, stepper.check.device)]
    assert placed == [{stepper.check.cpu}, {stepper.check.device}] and stepper.check.cpu != stepper.check.device
    assert numbers.same(*(step.after for step in steps)) and not numbers.same(host.params, steps[0].after.params)
    jax.tree.map(np.testing.assert_array_equal, host, kept)


def test_statistics_over_epochs_are_in_use_at_the_second_step(stepper):
    first = stepper(stepper.start(0), stepper.check.cpu)
    second = stepper(first.after, stepper.check.cpu)
    seen = [[leaf.any() for leaf in jax.tree.leaves(step.after.states) if leaf.dtype == bool] for step in (first, second)]
    assert seen == [[False], [True]]  # of LPG's running accuracy: classes seen in an epoch that is over


def test_seeds_side_by_side_are_the_seeds_one_by_one(stepper):
    hosts = [stepper.start(seed) for seed in range(2)]
    for found, host in zip(stepper.side_by_side(hosts, stepper.check.device), hosts, strict=True):
        differences = numbers.differences(found, stepper(host, stepper.check.cpu))
        assert max(differences.values()) < 1e-4


def test_a_method_without_defaults_is_skipped_with_the_reason(tmp_path):
    check, typed = check_at(tmp_path), "weighting(weights=[1, 2])"
    found = numbers.compare_steps(check, numbers.patches(check.sizes), shared.parse_methods(typed)[typed], False)
    assert len(found["skipped"]) == 2 and "needs 10 weights, got 2" in found["skipped"][0]


# Verdicts -----------------------------------------------------------------------------------------------------------------

FINE, OFF = dict.fromkeys(TOLERANCE, 1e-7), dict.fromkeys(TOLERANCE, 0.02)


def verdict(highest, nudged=FINE):
    return numbers.judged({"highest": highest, "nudged": [[nudged, nudged]]})["passed"]


def test_a_verdict_fails_for_what_every_seed_shows_only():
    assert verdict([[FINE, FINE], [FINE, FINE]])
    assert verdict([[OFF, FINE], [FINE, OFF]])  # a ReLU turned here and there
    assert not verdict([[FINE, OFF], [FINE, OFF]])  # the second step is always off
    for key in TOLERANCE:
        assert not verdict([[FINE | {key: 0.02}] * 2] * 3)


def test_a_verdict_allows_what_roundings_do_by_themselves():
    assert verdict([[OFF, OFF]], nudged=dict.fromkeys(TOLERANCE, 0.01))
    assert not verdict([[OFF, OFF]], nudged=dict.fromkeys(TOLERANCE, 0.0001))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_never_passes(bad):
    assert not verdict([[FINE, FINE], [FINE, FINE | {"states": bad}]])
    json.dumps(numbers.judged({"highest": [[dict.fromkeys(FINE, bad)]], "nudged": [[FINE]]}), allow_nan=False)


def test_differences_are_relative_and_zero_has_a_floor():
    assert numbers.apart([2.0, 0.0], [1.0, 0.0]) == 1.0
    assert numbers.apart(np.zeros(4), np.zeros(4)) == 0.0 == numbers.apart(np.zeros(0), np.zeros(0))
    assert numbers.apart(np.full(4, 1e-12), np.zeros(4)) == pytest.approx(1e-6)
    assert numbers.apart(True, False) == 1e6 and np.isnan(numbers.apart(np.nan, 1.0))


# Going on, and errors -----------------------------------------------------------------------------------------------------


def test_a_failed_measurement_is_told_and_tried_again(tmp_path, capsys):
    check = check_at(tmp_path)
    check.measure(("bench",), "mlp", lambda: 1 / 0)
    check.measure(("numbers", "methods"), "ce", lambda: {"skipped": ["linear head: needs more"]})
    check.measure(("others", "methods"), "lpl", lambda: {"error": "RuntimeError: no"})
    assert [text.split(":")[0] for text in page.troubles(check.report)] == ["numbers ce", "bench mlp", "others lpl"]
    assert "| lpl | –" in page.page(check.report)  # and the page can show it
    check.measure(("numbers", "methods"), "ce", lambda: 1 / 0)  # there already
    check.measure(("bench",), "mlp", lambda: {"ratios": {}, "model": "x"} | dict.fromkeys(("conv", "left_out"), "") | dict.fromkeys(
        ("batch_size", "image_size", "step_milliseconds", "rounds", "steps", "noise", "trainer", "lax_over_canonical"), 1))  # fmt: skip
    assert [text.split(":")[0] for text in page.troubles(check.report)] == ["numbers ce", "others lpl"]
    assert json.loads((tmp_path / "gpu.json").read_text())["bench"]["mlp"]["session"] == 0
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_data_that_is_long_tailed_already_is_taken_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    for name, counts in (("tailed", [40, 20, 4]), ("balanced", [20, 20, 20])):
        images = rng.integers(0, 256, (sum(counts) + 12, 4, 4, 3), dtype=np.uint8)
        labels = np.concatenate([np.repeat(np.arange(3), counts), np.arange(12) % 3])
        parts = dict(train_images=images[:-12], train_labels=labels[:-12], test_images=images[-12:], test_labels=labels[-12:])
        np.savez(tmp_path / f"{name}.npz", **parts)
    settings, (first, second) = longtail.datasets(check_at(tmp_path, data=str(tmp_path / "tailed.npz")))
    assert settings.view == "none" and first is second and list(first.class_counts) == [40, 20, 4]
    settings, (first, second) = longtail.datasets(check_at(tmp_path, data=str(tmp_path / "balanced.npz")))
    assert settings.view == "longtail(10)" and first.subset_hash != second.subset_hash and first.class_counts[2] == 2


def test_other_settings_are_not_mixed_in_one_table(tmp_path):
    check = check_at(tmp_path)
    longtail.claim(check, *longtail.datasets(check))
    check.flags.epochs = 3
    with pytest.raises(ValueError, match="got epochs 3 instead of 2. Give the same flags"):
        longtail.claim(check, *longtail.datasets(check))


def test_the_faster_way_to_train_is_taken(tmp_path):
    check = check_at(tmp_path, tiny=False)
    assert longtail.way_to_train(check) == ("canonical", True)
    row = lambda one, many: {"ratio": many / one, "seconds_one": one, "seconds_a_run_of_many": many}
    check.report["vmap"] = {
        "lax": row(5.0, 2.0),
        "canonical": {"seconds_one": 50.0, "given_up": "10.0 times the other kind's time"},
    }
    assert longtail.way_to_train(check) == ("lax", True)
    assert "with canonical convolutions: 10.0 times" in page.vmap_page({"canonical": check.report["vmap"]["canonical"]})
    check.report["vmap"] = {"canonical": row(5.0, 2.0), "lax": row(4.0, 1.0)}
    assert longtail.way_to_train(check) == ("lax", True)
    check.report["vmap"] = {"canonical": row(3.0, 9.0), "lax": row(4.0, 8.0)}
    assert longtail.way_to_train(check) == ("canonical", False)
    check.flags.conv = "lax"
    assert longtail.way_to_train(check) == ("lax", False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "numbers"], "needs a GPU, got 'cpu', .* write --tiny"),
        ([], "needs --data for the part longtail, got none. Write --data"),
        (["--tiny", "--parts", "number"], "Did you mean 'numbers'"),
        (["--tiny", "--conv", "lx"], "canonical, lax"),
        (["--tiny", "--seeds", "1"], "needs --seeds of at least 2, got 1"),
        (["--tiny", "--parts", "longtail", "--methods", "lppl"], "Write lpl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_end_with_the_line_to_write_instead(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gpu_check.main([*flags, "--out", str(tmp_path)])


def test_a_rehearsal_is_not_mixed_with_the_check(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"tiny": False, "sessions": []}))
    with pytest.raises(ValueError, match="needs an --out of a rehearsal, got .*gpu.json of the other kind"):
        gpu_check.main(["--tiny", "--out", str(tmp_path)])
