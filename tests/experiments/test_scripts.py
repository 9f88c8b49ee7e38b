"""The scripts, run as a user runs them: results.json's form, the report, configs, plug-ins, and bad input."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import bench, compare, domains, shared, train
from experiments.shared import many
from perturbjax import spec, taxonomy
from perturbjax.data import VIEWS, load

pytestmark = pytest.mark.optax_promotes  # schedules

ROOT = pathlib.Path(__file__).parents[2]
QUICK = ["--epochs", "2", "--batch-size", "32"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One real comparison in a process of its own."""
    out = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "experiments/compare.py", "--methods", "ce, la+lpl(bound=0.5), sam", "--seeds", "2", *QUICK]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done


def test_compare_writes_what_the_readme_says(compared):
    out, done = compared
    found = results(out)
    assert found["command"].startswith("python experiments/compare.py --methods 'ce, la+lpl(bound=0.5), sam'")
    assert list(found["methods"]) == ["ce", "la+lpl(bound=0.5)", "sam"]
    data = found["data"]
    assert data["train_size"] == sum(data["class_counts"]) == 344 and len(set(data["subset_hash"])) == 2
    for name, entry in found["methods"].items():
        for key in ("accuracy", "best_epoch_accuracy", "ece", "head", "medium", "tail"):
            values = entry[key]["values"]
            assert len(values) == 2 and all(0 <= v <= 1 for v in values)
            assert entry[key]["mean"] == pytest.approx(np.mean(values))
            assert entry[key]["std"] == pytest.approx(np.std(values, ddof=1))
        assert entry["top5"] is None and len(entry["per_class"]) == 10
        assert entry["cost_ratio"] > 0 and entry["seconds"] > 0
        assert entry["gradient_evaluations"] == (2.0 if name == "sam" else 1.0)
        assert (entry["inner_evaluations"] > 0) == ("lpl" in name)
        assert (entry["relative_loss_variation"] is not None) == ("lpl" in name)
        assert np.shape(entry["learning_curve"]["accuracy"]) == (2, 2)
        last = [curve[-1] for curve in entry["learning_curve"]["accuracy"]]
        assert entry["accuracy"]["values"] == pytest.approx(last)
        assert entry["best_epoch_accuracy"]["values"] == pytest.approx(np.max(entry["learning_curve"]["accuracy"], axis=1))
    page = (out / "report.html").read_text()
    assert "la+lpl(bound=0.5)" in page and "<svg" in page and "<script" not in page
    assert "la+lpl" in done.stdout and "report.html" in done.stdout and done.stderr == ""


def test_train_gives_the_numbers_that_compare_gives_for_this_seed(compared, tmp_path):
    train.main(["--method", "la+lpl(bound=0.5)", "--seed", "1", *QUICK, "--out", str(tmp_path)])
    [entry] = results(tmp_path)["methods"].values()
    beside = results(compared[0])["methods"]["la+lpl(bound=0.5)"]
    assert entry["accuracy"]["values"] == pytest.approx([beside["accuracy"]["values"][1]])
    assert entry["cost_ratio"] is None


CONFIGS = sorted(path.stem for path in shared.CONFIGS.glob("*.py"))
COMPARED = [name for name in CONFIGS if shared.read_config(name).get("script", "compare.py") == "compare.py"]


@pytest.mark.parametrize("name", [c if c == "small_longtail" else pytest.param(c, marks=pytest.mark.slow) for c in COMPARED])
def test_every_config_runs_in_its_small_version(name, tmp_path):
    settings = shared.read_config(name)
    compare.main(["--config", name, "--smoke", "--out", str(tmp_path)])
    assert list(results(tmp_path)["methods"]) == [typed for typed, _ in spec.parse_list(settings["methods"])]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_names_methods_views_and_flags_that_exist(name):
    settings = shared.read_config(name)
    script = {None: compare.CompareSettings, "domains.py": domains.DomainsSettings}[settings.pop("script", None)]
    flags = {field.name for field in dataclasses.fields(script)}
    assert set(settings) - {"smoke"} <= flags and set(settings["smoke"]) <= flags
    for method, numbers in shared.parse_methods(settings["methods"]).values():
        method(numbers)
    for view in (settings["view"], settings["smoke"].get("view", "none")):
        calls = () if view == "none" else spec.resolve(spec.parse_chain(view), VIEWS)
        for call in calls:
            VIEWS[call.name](**dict(call.kwargs))


