"""Scripts that are killed, stopped, started again, given other settings, or spread over processes: as a user meets them."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import compare, shared, train
from experiments.shared import many

pytestmark = pytest.mark.optax_promotes  # schedules

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = [sys.executable, "experiments/train.py", "--method", "lpl+lpg", "--model", "cnn", "--view", "none", "--seed", "3"]
LONG = [*TRAIN, "--epochs", "20", "--checkpoint-seconds", "0.2", "--log-every", "5"]
TIMES = ("seconds", "examples_per_second", "peak_memory_bytes")


def start(command, out, **environment):
    return subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def lines(out):
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def stop_after(process, out, count, number):
    """Sends the signal a random moment after the log has that many lines; (exit code, stderr)."""
    while process.poll() is None and lines(out) < count:
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


def entry(out):
    [found] = json.loads((out / "results.json").read_text())["methods"].values()
    return {key: value for key, value in found.items() if key not in TIMES}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(LONG, out)
    assert process.communicate(timeout=300) and process.returncode == 0
    return out


def check_killed(undisturbed, out, moments):
    for count in moments:
        stop_after(start(LONG, out), out, count, signal.SIGKILL)
    last = start(LONG, out)
    stdout, stderr = last.communicate(timeout=300)
    assert last.returncode == 0, stderr
    assert entry(out) == entry(undisturbed)
    assert (out / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    return stdout, stderr


def test_killed_at_random_moments_the_same_command_ends_with_the_same_numbers(undisturbed, tmp_path):
    stdout, stderr = check_killed(undisturbed, tmp_path / "run", [random.randint(5, 30), random.randint(40, 80)])
    assert "lpl+lpg" in stdout
    again = start(LONG, tmp_path / "run")
    assert "Finished before" in again.communicate(timeout=300)[0] and again.returncode == 0


@pytest.mark.slow
def test_killed_very_often_it_still_does(undisturbed, tmp_path):
    check_killed(undisturbed, tmp_path / "run", [0, 0, *sorted(random.randint(1, 90) for _ in range(8))])


def test_sigterm_saves_and_says_how_to_go_on(undisturbed, tmp_path):
    process = start(LONG, tmp_path)
    stderr = stop_after(process, tmp_path, 10, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "saved in" in stderr and "The same command goes on" in stderr and "Traceback" not in stderr


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    flags = ["--epochs", "1", "--out", str(tmp_path)]
    train.main(["--method", "lpl", *flags])
    with pytest.raises(ValueError, match=r'(?s)batch_size: 64 there, 32 now\n  method: "lpl" there, "la" now'):
        train.main(["--method", "la", *flags, "--batch-size", "32"])
    train.main(["--method", "lpl", *flags, "--checkpoint-seconds", "5"])  # what changes no number may differ


@pytest.mark.parametrize("vmapped", ["False", "True"])
def test_compare_trains_only_what_is_missing(tmp_path, monkeypatch, vmapped):
    trained, original = [], many.fit_many

    def fit_many(recipe, runs, **options):
        trained.extend((run.name, run.seed) for run in runs)
        return original(recipe, runs, **options)

    monkeypatch.setattr(many, "fit_many", fit_many)
    flags = ["--epochs", "2", "--cost-rounds", "0", "--vmapped", vmapped, "--out", str(tmp_path)]
    compare.main(["--methods", "ce, lpl", "--seeds", "1", *flags])
    first = json.loads((tmp_path / "results.json").read_text())
    assert sorted(trained) == [("ce", 0), ("lpl", 0)]
    trained.clear()
    compare.main(["--methods", "ce, lpl", "--seeds", "1", *flags])
    assert trained == [] and json.loads((tmp_path / "results.json").read_text()) == first
    compare.main(["--methods", "ce, lpl, lpl(bound=2)", "--seeds", "2", *flags])
    assert sorted(trained) == [("ce", 1), ("lpl", 1), ("lpl(bound=2)", 0), ("lpl(bound=2)", 1)]
    more = json.loads((tmp_path / "results.json").read_text())
    for typed in ("ce", "lpl"):
        assert more["methods"][typed]["accuracy"]["values"][0] == first["methods"][typed]["accuracy"]["values"][0]
    with pytest.raises(ValueError, match="epochs: 2 there, 3 now"):
        compare.main(["--methods", "ce", "--seeds", "1", *flags, "--epochs", "3"])
    folders = {p.parent.parent.name.rsplit("-", 1)[0] for p in tmp_path.glob("runs/*/seed-*/checkpoints")}
    assert folders == {"ce", "lpl", "lpl-bound-2"}


def test_without_a_folder_every_setting_gets_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for epochs in ("1", "2", "1"):
        train.main(["--epochs", epochs])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["train-digits-longtail-50", "train-digits-longtail-50-2"]


def test_a_folder_in_use_by_other_settings_is_passed_over(tmp_path, monkeypatch):
    from perturbjax.training.folder import FolderInUse

    monkeypatch.chdir(tmp_path)
    what = dict(data="digits", epochs=1)
    with shared.prepare_out(None, "train", "none", what) as first:
        with shared.prepare_out(None, "train", "none", what | {"epochs": 2}) as other:
            assert (first.path.name, other.path.name) == ("train-digits-none", "train-digits-none-2")
        with pytest.raises(FolderInUse, match="another process holds"):
            shared.prepare_out(None, "train", "none", what)


def test_two_processes_are_one(tmp_path):
    """Two processes with two devices each, on this machine, against one process with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quick = [sys.executable, "experiments/train.py", "--method", "lpl+sam", "--epochs", "2", "--seed", "3"]
    joined = [*quick, "--coordinator", f"localhost:{port}", "--num-processes", "2"]
    both = [start([*joined, "--process-id", str(i)], tmp_path / "two", JAX_NUM_CPU_DEVICES="2") for i in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    train.main([*quick[2:], "--out", str(tmp_path / "one")])
    one, two = ([json.loads(x) for x in (tmp_path / k / "metrics.jsonl").read_text().splitlines()] for k in ("one", "two"))
    assert [x["step"] for x in one] == [x["step"] for x in two]
    np.testing.assert_allclose([x["loss"] for x in two], [x["loss"] for x in one], rtol=1e-4)
    assert entry(tmp_path / "two")["accuracy"] == entry(tmp_path / "one")["accuracy"]


def test_flags_of_several_processes_belong_together():
    with pytest.raises(ValueError, match="need --coordinator"):
        train.main(["--num-processes", "2"])
    with pytest.raises(ValueError, match="'host:port' and a process id"):
        train.main(["--coordinator", "localhost", "--num-processes", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "9"], "Write --devices 8"),
        (["--devices", "8", "--batch-size", "50"], "Write --batch-size 48 or 56"),
        (["--parallel", "pmapp"], "Did you mean 'pmap'"),
        (["--recipe", "ldm"], "Did you mean 'ldam'"),
        (["--recipe", "ldam", "--epochs", "many"], "--recipe ldam --epochs many"),
        (["--accumulate", "0"], "1 <= accumulate"),
        (["--schedule", "step"], "milestones"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_flags_end_with_a_clear_error_before_training(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*flags, "--out", str(tmp_path)])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_recipe_sets_flags_and_flags_beside_it_count(tmp_path):
    train.main(["--recipe", "ldam", "--epochs", "10", "--weight-decay", "0.001", "--view", "none", "--out", str(tmp_path)])
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["batch_size"], settings["milestones"], settings["decay"]) == (128, [8.0, 9.0], [0.01, 0.0001])
    assert settings["weight_decay"] == 0.001 and settings["schedule"] == "step" and settings["augment"] is True


