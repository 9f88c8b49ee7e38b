"""experiments/domains.py: leave one domain out from end to end, what is shared, chosen and resumed, and bad input."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, domains, shared
from experiments.leaveout import plan, training
from perturbjax import spec
from perturbjax.activation.lpa_sites import comparing
from perturbjax.data.domains import domain_batches, pooled, split_domains
from perturbjax.link import Where
from perturbjax.training import init_state
from perturbjax.training.step import build, compiled_step, pixels

pytestmark = pytest.mark.optax_promotes  # schedules

QUICK = ["--steps", "6", "--evaluate-every", "2", "--batch-size", "6", "--model", "mlp", "--width", "4"]


def write(path, *, domains=3, keep=None, **changes):
    """135 images of 8x8 pixels whose class is a row of light and whose domain a colour of the rest."""
    rng = np.random.default_rng(0)
    labels, of = np.arange(135) % 3, np.arange(135) // 3 % domains
    images = rng.integers(0, 40, (135, 8, 8, 3))
    for image, label, domain in zip(images, labels, of, strict=True):
        image[2 * label : 2 * label + 3] += 150
        image[..., domain % 3] += 50
    arrays = dict(images=images.astype(np.uint8), labels=labels, domains=of, class_names=np.array(list("xyz")))
    arrays["domain_names"] = np.array(["art", "photo", "sketch", "clip"][:domains])
    if keep is not None:
        arrays |= {name: arrays[name][keep(labels, of)] for name in ("images", "labels", "domains")}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("domains") / "TINY.npz")


def found(folder):
    return json.loads((folder / "domains.json").read_text())


@pytest.mark.slow
def test_all_methods_of_the_protocol_give_a_table_and_finished_runs_are_kept(data, tmp_path, capsys):
    methods = [
        "erm",
        "coral",
        "dann",
        "domain_mixup",
        "rsc",
        "swad",
        "lpa(site=stage1)",
        "lpa(site=stage1)+swad",
        "pcgrad(groups=domains)",
    ]
    command = ["--data", data, *QUICK, "--out", str(tmp_path)]
    domains.main([*command, "--methods", ", ".join(methods[:6]), "--seeds", "1"])
    said = capsys.readouterr().out
    assert "18 of 18 runs trained, 6 compiled steps" in said
    first = found(tmp_path)
    domains.main([*command, "--methods", ", ".join(methods), "--seeds", "1"])
    said = capsys.readouterr().out
    assert "9 of 27 runs trained, 3 compiled steps" in said
    assert "note: lpa(site=stage1) is lpa(site=stage1, split=all): all classes are raised" in said
    assert "training-domain validation" in " ".join(said.split())
    second = found(tmp_path)
    assert list(second["methods"]) == methods and second["held_out"] == ["art", "photo", "sketch"]
    for typed in methods[:6]:
        assert second["methods"][typed] == first["methods"][typed]
    for typed, entry in second["methods"].items():
        accuracies = [entry["domains"][name]["mean"] for name in second["held_out"]]
        assert entry["mean"]["mean"] == pytest.approx(np.mean(accuracies)) and 0 <= min(accuracies) <= max(accuracies) <= 1
        for run in entry["runs"]:
            assert run["sizes"] == {"train": 72, "validation": 18, "test": 36}
            if "swad" in typed:
                assert run["window"][1] <= 6 and run["step"] is None
            else:
                curve = run["curve"]
                best = int(np.argmax(curve["validation_accuracy"]))
                assert (run["step"], run["validation_accuracy"]) == (curve["step"][best], curve["validation_accuracy"][best])
                assert curve["step"] == [2, 4, 6]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert (
        table[0] == "| method | art | photo | sketch | mean |"
        and table[2].startswith("| erm | ")
        and len(table[2].split("|")) == 7
    )


def test_one_compiled_step_serves_all_left_out_domains_and_seeds(data, tmp_path, capsys):
    """And swad is plain training up to its average: ERM's curve."""
    settings = plan.DomainsSettings(
        data=data, model="mlp", width=4, steps=6, batch_size=6, evaluate_every=2, methods="swad, erm"
    )
    methods, _ = plan.parse_methods(settings)
    whole = pooled(shared.load_view(settings, 0))
    steps = [compiled_step(plan.recipe_of(settings, whole, method)) for method, _ in methods.values()]
    before = [step._cache_size() for step in steps]
    arguments = ["--data", data, *QUICK, "--methods", "swad, erm", "--seeds", "2", "--out", str(tmp_path)]
    domains.main(arguments)
    said = capsys.readouterr().out
    assert "12 of 12 runs trained, 2 compiled steps" in said and said.count("weights of steps") == 6
    # Not more than one; less if JAX's own cache, which all tests of this process share, has dropped it since.
    assert all(step._cache_size() <= max(size, 1) for step, size in zip(steps, before, strict=True))
    swad, erm = (found(tmp_path)["methods"][name] for name in ("swad", "erm"))
    for one, other in zip(swad["runs"], erm["runs"], strict=True):
        assert one["sizes"] == {"train": 72, "validation": 18, "test": 36} and one["step"] is None
        curve, ends = other["curve"], one["window"]
        best = int(np.argmax(curve["validation_accuracy"]))
        assert curve["step"] == [2, 4, 6] and other["step"] == curve["step"][best] and ends[0] < ends[1] <= 6
        np.testing.assert_allclose(one["curve"]["loss"], other["curve"]["loss"], rtol=1e-5)
    domains.main(arguments)
    assert "0 of 12 runs trained, 0 compiled steps" in capsys.readouterr().out
    assert found(tmp_path)["methods"]["swad"] == swad
    assert len(erm["domains"]["art"]["values"]) == 2 and "±" in (tmp_path / "table.md").read_text()


