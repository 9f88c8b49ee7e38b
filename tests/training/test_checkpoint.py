"""perturbjax.training.checkpoint: what is read back is what was written, and what damage and full disks do."""

import json
import pathlib
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.training import CheckpointNotWritten, Checkpoints, NewerCheckpoint, load_variables
from perturbjax.training.checkpoint import as_tree, from_tree
from perturbjax.training.devices import from_host, to_host


class State(NamedTuple):
    params: dict
    opt_state: tuple
    key: jax.Array


def state(seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": {"c": jnp.bfloat16(1.5 + seed), "none": np.zeros((0, 2))}}
    return State(params, (np.int32(seed), (), {"t": rng.normal(size=5)}), jax.random.split(jax.random.key(seed), 2))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        data = lambda z: jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z
        np.testing.assert_array_equal(data(x), data(y))


def write(folder, steps=(1, 2, 3)):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, to_host(state(step)), {"seconds": 0.1 * step})


def read(folder, said=None):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(to_host(state()), (lambda text: None) if said is None else said.append)


def test_what_is_read_back_is_what_was_written(tmp_path):
    write(tmp_path)
    step, found, progress = read(tmp_path)
    assert step == 3 and progress["seconds"] == 0.1 * 3
    assert_equal(from_host(found, state()), state(3))


def test_the_newest_two_are_kept_and_a_step_is_written_once(tmp_path):
    write(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, to_host(state(9)), {})
        assert checkpoints.latest == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    assert_equal(from_host(read(tmp_path)[1], state()), state(3))


def test_an_empty_folder_has_none(tmp_path):
    assert read(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="Train first"):
        (tmp_path / "checkpoints").mkdir()
        load_variables(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        load_variables(tmp_path / "nowhere")


def test_a_comparison_s_folder_says_where_its_runs_are(tmp_path):
    for seed in (1, 0):
        (tmp_path / "runs" / "ce-1a2b" / f"seed-{seed}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Give it '.*ce-1a2b.seed-0' or another run below"):
        load_variables(tmp_path)
    with pytest.raises(FileNotFoundError, match="Give it train.py's --out, compare.py's OUT/runs/METHOD-xxxx/seed-0"):
        load_variables(tmp_path / "runs")


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "no metadata", "progress"])
def test_a_damaged_newest_one_is_put_aside_and_the_one_before_taken(tmp_path, damage):
    write(tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "3"
    if damage == "flipped byte":
        for file in (newest / "state").rglob("d/*"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
    elif damage == "cut":
        for file in (newest / "state").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    elif damage == "no metadata":
        (newest / "state" / "_METADATA").write_bytes(b"\xff\xfe")
    else:
        (newest / "progress" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match=r"checkpoint 3 in '.*' is damaged \(.*\): the one before it is taken"):
        before = load_variables(tmp_path)["params"]  # which only looks
    np.testing.assert_array_equal(jax.tree.leaves(before)[0], jax.tree.leaves(state(2).params)[0])
    assert newest.is_dir()
    said = []
    step, found, _ = read(tmp_path / "checkpoints", said)
    assert step == 2
    assert_equal(from_host(found, state()), state(2))
    [line] = said
    assert line.startswith("checkpoint 3 is damaged") and "damaged-3" in line and "\n" not in line
    assert (tmp_path / "damaged-3").is_dir()
    write(tmp_path / "checkpoints", steps=[3])  # and the step can be written again
    assert read(tmp_path / "checkpoints")[0] == 3


def test_one_of_a_newer_version_is_refused(tmp_path):
    write(tmp_path)
    file = tmp_path / "3" / "progress" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(NewerCheckpoint, match="got 99 .* a newer perturbjax wrote it. Install that version"):
        read(tmp_path)
    assert (tmp_path / "3").is_dir()


def test_one_of_another_structure_is_refused_and_left_alone(tmp_path):
    write(tmp_path)
    other = to_host(state())._replace(params={"a": np.zeros((3, 5), np.float32)})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="same structure, got 2 differences"):
        checkpoints.restore(other)
    assert (tmp_path / "3").is_dir()


def test_trees_are_plain_dictionaries_by_path():
    tree = as_tree(state())
    assert set(tree) == {"params", "opt_state", "key"} and set(tree["opt_state"]) == {"0", "2"}
    assert_equal(from_tree(tree, state()), state())


@pytest.mark.parametrize("limit", [30_000, 300_000])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path, limit):
    """A limit on the size of files stands for the full disk: the write fails with an OSError half-way."""
    write(tmp_path, steps=[1])
    program = textwrap.dedent(f"""
        import pathlib, resource
        import numpy as np
        from perturbjax.training import CheckpointNotWritten, Checkpoints
        checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            checkpoints.save(2, {{"x": np.random.default_rng(0).normal(size=200_000)}}, {{}})
            checkpoints.wait()
        except CheckpointNotWritten as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "needs room and permission" in done.stdout and "The checkpoint of step 1 is kept" in done.stdout, done.stderr[-2000:]
    assert read(tmp_path)[0] == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotWritten, match="folder that can be written"):
        Checkpoints(pathlib.Path(tmp_path / "file" / "checkpoints"))


def test_every_flipped_bit_is_noticed(tmp_path):
    """In the arrays' own bytes, which Orbax reads without a check."""
    rng = np.random.default_rng(0)
    big = {"x": rng.normal(size=4000)}
    for trial in range(5):
        folder = tmp_path / str(trial)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, big, {})
        file = biggest(folder)
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data) // 4, len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(big, lambda text: None)
            assert found is None or np.array_equal(found[1]["x"], big["x"])
