"""perturbjax.loss.teacher: the net of a run's folder, anyone's own, and folders and class counts that don't fit."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.models import create
from perturbjax.models.describe import describe
from perturbjax.training import Checkpoints

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 4, 4, 1)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 1])


class State(NamedTuple):
    """The part of a run's state that matters here."""

    params: dict
    stats: dict


def run_folder(folder: pathlib.Path, num_classes: int = 3, name: str = "cnn"):
    """What a run leaves behind: (model, variables)."""
    model = create(name, num_classes=num_classes, mean=(0.5,), std=(0.3,), width=4)
    variables = jax.tree.map(np.asarray, dict(model.init(jax.random.key(1), IMAGES)))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(5, State(variables["params"], variables.get("batch_stats", {})), {"seconds": 1.0})
    (folder / "model.json").write_text(json.dumps(describe(model)))
    return model, variables


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return folder, *run_folder(folder)


def student(links):
    model = create("mlp", num_classes=3, mean=(0.5,), std=(0.3,), width=8)
    made = pj.objective(model, links, num_classes=3)
    params = model.init(jax.random.key(0), IMAGES)["params"]
    return made, params, made.init(params, IMAGES)


def test_it_is_the_net_of_the_newest_checkpoint_in_evaluation_mode(cnn):
    folder, model, variables = cnn
    teacher = pj.load_teacher(folder)
    np.testing.assert_array_equal(teacher.apply(teacher.variables, IMAGES), model.apply(variables, IMAGES, train=False))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_folder_gives_what_its_function_and_variables_give(tmp_path, name):
    model, variables = run_folder(tmp_path, name=name)
    own = pj.Teacher(lambda v, x: model.apply(v, x, train=False), variables)
    losses = []
    for teacher in (str(tmp_path), own):
        made, params, states = student(pj.kd(teacher=teacher))
        losses.append(jax.jit(lambda p, s, made=made: made(p, s, pj.batch(IMAGES, LABELS))[1].losses)(params, states))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_its_variables_are_state_and_stay_as_they_are(cnn):
    folder, _, variables = cnn
    made, params, states = student(pj.kd(teacher=str(folder)))
    _, out = made(params, states, pj.batch(IMAGES, LABELS))
    for found in (states, out.states):
        jax.tree.map(np.testing.assert_array_equal, found[0].teacher, variables)
    # No array of the teacher is a constant of the program.
    program = jax.make_jaxpr(lambda p, s: made(p, s, pj.batch(IMAGES, LABELS))[0])(params, states)
    assert sum(np.size(c) for c in program.consts) < 100


def test_it_is_found_by_its_folder_on_the_command_line(cnn):
    from perturbjax import spec, taxonomy

    [[typed, chain]] = spec.parse_list(f'kd(teacher="{cnn[0]}", weight=0.25)')
    structure, numbers = spec.split_numbers(chain, taxonomy.registry(), taxonomy.helpers())
    assert numbers == (0.25, 4.0) and hash(structure)
    [made] = spec.build(structure, numbers, taxonomy.registry(), taxonomy.helpers())
    assert len(made) == 2


def test_a_teacher_of_another_class_count_is_an_error(tmp_path):
    run_folder(tmp_path, num_classes=7)
    for make in (pj.kd, pj.akd):
        with pytest.raises(ValueError, match=rf"{make.__name__} needs a teacher of 3 classes, logits \(4, 3\), got \(4, 7\)"):
            student(make(teacher=str(tmp_path)))
    own = pj.Teacher(lambda v, x: jnp.zeros([x.shape[0], 2]), ())
    with pytest.raises(ValueError, match=r"got \(4, 2\) from its function"):
        student(pj.kd(teacher=own))


def test_a_teacher_for_other_inputs_is_an_error(cnn):
    model = create("mlp", num_classes=3, mean=(0.5,) * 3, std=(0.3,) * 3, width=8)
    images = jnp.ones([2, 8, 8, 3])
    made = pj.objective(model, pj.kd(teacher=str(cnn[0])), num_classes=3)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    with pytest.raises(ValueError, match=r"kd needs a teacher for inputs \(2, 8, 8, 3\), got .*CNN needs pixels"):
        made.init(params, images)


def test_variables_of_another_net_are_an_error(cnn, tmp_path):
    run_folder(tmp_path, name="mlp")
    (tmp_path / "model.json").write_text((cnn[0] / "model.json").read_text())
    with pytest.raises(ValueError, match=r"kd needs a teacher for inputs \(4, 4, 4, 1\)"):
        student(pj.kd(teacher=str(tmp_path)))


def test_folders_that_are_none_are_errors(tmp_path):
    with pytest.raises(ValueError, match="kd needs teacher to be the folder of a run, got 'nowhere', which isn't there"):
        pj.kd(teacher="nowhere")
    with pytest.raises(ValueError, match="load_teacher needs a folder with model.json"):
        pj.akd(teacher=str(tmp_path))
    with pytest.raises(ValueError, match='kd needs teacher to be the folder of a run, "virtual" or a Teacher, got 3'):
        pj.kd(teacher=3)
    model = create("mlp", num_classes=3, mean=(0.5,), std=(0.3,))
    (tmp_path / "model.json").write_text(json.dumps(describe(model)))
    with pytest.raises(FileNotFoundError, match="load_variables needs the folder of a run"):
        student(pj.kd(teacher=str(tmp_path)))
