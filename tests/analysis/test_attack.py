"""perturbjax.analysis.attack: closed forms of linear nets, limits, invariances, and --attack from the command line to the report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from experiments import compare, train
from perturbjax.analysis import attack as pa

RNG = np.random.default_rng(0)
N, SIDE, C = 60, 3, 3
IMAGES = RNG.uniform(0.3, 0.7, (N, SIDE, SIDE)).astype(np.float32)
PAIR = RNG.normal(size=(SIDE * SIDE, 2)).astype(np.float32)  # a linear net of two classes
PAIR -= PAIR.mean(0) + (PAIR[:, :1] - PAIR[:, 1:]).mean() / 2 * np.array([[1, -1]], np.float32)  # grey images lie on the border
BOTH = (IMAGES.reshape(N, -1) @ PAIR).argmax(1)
BOTH[::10] = 1 - BOTH[::10]  # and is wrong on every tenth
HIDDEN = {"a": RNG.normal(size=(SIDE * SIDE, 16)).astype(np.float32), "b": RNG.normal(size=(16, C)).astype(np.float32)}
SETTINGS = dict(bound=0.05, num_steps=3)


def linear(x):
    return x.reshape(x.shape[0], -1) @ PAIR


def mlp(w, x):
    return jnp.tanh(2 * (x - 0.5).reshape(x.shape[0], -1) @ w["a"]) @ w["b"]


NET = pj.Teacher(mlp, HIDDEN)
LABELS = (np.asarray(mlp(HIDDEN, IMAGES)).argmax(1) + (np.arange(N) % 5 == 0)) % C  # a fifth of them wrong


def worst_case(bound, norm):
    """A linear net's margin under the worst delta of the ball: m − ε‖w_y − w_j‖ in the dual norm."""
    way = (PAIR[:, 0] - PAIR[:, 1]).astype(np.float64)
    margin = np.where(BOTH == 0, 1, -1) * (IMAGES.reshape(N, -1).astype(np.float64) @ way)
    return margin - bound * {"linf": np.abs(way).sum(), "l2": np.linalg.norm(way), "l1": np.abs(way).max()}[norm]


@pytest.mark.parametrize("norm, bound", [("linf", 0.02), ("linf", 0.06), ("l2", 0.05), ("l2", 0.15)])
def test_of_a_linear_net_enough_steps_find_the_worst_case(norm, bound):
    left = worst_case(bound, norm)
    assert np.abs(left).min() > 1e-4 and 0.1 < (left > 0).mean() < 0.9
    found = pa.attacked_accuracy(linear, IMAGES, BOTH, bound=bound, norm=norm, num_steps=40)
    assert found == pytest.approx((left > 0).mean(), abs=1e-9)


def test_by_class_the_universal_delta_of_a_linear_net_is_the_worst_case_too():
    """All samples of a class of two pull the same way; and one delta for both classes can't do as much."""
    delta = pa.universal_delta(linear, IMAGES, BOTH, bound=0.06, epochs=3, groups=BOTH, num_groups=2, batch_size=16)
    way = np.sign(PAIR[:, 0] - PAIR[:, 1]).reshape(SIDE, SIDE)
    np.testing.assert_allclose(delta, 0.06 * np.stack([-way, way]), atol=1e-6)
    by_class = pa.universal_accuracy(linear, IMAGES, BOTH, delta, groups=BOTH)
    assert by_class == pytest.approx((worst_case(0.06, "linf") > 0).mean(), abs=1e-9)
    one = pa.universal_delta(linear, IMAGES, BOTH, bound=0.06, epochs=3, batch_size=16)
    assert by_class < pa.universal_accuracy(linear, IMAGES, BOTH, one) < pa.clean_accuracy(linear, IMAGES, BOTH)


def test_accuracy_falls_with_the_bound_from_the_clean_one():
    clean = pa.clean_accuracy(NET, IMAGES, LABELS)
    assert clean == pytest.approx(0.8)
    found = [pa.attacked_accuracy(NET, IMAGES, LABELS, bound=b, num_steps=5) for b in (0.0, 0.01, 0.03, 0.1)]
    assert found[0] == clean and found == sorted(found, reverse=True) and found[-1] < 0.5 * clean
    delta = pa.universal_delta(NET, IMAGES, LABELS, bound=0.1, batch_size=20)
    assert np.abs(delta).max() <= 0.1 + 1e-7 and pa.universal_accuracy(NET, IMAGES, LABELS, delta) <= clean
    assert pa.universal_accuracy(NET, IMAGES, LABELS, 0 * delta) == clean