def test_c_uat_over_domains_and_manifold_mixup_run(data, tmp_path):
    methods = ["cuat(groups=domain)", "manifold_mixup"]
    command = ["--data", data, *QUICK, "--steps", "4", "--seeds", "1", "--held-out", "art", "--out", str(tmp_path)]
    domains.main([*command, "--methods", ", ".join(methods)])
    entries = found(tmp_path)["methods"]
    uat, mixup = (entries[typed]["runs"][0]["curve"] for typed in methods)
    assert uat["step"] == mixup["step"] == [2, 4] and np.isfinite([uat["loss"], mixup["loss"]]).all()
    assert uat["metrics"] == {"cuat/inner_evaluations": [0, 0]} and mixup["metrics"] == {}


def test_the_metrics_of_methods_are_in_the_curve(data, tmp_path, capsys):
    """Each the mean over the steps since the evaluation before: those of single steps give those of pairs."""
    typed, curves = "lpa(site=[stage1, stage2])", []
    command = ["--data", data, *QUICK, "--steps", "4", "--seeds", "1", "--held-out", "art", "--methods", typed]
    for every in ("1", "2"):
        domains.main([*command, "--evaluate-every", every, "--out", str(tmp_path / every)])
        curves.append(found(tmp_path / every)["methods"][typed]["runs"][0]["curve"])
    single, pairs = curves
    assert single["step"] == [1, 2, 3, 4] and {"lpa/site", "lpa/inner_evaluations"} < single["metrics"].keys()
    for name, values in single["metrics"].items():
        np.testing.assert_allclose(pairs["metrics"][name], np.reshape(values, (2, 2)).mean(1), rtol=1e-6, err_msg=name)
    assert f"\n{typed}  " in capsys.readouterr().out  # the table's brackets are no markup


def test_sites_are_compared_when_an_epoch_begins(data):
    """An epoch of what is trained on, not of all samples with the left-out domain's, whose number tables by sample need."""
    settings = plan.DomainsSettings(
        data=data, model="mlp", width=4, steps=40, batch_size=6, methods="lpa(site=[stage1, stage2])"
    )
    [(method, numbers)] = plan.parse_methods(settings)[0].values()
    whole = pooled(shared.load_view(settings, 0))
    recipe = plan.recipe_of(settings, whole, method)
    context = build(recipe, shared.make_numbers(settings, numbers), whole.class_counts)[0].context
    due = [step for step in range(40) if comparing(context._replace(batch_size=recipe.batch_size, where=Where(step=step)), 1)]
    assert due == list(range(0, 40, 6)) and recipe.steps_per_epoch == 6  # 80 % of 2 · 45 samples in batches of 12
    assert context.num_examples == 135