def test_runs_that_were_tested_after_other_epochs_share_a_curve(tmp_path):
    flags = ["--methods", "ce", "--epochs", "5", "--batch-size", "32", "--cost-rounds", "0", "--out", str(tmp_path)]
    compare.main([*flags, "--seeds", "1", "--test-every", "2"])
    first = results(tmp_path)["methods"]["ce"]
    assert first["learning_curve"]["epoch"] == [2, 4, 5]
    compare.main([*flags, "--seeds", "2", "--test-every", "4"])
    both = results(tmp_path)["methods"]["ce"]
    assert both["learning_curve"]["epoch"] == [4, 5] and np.shape(both["learning_curve"]["accuracy"]) == (2, 2)
    assert both["learning_curve"]["accuracy"][0] == first["learning_curve"]["accuracy"][0][1:]  # not trained again
    assert both["accuracy"]["values"] == [curve[-1] for curve in both["learning_curve"]["accuracy"]]


def test_a_config_of_another_script_is_an_error_with_the_command():
    with pytest.raises(
        ValueError, match=r"needs domains.py, got compare.py. Write: python experiments/domains.py --config small_domains"
    ):
        compare.main(["--config", "small_domains"])


def test_a_flag_overrides_the_config(tmp_path):
    compare.main(["--config", "small_longtail", "--smoke", "--methods", "la", "--seeds=1", "--out", str(tmp_path)])
    found = results(tmp_path)
    assert list(found["methods"]) == ["la"] and found["settings"]["seeds"] == [0] and found["data"]["views"]


def test_an_npz_file_of_ones_own(tmp_path):
    digits = load("digits")
    images, labels = (255 * digits.train_images).astype(np.uint8), digits.train_labels
    np.savez(tmp_path / "mine.npz", x_train=images[:300], y_train=labels[:300], x_test=images[300:400], y_test=labels[300:400])
    compare.main(["--data", str(tmp_path / "mine.npz"), "--view", "none", "--methods", "ce", "--seeds", "1", "--cost-rounds", "0",
                  *QUICK, "--out", str(tmp_path / "out")])  # fmt: skip
    assert results(tmp_path / "out")["data"]["train_size"] == 300