def test_tensorboard_events_hold_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    train.main(["--method", "lpl", "--epochs", "2", "--tensorboard", "--out", str(tmp_path)])
    [file] = (tmp_path / "tensorboard").rglob("events*")
    assert b"accuracy" in file.read_bytes() and b"lpl/inner_evaluations" in file.read_bytes()


def test_images_in_a_folder_are_compared(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(100 * label, 100 * label + 100, (6, 6, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    flags = [
        "--view",
        "none",
        "--methods",
        "ce, lpl",
        "--seeds",
        "1",
        "--epochs",
        "5",
        "--batch-size",
        "8",
        "--cost-rounds",
        "0",
    ]
    compare.main(["--data", str(tmp_path / "images"), *flags, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["data"]["name"] == "images" and found["data"]["class_names"] == ["bright", "dark"]
    assert found["methods"]["ce"]["accuracy"]["mean"] > 0.9


def test_a_group_that_was_interrupted_is_finished_as_it_began(tmp_path, monkeypatch):
    """Killed between the runs' files: nothing is trained again, every run has its log and its checkpoint."""
    flags = [
        "--methods",
        "ce, la",
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--cost-rounds",
        "0",
        "--vmapped",
        "True",
        "--out",
        str(tmp_path),
    ]
    original, saved = many.split_off, []

    def dying(one, history, common):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(one.name)
        original(one, history, common)

    monkeypatch.setattr(many, "split_off", dying)
    with pytest.raises(KeyboardInterrupt):
        compare.main(flags)
    assert saved == ["ce, seed 0"] and len(list(tmp_path.glob("runs/together-*"))) == 1
    monkeypatch.setattr(many, "split_off", original)
    compare.main(flags)
    assert not list(tmp_path.glob("runs/together-*"))
    logs = sorted(tmp_path.glob("runs/*/seed-*/metrics.jsonl"))
    assert len(logs) == 4 and all(log.read_text().count("\n") == 2 for log in logs)
    # A damaged file of a finished run is put aside, and the checkpoint is enough; the log stays.
    lines = logs[0].read_text()
    finished = sorted(tmp_path.glob("runs/ce-*/seed-0/finished.npz"))[0]
    before = json.loads((tmp_path / "results.json").read_text())["methods"]["ce"]["accuracy"]
    finished.write_bytes(b"PK rubbish")
    (tmp_path / "results.json").write_text("{")
    compare.main(flags)
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["ce"]["accuracy"] == before
    assert logs[0].parent == finished.parent and logs[0].read_text() == lines


def test_all_seeds_of_a_drawn_view_share_one_recipe(tmp_path):
    settings = compare.CompareSettings(seeds=3)
    datasets = [shared.load_view(settings, seed) for seed in range(3)]
    methods = shared.parse_methods("ce, la(tau=1), la(tau=2)")
    assert [len(group) for group in many.groups(many.plan(settings, datasets, methods, tmp_path))] == [3, 6]


def test_other_images_or_another_plugin_are_another_run(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    file, flags = (
        tmp_path / "mine.npz",
        ["--data", str(tmp_path / "mine.npz"), "--view", "none", "--epochs", "1", "--batch-size", "8"],
    )
    for number in range(2):
        np.savez(file, images=rng.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8), labels=labels)
        train.shared.source.cache_clear(), train.shared.channel_stats.cache_clear()
        if number == 0:
            train.main([*flags, "--out", str(tmp_path / "out")])
        else:
            with pytest.raises(ValueError, match="images_hash"):
                train.main([*flags, "--out", str(tmp_path / "out")])


def test_other_test_images_or_pmap_are_another_run_and_folders_of_earlier_versions_stay_readable(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    file, out = tmp_path / "mine.npz", tmp_path / "out"
    flags = ["--data", str(file), "--view", "none", "--epochs", "1", "--batch-size", "8", "--out", str(out)]
    arrays = dict(train_images=rng.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8), train_labels=labels, test_labels=labels)

    def write():
        np.savez(file, **arrays, test_images=rng.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8))
        train.shared.source.cache_clear(), train.shared.channel_stats.cache_clear()

    write()
    train.main(flags)
    train.main([*flags, "--devices", "2"])  # the same numbers, to rounding
    with pytest.raises(ValueError, match='parallel: "jit" there, "pmap over 2 devices" now'):
        train.main([*flags, "--parallel", "pmap", "--devices", "2"])
    write()
    with pytest.raises(ValueError, match="test_hash: "):
        train.main(flags)
    kept = json.loads((out / "run.json").read_text())
    del kept["settings"]["test_hash"], kept["settings"]["parallel"]
    (out / "run.json").write_text(json.dumps(kept))
    train.main(flags)


def test_other_contents_of_weights_or_vectors_are_another_run(tmp_path):
    folders, settings = (
        train.shared.folders,
        train.TrainSettings(weights=str(tmp_path / "net"), vectors=str(tmp_path / "words")),
    )
    data, seen = train.shared.load_view(train.TrainSettings(), 0), []
    contents = bytearray(6_000_000)  # more than is read of it: blocks at equal distances
    for change in (None, 0, 2_999_999 // 5860 * 5860, 5_999_999 // 5860 * 5860, "longer"):
        if change == "longer":
            contents.append(0)
        elif change is not None:
            contents[change] ^= 1
        (tmp_path / "net").write_bytes(contents)
        (tmp_path / "words").write_bytes(contents[:100])
        found = folders.identity(settings, data)
        seen.append((found["weights_hash"], found["vectors_hash"]))
    assert len({weights for weights, _ in seen}) == 5 and len({vectors for _, vectors in seen}) == 2
    assert {"weights_hash", "vectors_hash"}.isdisjoint(folders.identity(train.TrainSettings(), data))


def test_flags_that_earlier_versions_lack_are_no_difference_until_they_are_set():
    folders, data = train.shared.folders, train.shared.load_view(train.TrainSettings(), 0)
    later = {"shortcut": "B", "background": "black", "skip_damaged": True}
    assert later.keys() == folders.LATER.keys() and later.keys().isdisjoint(folders.identity(train.TrainSettings(), data))
    assert later.items() <= folders.identity(train.TrainSettings(**later), data).items()


def test_a_last_update_that_breaks_the_net_is_found(tmp_path):
    flags = [
        "--epochs",
        "1",
        "--batch-size",
        "344",
        "--warmup-epochs",
        "0",
        "--method",
        "sam(radius=1e30)",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(FloatingPointError, match="It started in the update of step 1"):
        train.main(flags)
    assert not (tmp_path / "results.json").exists() and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "flag", ["--learning-rate=nan", "--momentum=1.5", "--dropout=1.0", "--width=0", "--warmup-epochs=99", "--devices=0"]
)
def test_numbers_outside_their_range_are_refused(flag, tmp_path):
    with pytest.raises(ValueError, match=flag.split("=")[0]):
        train.main([flag, "--epochs", "2", "--out", str(tmp_path)])


def test_a_default_that_has_changed_is_another_run():
    """A folder of an earlier version, begun with the default of then, isn't gone on with, nor averaged with runs of the new one."""
    folders, data = shared.folders, shared.load_view(train.TrainSettings(), 0)
    defaults = lambda typed: shared.method_identity(typed).get("defaults")
    assert defaults("lpl+noise") == {"gradient_noise.eta": 1e-4} == defaults("gradient_noise(gamma=0.1)")
    assert defaults("noise(eta=0.01)") == defaults("noise(0.01)") == defaults("lpl") == defaults("ce") is None
    assert defaults("rlr(0.1)+sam") == {"rlr.weight": 0.25} and defaults("rlasso(space=logit)") is None
    assert {key for name in folders.CHANGED for key in defaults(name)} == {
        f"{name}.{key}" for name, key in folders.CHANGED.items()
    }
    before = folders.identity(train.TrainSettings(method="noise"), data, method="noise")
    assert before["defaults"] == {"gradient_noise.eta": 1e-4}
    assert "defaults" not in folders.identity(train.TrainSettings(), data, method="ce")