@pytest.mark.parametrize("freeze", [(), ("stage1",)], ids=["all trained", "stage1 frozen"])
def test_statistics_of_averaged_weights_are_their_mean_over_batches_wherever_they_start(data, freeze):
    settings = plan.DomainsSettings(data=data, model="cnn", width=2, steps=3, batch_size=6, augment=False, freeze=freeze)
    [(method, numbers)] = plan.parse_methods(dataclasses.replace(settings, methods="swad"))[0].values()
    whole = pooled(shared.load_view(settings, 0))
    recipe, split = plan.recipe_of(settings, whole, method), split_domains(whole, 0, seed=0)
    state = init_state(recipe, shared.make_numbers(settings, numbers), plan.sample(whole), 0)
    far = state._replace(stats=jax.tree.map(lambda x: 1e4 + 7 * x, state.stats))
    frozen = lambda stats: stats["stage1"] if freeze else {}
    if freeze:  # what is frozen runs on its own statistics
        far.stats["stage1"] = state.stats["stage1"]
    ours, other = (
        training.with_statistics(recipe, s, training.on_device(whole), split, settings, 0).stats for s in (state, far)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, other)
    jax.tree.map(np.testing.assert_array_equal, frozen(ours), frozen(state.stats))

    @jax.jit
    def of_batch(images):
        """What a pass leaves of zeros and of ones tells the batch's own statistics, whatever the momentum."""
        put = lambda number: (
            jax.tree.map(lambda x: jnp.full_like(x, number), state.stats)
            | ({"stage1": state.stats["stage1"]} if freeze else {})
        )
        run = lambda stats: recipe.model.apply(
            {"params": state.params, "batch_stats": stats}, pixels(images), train=True, mutable=["batch_stats"]
        )
        zero, one = (run(put(number))[1]["batch_stats"] for number in (0.0, 1.0))
        return jax.tree.map(lambda a, b: a / (1 - (b - a)), zero, one)

    batches = list(itertools.islice(domain_batches(split.train, 6, seed=0), 3))
    per_batch = [of_batch(jnp.asarray(whole.train_images[rows])) for rows in batches]
    mean = jax.tree.map(lambda *x: sum(x) / 3, *per_batch)
    trained = lambda stats: {site: part for site, part in stats.items() if site not in freeze}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, trained(ours), trained(mean))


def test_it_learns_what_the_domains_share(tmp_path):
    """The row of light gives the class in every domain; the numbers of a run are those of its seed alone."""
    out = tmp_path / "out"
    file = write(tmp_path / "TINY.npz")
    command = [
        "--data",
        file,
        "--model",
        "mlp",
        "--width",
        "16",
        "--steps",
        "60",
        "--evaluate-every",
        "20",
        "--methods",
        "erm",
        "--augment",
        "False",
    ]
    domains.main(
        [*command, "--batch-size", "12", "--learning-rate", "0.01", "--seeds", "1", "--held-out", "photo", "--out", str(out)]
    )
    entry = found(out)["methods"]["erm"]
    assert list(entry["domains"]) == ["photo"] and entry["mean"]["mean"] > 0.8
    [run] = entry["runs"]
    split = split_domains(pooled(shared.load_view(plan.DomainsSettings(data=file), 0)), 1, seed=0)
    assert run["sizes"]["test"] == len(split.test)


