"""Another net as a teacher: one that a run of ours left in its folder, or anyone's own function and variables.

Its variables go into the state of the link that asks it, so that no array is a constant of the compiled step.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perturbjax.classes import wide

VIRTUAL = "virtual"
VIRTUAL_CONFIDENCE = 0.9


class Teacher(NamedTuple):
    """A net that is not trained any more."""

    apply: Callable[[Any, jax.Array], jax.Array]  # (variables, inputs [B, ...]) -> logits [B, C]
    variables: Any


def load_teacher(folder: str | os.PathLike) -> Teacher:
    """The net of a run's newest checkpoint, in evaluation mode.

    Raises ValueError for a folder without model.json, FileNotFoundError for one without a checkpoint.
    """
    # The only file of a method that reaches for models and the trainer: inside its functions, so that its import needs neither.
    from perturbjax.training.checkpoint import load_variables

    apply = _function(str(folder))
    variables = {name: tree for name, tree in load_variables(folder).items() if jax.tree.leaves(tree)}
    return Teacher(apply, variables)


def teacher_logits(teacher: str | Teacher, variables: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Its logits [B, C], constants for the gradient with respect to the variables.

    "virtual" is the teacher of teacher-free distillation (Yuan et al., CVPR 2020): 0.9 for the label, the rest for all others alike.
    """
    if teacher == VIRTUAL:
        others = (1 - VIRTUAL_CONFIDENCE) / (targets.shape[-1] - 1)
        return jnp.log(others + (VIRTUAL_CONFIDENCE - others) * jax.lax.stop_gradient(targets))
    run = teacher.apply if isinstance(teacher, Teacher) else _function(teacher)
    return wide(run(jax.lax.stop_gradient(variables), inputs))


def teacher_variables(method: str, teacher: str | Teacher, input_shape: tuple[int, ...], num_classes: int) -> Any:
    """What to keep in a link's state: () for the virtual teacher.

    Raises ValueError for a teacher of another number of classes, or one that can't take inputs of this shape.
    """
    if teacher == VIRTUAL:
        return ()
    found = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
    variables = jax.tree.map(jnp.asarray, found.variables)
    name = "its function" if isinstance(teacher, Teacher) else repr(teacher)
    try:
        out = _shape_of_logits(found.apply, variables, input_shape)
    except Exception as error:
        raise ValueError(
            f"{method} needs a teacher for inputs {input_shape}, got {name}, which doesn't take them: {error}"
        ) from error
    if out != (input_shape[0], num_classes):
        raise ValueError(
            f"{method} needs a teacher of {num_classes} classes, logits {(input_shape[0], num_classes)}, got {out} from {name}. "
            "Train one on the same classes."
        )
    return variables


def _shape_of_logits(apply: Callable, variables: Any, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """For floating inputs (images), or else for integers (words): a link's init knows their shape only."""
    failed = []
    for dtype in dict.fromkeys((jnp.result_type(float), jnp.dtype("float32"), jnp.dtype("int32"))):
        try:
            return jax.eval_shape(apply, variables, jax.ShapeDtypeStruct(input_shape, dtype)).shape
        except Exception as error:  # whatever a model says of inputs or variables that are not its own
            failed.append(error)
    raise failed[0]


def check_teacher(method: str, teacher: str | Teacher) -> None:
    """Raises ValueError unless it is "virtual", a Teacher or the folder of a run that says what its model is (no reading of arrays)."""
    if isinstance(teacher, Teacher) or teacher == VIRTUAL:
        return
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f'{method} needs teacher to be the folder of a run, "virtual" or a Teacher, got {teacher!r}.')
    if not pathlib.Path(teacher).is_dir():
        raise ValueError(
            f"{method} needs teacher to be the folder of a run, got {str(teacher)!r}, which isn't there. "
            f'Train one with train.py --out FOLDER and write {method}(teacher="FOLDER").'
        )
    _function(str(teacher))


def _function(folder: str) -> Callable[[Any, jax.Array], jax.Array]:
    from perturbjax.training.folder import MODEL

    file = pathlib.Path(folder) / MODEL
    if not file.is_file():
        raise ValueError(
            f"load_teacher needs a folder with model.json, which says what net its checkpoints are of, got {str(folder)!r}. "
            "Give the folder of one run; those of older versions have none: train it again."
        )
    return _from_text(file.read_text())


@functools.cache
def _from_text(text: str) -> Callable[[Any, jax.Array], jax.Array]:
    from perturbjax.models.describe import from_description

    model: Any = from_description(json.loads(text))
    return lambda variables, inputs: model.apply(variables, inputs, train=False)