def test_moved_images_stay_within_the_ball_and_the_range():
    """What the net is shown, seen by a net that looks."""
    seen = []

    def net(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return mlp(HIDDEN, x)

    images = np.clip(RNG.uniform(-0.3, 1.3, (N, SIDE, SIDE)), 0, 1).astype(np.float32)
    pa.attacked_accuracy(net, images, LABELS, bound=0.1, num_steps=3)
    jax.effects_barrier()
    gaps = [np.abs(x - images).max() for x in seen]
    assert (
        max(gaps) == pytest.approx(0.1, abs=1e-5)
        and min(x.min() for x in seen) >= -1e-6
        and max(x.max() for x in seen) <= 1 + 1e-6
    )


def test_batches_dtypes_and_the_form_of_the_net_change_nothing():
    grey = np.round(255 * IMAGES).astype(np.uint8)
    as_floats = grey.astype(np.float32) / np.float32(255)
    one = pa.attacked_accuracy(NET, as_floats, LABELS, **SETTINGS)
    assert pa.attacked_accuracy(NET, grey, LABELS, **SETTINGS) == one
    assert pa.attacked_accuracy(NET, as_floats, LABELS, batch_size=7, **SETTINGS) == one  # the last batch is filled up
    assert pa.attacked_accuracy(lambda x: mlp(HIDDEN, x), as_floats, LABELS, **SETTINGS) == one


def test_one_program_serves_all_nets_bounds_and_numbers_of_steps():
    traces = []

    def counted(w, x):
        traces.append(1)
        return mlp(w, x)

    accuracies = []
    for factor in (1.0, 0.5, 2.0):
        net = pj.Teacher(counted, jax.tree.map(lambda x, f=factor: f * x, HIDDEN))
        accuracies.append(pa.attacked_accuracy(net, IMAGES, LABELS, bound=0.03 * factor, num_steps=int(4 * factor)))
        if factor == 1.0:
            first = len(traces)
    assert len(traces) == first and len(set(accuracies)) > 1


def test_attacks_are_read_as_typed():
    found = pa.parse_attacks("pgd(8/255, 10), universal(bound=0.1), class_universal, pgd(norm=l2, bound=0.5)")
    assert list(found) == ["pgd(8/255, 10)", "universal(bound=0.1)", "class_universal", "pgd(norm=l2, bound=0.5)"]
    assert found["pgd(8/255, 10)"] == pa.PGD(bound=8 / 255, num_steps=10) and found["universal(bound=0.1)"] == pa.Universal(
        bound=0.1
    )
    assert found["class_universal"].by_class and pa.parse_attacks("none") == pa.parse_attacks("") == {}
    data = pa.AttackData(IMAGES, LABELS, IMAGES, LABELS, C)
    of = {
        typed: one.accuracy(NET, data)
        for typed, one in pa.parse_attacks("pgd(0.05), universal(0.05), class_universal(0.05)").items()
    }
    assert of["pgd(0.05)"] <= of["class_universal(0.05)"] <= of["universal(0.05)"] <= pa.clean_accuracy(NET, IMAGES, LABELS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("pdg", r"a spec needs a known name \(pgd, universal or class_universal\), got pdg. Write pgd."),
        ("pgd(bond=0.1)", r"got bond=0.1. Write pgd\(bound=0.1\)"),
        (
            "pgd(bound=8)",
            r"pgd needs bound <= 1, got 8: the inputs are in \[0, 1\]. Write bound=8/255 if you count in grey levels.$",
        ),
        ("universal(bound=8)", r"universal needs bound <= 1, got 8"),
        ("pgd(norm=l3)", r"pgd needs norm to be l2, linf or l1, got l3"),
        ("pgd(num_steps=0)", r"pgd needs num_steps >= 1, got 0"),
        ("pgd+universal", r"--attack needs attacks separated by commas, got 'pgd\+universal'. Write pgd, universal."),
        ("pgd, pgd", r"--attack needs every attack once, got 'pgd' twice"),
    ],
)
def test_bad_attacks_are_errors_that_say_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        pa.parse_attacks(text)