def test_a_method_that_diverges_takes_no_other_down(data, tmp_path, capsys):
    flags = ["--data", data, *QUICK, "--optimizer", "sgd", "--seeds", "2", "--held-out", "art", "--out", str(tmp_path)]
    with pytest.raises(
        FloatingPointError, match="(?s)bound=1e30.*, without art, seed 0: .*results are those of the other methods"
    ):
        domains.main([*flags, "--methods", "lpg(split=all, bound=1e30), erm"])
    assert list(found(tmp_path)["methods"]) == ["erm"] and "2 of 4 runs trained" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (dict(domains=1), [], r"pooled needs at least 2 domains in TINY, got 1 \(art\)"),
        (dict(domains=2), ["--methods", "erm, coral"], "coral: coral needs at least 2 training domains, got 1"),
        ({}, ["--methods", "erm, corall"], "corall"),
        ({}, ["--methods", "erm, erm"], "every method once, got 'erm' twice"),
        ({}, ["--methods", "coral(weight=-1)"], "coral needs weight >= 0, got -1"),
        ({}, ["--held-out", "foto"], "got 'foto'. Did you mean 'photo'"),
        ({}, ["--batch-size", "60"], "a batch of 1 to 36 samples of each domain"),
        ({}, ["--epochs", "3"], "--epochs is not for domains.py, got 3. Leave it out; --steps is the length."),
        ({}, ["--recipe", "ldam"], "--recipe is not for domains.py, got 'ldam'"),
        ({}, ["--model", "bilstm"], "--model needs a model of images for domains.py, got 'bilstm'. Write --model cnn."),
        ({}, ["--steps", "0"], "--steps needs steps >= 1, got 0"),
        ({}, ["--evaluate-every", "9"], "--evaluate-every needs 1 <= evaluate_every <= 6, got 9"),
        ({}, ["--view", "leave_out(art)"], "pooled needs TINY without a validation set"),
        ({}, ["--coordinator", "localhost:1", "--num-processes", "2"], "domains.py needs one process, got --coordinator localhost:1"),
        ({}, ["--methods", "pcgrad(groups=20)"], r"pcgrad\(groups=20\): pcgrad needs at most 3 groups"),
        ({}, ["--methods", "coral(weight=[1, 2])"], r"coral\(weight=\[1, 2\]\): "),
        ({}, ["--optimizer", "sgd", "--learning-rate", "1e20"], "erm, without art, seed 0: training needs finite losses"),
        (dict(keep=lambda y, d: (y != 2) | (d == 1)), ["--allow-missing-classes"], "every class without the domain 'photo', got none of 'z'"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, changes, flags, message):
    file = write(tmp_path / "TINY.npz", **changes)
    with pytest.raises(ValueError if "finite" not in message else FloatingPointError, match=message):
        domains.main(["--data", file, "--methods", "erm", *QUICK, "--seeds", "1", "--out", str(tmp_path / "out"), *flags])


def test_thinning_draws_from_all_samples_those_of_the_files_test_part_too(tmp_path):
    """With the other views as before; the run has the samples that the table of the data counts."""
    file = write(tmp_path / "TINY.npz")
    settings = plan.DomainsSettings(data=file, view="thin(20)+shrink(4)")
    few, all_ = plan.load_pooled(settings), plan.load_pooled(dataclasses.replace(settings, view="none"))
    assert len(all_.train_labels) == 135 and few.class_counts.tolist() == [20, 20, 20] and few.image_shape == (4, 4, 3)
    assert [view.split("(")[0] for view in few.views] == ["shrink", "thin"]
    domains.main(["--data", file, "--view", "thin(20)", "--methods", "erm", *QUICK[:4], "--model", "mlp", "--width", "4",
                  "--batch-size", "3", "--seeds", "1", "--held-out", "art", "--out", str(tmp_path / "out")])  # fmt: skip
    [run] = found(tmp_path / "out")["methods"]["erm"]["runs"]
    assert found(tmp_path / "out")["data"]["samples"] == 60 and sum(run["sizes"].values()) <= 60


def test_data_without_domains():
    with pytest.raises(ValueError, match="pooled needs domains of all samples of digits, got none. Give a folder"):
        domains.main(["--data", "digits", "--methods", "erm", *QUICK])


def test_a_class_that_a_domain_lacks_is_an_error_or_a_note(tmp_path, capsys):
    file = write(tmp_path / "TINY.npz", keep=lambda y, d: (y != 2) | (d != 1))
    flags = ["--data", file, "--methods", "erm", *QUICK, "--seeds", "1", "--held-out", "art", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="The domain 'photo' has no samples of 'z'. Write --allow-missing-classes to go on"):
        domains.main(flags)
    assert not (tmp_path / "out").exists()
    domains.main([*flags, "--allow-missing-classes"])
    assert "note: The domain 'photo' has no samples of 'z'." in capsys.readouterr().out


def test_the_other_scripts_refuse_swad(data):
    with pytest.raises(ValueError, match="swad: swad needs validation losses and a window, got a script without them"):
        compare.main(["--data", data, "--view", "none", "--epochs", "1", "--methods", "ce, swad"])


@pytest.mark.slow
def test_the_small_config_runs(data, tmp_path):
    settings = shared.read_config("small_domains")
    small = ["--view", "none", "--model", "mlp", "--width", "4", "--batch-size", "6", "--augment", "False"]
    domains.main(["--config", "small_domains", "--smoke", "--data", data, *small, "--out", str(tmp_path)])
    assert list(found(tmp_path)["methods"]) == [typed for typed, _ in spec.parse_list(settings["methods"])]