def test_texts_in_an_npz_file_are_learnt_with_perturbed_words(tmp_path):
    """The taxonomy paper's protocol comes with the model's name."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    texts = [" ".join(rng.permutation(["a", "film", *rng.choice(["the", "was", "so"], 3), ("bad", "good")[y]])) for y in labels]
    arrays = dict(train_text=texts[:80], train_labels=labels[:80], test_text=texts[80:], test_labels=labels[80:])
    np.savez(tmp_path / "MR.npz", class_names=np.array(["neg", "pos"]), **arrays)
    method = "mixpert(eps1=0.1, eps2=0.01)"
    flags = ["--data", str(tmp_path / "MR.npz"), "--model", "bilstm", "--method", method, "--width", "8", "--batch-size", "8"]
    train.main([*flags, "--learning-rate", "0.005", "--out", str(tmp_path / "run")])
    found = results(tmp_path / "run")
    assert (found["data"]["train_size"], found["settings"]["epochs"], found["settings"]["optimizer"]) == (80, 6, "adamw")
    [entry] = found["methods"].values()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 6 and np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
    assert all(line["mixpert/inner_evaluations"] > 0 for line in lines)  # it searched at the words' vectors
    assert entry["accuracy"]["values"][0] > 0.9 and entry["inner_evaluations"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


PLUGIN = '''"""Source: a test."""
import perturbjax as pj

@pj.method(target="logit", direction=(), inference="prior", granularity="sample", cite="test", off=dict(scale=0.0))
def cooled(*, scale: float = 0.5) -> pj.Perturbation:
    """Divides the logits by 1 + scale."""
    apply = lambda flow, rest, state, context: (flow._replace(value=flow.value / (1 + scale)), state, {})
    return pj.Perturbation("logits", lambda context: (), apply)
'''


def test_a_method_in_a_file_of_ones_own_is_compared_and_listed(tmp_path, capsys):
    path = tmp_path / "cooled.py"
    path.write_text(PLUGIN)
    compare.main(
        ["--plugin", str(path), "--methods", "ce, cooled(scale=2)+sam", "--seeds", "1", *QUICK, "--out", str(tmp_path)]
    )
    assert results(tmp_path)["methods"]["cooled(scale=2)+sam"]["gradient_evaluations"] == 2
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--list", "--plugin", str(path)])
    assert stopped.value.code == 0 and "Divides the logits" in capsys.readouterr().out


def test_list_shows_every_method_with_its_coordinates(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--list"])
    shown = capsys.readouterr().out
    for factory in taxonomy.registry().values():
        assert (getattr(factory, "alias", None) or factory.__name__) in shown
    assert "adversarial" in shown and "category" in shown
    assert "(pj.logit_adjustment)" in shown and "(pj.lpl)" not in shown  # the Python name, where it is another one


def test_different_classifiers_are_said_unless_the_flag_gives_one(tmp_path, capsys):
    quick = "--view thin(8) --epochs 1 --batch-size 16 --seeds 1 --cost-rounds 0".split()
    flags = ["--methods", "ce, ldam, ls", *quick]
    compare.main([*flags, "--out", str(tmp_path / "a")])
    said = " ".join(capsys.readouterr().out.split())
    assert "note: the methods have different classifiers (linear: ce, ls; cosine: ldam)" in said
    assert "Write --head cosine for one classifier." in said
    assert results(tmp_path / "a")["settings"]["head"] == "linear: ce, ls; cosine: ldam"
    assert "linear: ce, ls; cosine: ldam" in (tmp_path / "a" / "report.html").read_text()
    compare.main([*flags, "--head", "cosine", "--out", str(tmp_path / "b")])
    assert "note: the methods" not in capsys.readouterr().out and results(tmp_path / "b")["settings"]["head"] == "cosine"
    assert shared.classifiers(compare.CompareSettings(), shared.parse_methods("ce, la")) is None


@pytest.mark.parametrize("vmapped", ["False", "True"])
def test_a_method_that_diverges_takes_no_other_down(vmapped, tmp_path):
    flags = [
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--batch-size",
        "32",
        "--cost-rounds",
        "0",
        "--vmapped",
        vmapped,
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(FloatingPointError, match="The results are those of the other methods") as raised:
        compare.main(["--methods", "ce, lpg(split=all, bound=1e30), lpg(split=all, bound=0.1)", *flags])
    assert "lpg(split=all, bound=1e30)" in str(raised.value)
    assert list(results(tmp_path)["methods"]) == ["ce", "lpg(split=all, bound=0.1)"]
    with pytest.raises(FloatingPointError, match="needs finite losses"):
        compare.main(["--methods", "lpg(split=all, bound=1e30), ce", *flags])


def test_bench_refuses_what_it_would_ignore_and_finds_a_missing_folder_first(tmp_path):
    with pytest.raises(ValueError, match="--devices is not for bench.py, got 2. Leave it out"):
        bench.main(["--devices", "2"])
    with pytest.raises(ValueError, match="--json needs a file in a folder that is there"):
        bench.main(["--json", str(tmp_path / "missing" / "bench.json")])


def test_a_finished_comparison_says_so_and_times_nothing_again(tmp_path, monkeypatch, capsys):
    flags = ["--methods", "rts(timing=last), sam", *QUICK, "--seeds", "1", "--cost-rounds", "1", "--out", str(tmp_path)]
    compare.main(flags)  # the first step of `last` is plain, its run is not: it gets no ratio
    assert results(tmp_path)["methods"]["rts(timing=last)"]["cost_ratio"] is None and "Wrote" in capsys.readouterr().out
    monkeypatch.setattr(many, "measure_costs", None)
    compare.main(flags)
    assert "Finished before" in capsys.readouterr().out


def test_bench_measures_ratios_beside_ideals(tmp_path):
    small = ["--model", "mlp", "--image-size", "8", "--batch-size", "32", "--rounds", "2", "--steps", "2"]
    methods = "la, lpa(site=stage1), sam, rts(timing=every(2))"
    bench.main([*small, "--methods", methods, "--json", str(tmp_path / "bench.json")])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["ratios"]) == {"la", "lpa(site=stage1)", "sam", "rts(timing=every(2))"} and found["trainer"] > 0
    assert found["data_path"] > 0 and found["checkpoint"] > 0
    for entry in found["ratios"].values():
        assert entry["quotient"] == pytest.approx(entry["ratio"] / entry["ideal"])
    assert found["ratios"]["la"]["ideal"] == 1.0 and found["ratios"]["sam"]["ideal"] == 2.0
    assert found["ratios"]["rts(timing=every(2))"]["ideal"] == 1.5  # over the steps that were run, not at the first one
    # An MLP of 192-128-64: nearly all of its work stands before stage1, so three steps after it are cheap.
    assert 1.0 < found["ratios"]["lpa(site=stage1)"]["ideal"] < 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lppl"], "Write lpl"),
        (["--methods", "lpl(bond=1)"], r"Write lpl\(bound=1\)"),
        (["--methods", "lpl(bound=-1)"], "lpl needs bound >= 0, got -1"),
        (["--methods", "ce, lpa(site=stage9)"], "stage1, stage2"),
        (["--methods", "ce, ce"], "'ce' twice"),
        (["--methods", "lpl(split=freq)"], "split=frequency"),
        (["--methods", "isda", "--head", "cosine"], "head='linear'"),
        (["--methods", "weighting(weights=[1, 2])"], "needs 10 weights, got 2"),
        # What only the training step can refuse:
        (["--methods", "ce, pcgrad(groups=20)"], r"pcgrad\(groups=20\): pcgrad needs at most 10 groups of 10 classes, got 20"),
        (
            ["--methods", "ce, pcgrad(groups=domains)"],
            r"pcgrad\(groups=domains\): .* Write groups='classes' for data without domains",
        ),
        (["--methods", "ce, lpl(bound=[0.1, 0.2])"], r"lpl\(bound=\[0.1, 0.2\]\): .*float32\[2\] .*float32\[10\]"),
        (["--methods", "ce, lpl(direction=[1, -1])"], r"lpl\(direction=\[1, -1\]\): .*float32\[2\]"),
        (["--methods", "ce, sam(radius=[0.1, 0.2])"], r"sam\(radius=\[0.1, 0.2\]\): .*\(2,\)"),
        (["--methods", "ce, focal(gamma=[1, 2])"], r"focal\(gamma=\[1, 2\]\): .*\(64,\), \(2,\)"),
        (["--methods", "ce, noise(eta=[1, 2])"], r"noise\(eta=\[1, 2\]\): .*\(2,\)"),
        (["--view", "longtale(5)"], "Write longtail"),
        (["--view", "longtail(0.5)"], "ratio of at least 1"),
        (["--model", "resnet21"], "resnet20"),
        (["--batch-size", "100000"], "batch_size <= 344"),
        (["--epochs", "0"], "^--epochs needs epochs >= 1, got 0. Write --epochs 1.$"),
        (["--batch-size", "0"], "--batch-size needs batch_size >= 1, got 0. Write --batch-size 1"),
        (
            ["--epochs", "2", "--warmup-epochs", "3"],
            "--warmup-epochs needs 0 <= warmup_epochs <= 2, got 3.0. Write --warmup-epochs 2",
        ),
        (["--background", "whit"], "a background that is a colour, or none, got 'whit'"),
        (["--skip-damaged"], "a folder of images for skip_damaged, got 'digits'. Leave skip_damaged out"),
        (["--seeds", "0"], "--seeds needs seeds >= 1, got 0. Write --seeds 1"),
        (["--config", "small_longtial"], "Did you mean 'small_longtail'"),
        (["--plugin", "nowhere.py"], "nowhere.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_a_clear_error_before_training(flags, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "results.json").exists() and not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--stream", "True"]], ids=["resident", "streamed"])
def test_the_check_before_training_makes_the_trace_that_training_uses(flags, monkeypatch):
    """So it costs nothing but its place."""
    from perturbjax.training import Devices, init_state, step
    from perturbjax.training.feed import Feed, streams

    settings = compare.CompareSettings(
        view="thin(8)", batch_size=17, stream=True if flags else None
    )  # a size of this test alone
    [(method, numbers)] = shared.parse_methods("lpl(bound=0.5)+sam").values()
    data, stats = shared.load_view(settings, 0), shared.channel_stats(settings)
    traced, original = [], step.train_step
    monkeypatch.setattr(step, "train_step", lambda *args, **options: (traced.append(1), original(*args, **options))[1])
    shared.check_runs(settings, data, {"this": (method, numbers)}, stats)
    assert traced == [1]
    recipe, wanted = shared.make_recipe(settings, data, method, stats), shared.make_numbers(settings, numbers)
    feed = Feed(recipe, [data], [0], Devices(), 1, streams(data, settings.stream), False)
    call, state = feed.example(1), init_state(recipe, wanted, step.sample_data(data), 0)
    step.compiled_step(recipe).lower(state, step.as_arrays(wanted), feed.data(), call.index, call.images)
    assert traced == [1]


def test_timing_shares_the_data_streams_where_training_does_and_an_error_there_loses_nothing(tmp_path, monkeypatch):
    from perturbjax.training import cost

    flags = ["--methods", "ce, la", "--seeds", "1", "--stream", "True", *QUICK, "--out", str(tmp_path)]
    given, original = [], many.TimedStep

    class Watched(original):
        def __init__(self, *args, batch=None, **options):
            given.append(batch)
            super().__init__(*args, batch=batch, **options)

    def failing(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cost, "device_data", failing)  # nobody puts all images on the device
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(many, "cost_ratios", failing)
        compare.main(flags)
    before = results(tmp_path)
    assert [entry["cost_ratio"] for entry in before["methods"].values()] == [None, None]
    monkeypatch.setattr(many, "TimedStep", Watched)
    monkeypatch.setattr(many, "fit_many", failing)  # nothing is trained again
    compare.main(flags)
    after = results(tmp_path)
    assert given[-1] is given[-2] and given[-1][0].images is None and given[-1][1].images.shape[:2] == (1, 32)
    for typed, entry in after["methods"].items():
        assert entry["cost_ratio"] > 0 and entry["accuracy"] == before["methods"][typed]["accuracy"]
    assert after["peak_memory_bytes"] > 0 and "peak_memory_bytes" not in entry


def test_states_of_finished_runs_are_not_kept_on_the_device(tmp_path, monkeypatch):
    kept, original = [], many.train_all
    monkeypatch.setattr(many, "train_all", lambda *args: (kept.append(original(*args)), kept[-1])[1])
    for vmapped in ("False", "True"):
        flags = ["--methods", "ce, la", "--seeds", "2", "--cost-rounds", "0", "--vmapped", vmapped, *QUICK]
        compare.main([*flags, "--out", str(tmp_path / vmapped)])
        histories = [history for found in kept[-1][0].values() for history in found]
        assert len(histories) == 4 and all(history.state is None and len(history.logits) for history in histories)


def test_steps_that_change_nothing_are_told(tmp_path, capsys):
    """344 samples are 10 batches of 32 an epoch: of 20 steps the last two don't fill a group of three."""
    train.main(["--accumulate", "3", *QUICK, "--out", str(tmp_path)])
    assert "note: The last 2 of 20 steps change nothing: --accumulate 3 makes one update of every 3." in capsys.readouterr().out
    assert results(tmp_path)["data"]["notes"] == []


def test_data_that_is_missing_or_damaged_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        compare.main(["--data", str(tmp_path / "none.npz"), "--out", str(tmp_path)])
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 this is no archive")
    with pytest.raises(ValueError, match="damaged.npz"):
        compare.main(["--data", str(tmp_path / "damaged.npz"), "--out", str(tmp_path)])


def test_an_error_is_one_line_and_exit_code_two(tmp_path):
    command = [sys.executable, "experiments/train.py", "--method", "lppl", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_train_needs_a_seed_from_0_on(tmp_path):
    with pytest.raises(ValueError, match="--seed needs seed >= 0, got -1. Write --seed 0"):
        train.main(["--seed", "-1", "--out", str(tmp_path)])


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="needs a folder that can be written, got .* Name another one with --out"):
        train.main(["--out", str(tmp_path / "file" / "inside")])