def test_bad_images_are_errors_that_say_what_to_write():
    with pytest.raises(
        ValueError, match=r"attacked_accuracy needs pixels in \[0, 1\], got values from .* to 17.*. Write images / 255"
    ):
        pa.attacked_accuracy(linear, 255 * IMAGES, BOTH)
    with pytest.raises(
        ValueError, match="attacked_accuracy needs images, float in .* or uint8, got int32. Words can't be moved"
    ):
        pa.attacked_accuracy(linear, IMAGES.astype(np.int32), BOTH)
    with pytest.raises(ValueError, match="needs one label for each of at least one image, got 60 images and 59 labels"):
        pa.clean_accuracy(linear, IMAGES, BOTH[:-1])
    for labels, got in ((BOTH.astype(float), "dtype float64. Write labels.astype"), (BOTH - 1, "-1. Drop those below 0")):
        with pytest.raises(ValueError, match=f"clean_accuracy needs labels 0, 1, 2, …, got {got}"):
            pa.clean_accuracy(linear, IMAGES, labels)
    with pytest.raises(ValueError, match=r"universal_accuracy needs delta \[G, ...\] for images \(3, 3\), got \(1, 2, 3\)"):
        pa.universal_accuracy(linear, IMAGES, BOTH, np.zeros([1, 2, 3]))
    with pytest.raises(ValueError, match="universal_delta needs labels in 0..1, got 2 at position"):
        pa.universal_delta(linear, IMAGES, BOTH, groups=2 * BOTH, num_groups=2)


QUICK = ["--epochs", "2", "--batch-size", "32", "--cost-rounds", "0"]
ATTACKS = "pgd(bound=0.1, num_steps=3), pgd(bound=0.2, num_steps=3), universal(bound=0.2, epochs=1)"


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.optax_promotes  # schedules
@pytest.mark.parametrize("vmapped", [False, True])
def test_compare_attacks_its_nets_once_and_shows_what_is_left(tmp_path, monkeypatch, capsys, vmapped):
    command = ["--methods", "ce, uat(bound=0.2)", "--seeds", "2", *QUICK, "--out", str(tmp_path)] + [
        "--vmapped",
        "True",
    ] * vmapped
    compare.main(command)
    before = read(tmp_path)
    assert "attacks" not in before["methods"]["ce"]
    compare.main([*command, "--attack", ATTACKS])  # of runs that are finished
    found = read(tmp_path)
    for typed, entry in found["methods"].items():
        assert entry["accuracy"] == before["methods"][typed]["accuracy"] and list(entry["attacks"]) == list(
            pa.parse_attacks(ATTACKS)
        )
        for number in entry["attacks"].values():
            assert len(number["values"]) == 2 and number["mean"] == pytest.approx(np.mean(number["values"]))
            assert all(0 <= under <= clean for under, clean in zip(number["values"], entry["accuracy"]["values"], strict=True))
        strong = [entry["attacks"][f"pgd(bound={bound}, num_steps=3)"]["mean"] for bound in (0.1, 0.2)]
        assert strong[1] < strong[0] < entry["accuracy"]["mean"]
    table, page = (tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| pgd 1 | pgd 2 | univ. |" in table and "pgd 2: accuracy under pgd(bound=0.2, num_steps=3)" in table
    assert "<small>%, attacked</small>" in page and "under the attack universal(bound=0.2, epochs=1)" in page
    assert "pgd 1" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("attacked again")

    monkeypatch.setattr("experiments.shared.records.load_teacher", never)
    compare.main([*command, "--attack", ATTACKS])
    (tmp_path / "results.json").unlink()
    compare.main([*command, "--attack", ATTACKS])  # from each run's attack.json
    assert {n: e["attacks"] for n, e in read(tmp_path)["methods"].items()} == {
        n: e["attacks"] for n, e in found["methods"].items()
    }


@pytest.mark.optax_promotes  # schedules
def test_train_gives_the_same_number_and_attacks_a_finished_run(tmp_path):
    one = "pgd(bound=0.1, num_steps=2)"
    compare.main(["--methods", "ce", "--seeds", "1", *QUICK, "--attack", one, "--out", str(tmp_path / "many")])
    flags = ["--method", "ce", *QUICK[:4], "--out", str(tmp_path / "one")]
    train.main(flags)
    train.main([*flags, "--attack", one])
    wanted = read(tmp_path / "many")["methods"]["ce"]["attacks"]
    assert read(tmp_path / "one")["methods"]["ce"]["attacks"] == wanted
    train.main(flags)  # without the flag, what is there stays
    assert read(tmp_path / "one")["methods"]["ce"]["attacks"] == wanted


@pytest.mark.optax_promotes  # schedules
def test_another_attack_joins_those_before(tmp_path):
    first, second = "pgd(bound=0.1, num_steps=1)", "pgd(bound=0.2, num_steps=1)"
    for attack in (first, second):
        train.main(["--method", "ce", *QUICK[:4], "--attack", attack, "--out", str(tmp_path)])
    assert list(read(tmp_path)["methods"]["ce"]["attacks"]) == [first, second]


@pytest.mark.optax_promotes
def test_a_bad_attack_ends_the_command_before_training(tmp_path):
    with pytest.raises(ValueError, match="pgd needs bound <= 1, got 8"):
        compare.main(["--methods", "ce", "--attack", "pgd(bound=8)", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
