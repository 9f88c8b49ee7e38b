"""The training loop: epochs of the one jitted step, evaluation after each, and what is reported of a run."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.data import Dataset, epoch_order, evaluation_batches
from perturbjax.training.step import (
    Recipe,
    TrainState,
    as_arrays,
    compiled_logits,
    compiled_plain_losses,
    compiled_step,
    device_data,
    init_state,
    split_methods,
)

EVALUATION_BATCH = 512
_COMPILED: set[tuple[Recipe, int]] = set()


@dataclasses.dataclass
class History:
    """What a run leaves behind."""

    accuracy: list[float]
    """Test accuracy after each epoch, as a fraction."""
    loss: list[float]
    """Mean training loss (perturbed) of each epoch."""
    logits: np.ndarray
    """[N, C] test logits after the last epoch."""
    seconds: float
    """Wall-clock time of the training steps, without compilation and evaluation."""
    gradient_evaluations: float
    """Gradients with respect to the parameters, per step."""
    inner_evaluations: float
    """Gradients with respect to a perturbed value, per step."""
    metrics: dict[str, float]
    """The links' metrics, averaged over the last epoch."""
    losses: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """Plain losses, perturbed losses and labels of training samples at the end; None without perturbations of the loss."""
    state: TrainState


def predict(model, params, stats, images: np.ndarray, *, batch_size: int = EVALUATION_BATCH) -> np.ndarray:
    """Logits [N, C] of images [N, H, W, channels] in evaluation mode; the last batch is padded, which changes no number."""
    run = compiled_logits(model)
    index, mask = evaluation_batches(len(images), min(batch_size, len(images)))
    found = [np.asarray(run(params, stats, jnp.asarray(images[rows]))) for rows in index]
    return np.concatenate(found)[np.asarray(mask).reshape(-1).astype(bool)]


def fit(
    recipe: Recipe,
    dataset: Dataset,
    numbers: dict,
    seed: int,
    *,
    on_epoch: Callable[[int, dict], None] | None = None,
    steps_per_call: int | None = None,
) -> History:
    """Trains one method with one seed.

    Args:
      recipe: structure; numbers: {"method", "learning_rate", "momentum", "weight_decay"}.
      dataset: trained on its training part, evaluated on its test part after each epoch.
      seed: of initialisation, batch order, augmentation and every draw. Methods with the same seed see the same batches.
      on_epoch: called with (epoch, {"loss", "accuracy", ...}) after each epoch.
      steps_per_call: steps in one device call; None: 1 on CPU (a loop around convolutions is slow there), 100 elsewhere.

    Raises:
      FloatingPointError: the loss became nan or infinite; names the epoch.
      ValueError: settings that can't be (before anything compiles).
    """
    data, numbers_on_device = device_data(dataset), as_arrays(numbers)
    state = init_state(recipe, numbers, data, seed)
    step = compiled_step(recipe)
    if steps_per_call is None:
        steps_per_call = 1 if jax.default_backend() == "cpu" else 100
    _compile(step, recipe, state, numbers_on_device, data, steps_per_call)
    accuracy, loss, metrics, seconds = [], [], {}, 0.0
    for epoch in range(recipe.epochs):
        order = epoch_order(recipe.num_examples, recipe.batch_size, seed, epoch)
        started, seen = time.perf_counter(), []
        for first in range(0, len(order), steps_per_call):
            state, found, _ = step(state, numbers_on_device, data, jnp.asarray(order[first : first + steps_per_call]))
            seen.append(found)
        seen = jax.device_get(seen)
        seconds += time.perf_counter() - started
        metrics = {name: float(np.mean(np.concatenate([s[name] for s in seen]))) for name in seen[0]}
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"fit needs finite losses, got {metrics['loss']} in epoch {epoch + 1} (seed {seed}). Lower the learning rate, or "
                "the method's bound; the inputs were checked."
            )
        logits = predict(recipe.model, state.params, state.stats, dataset.test_images)
        accuracy.append(float(np.mean(logits.argmax(1) == dataset.test_labels)))
        loss.append(metrics.pop("loss"))
        if on_epoch is not None:
            on_epoch(epoch, {"loss": loss[-1], "accuracy": accuracy[-1], **metrics})
    return History(
        accuracy=accuracy,
        loss=loss,
        logits=logits,
        seconds=seconds,
        gradient_evaluations=1 + extra_gradients(state.opt_state) / recipe.total_steps,
        inner_evaluations=sum(v for k, v in metrics.items() if k.endswith("inner_evaluations")),
        metrics=metrics,
        losses=training_losses(recipe, state, numbers, data, seed),
        state=state,
    )


def _compile(step, recipe: Recipe, state: TrainState, numbers, data, steps_per_call: int) -> None:
    """Compiles the step for the sizes of call that will occur, once per recipe, so that `seconds` is training alone."""
    whole, rest = divmod(recipe.steps_per_epoch, steps_per_call)
    sizes = ([steps_per_call] if whole else []) + ([rest] if rest else [])
    for steps in sizes:
        if (recipe, steps) not in _COMPILED:
            index = jnp.zeros([steps, recipe.batch_size], jnp.int32)
            jax.block_until_ready(step(jax.tree.map(jnp.copy, state), numbers, data, index))
            _COMPILED.add((recipe, steps))


def extra_gradients(opt_state: optax.OptState) -> int:
    """Gradients that optimiser links asked of `grad_fn` in all: the sum of their states' `evaluations`."""
    return int(sum(np.asarray(v) for _, v in optax.tree_utils.tree_get_all_with_path(opt_state, "evaluations")))


def training_losses(recipe: Recipe, state: TrainState, numbers: dict, data, seed: int, *, batches: int = 32):
    """(plain losses, perturbed losses, labels) of up to `batches` training batches at this state; None for an empty chain.

    The perturbed ones are what the training step sees: it runs on copies of the state, so there is no further program to compile.
    """
    if not split_methods(recipe.build(numbers["method"]))[0]:
        return None
    # The plain pass does not depend on the method: one program for all methods of a comparison.
    plain = compiled_plain_losses(dataclasses.replace(recipe, build=_no_methods))
    step, on_device = compiled_step(recipe), as_arrays(numbers)
    order = jnp.asarray(epoch_order(recipe.num_examples, recipe.batch_size, seed, 0)[:batches])
    clean = [np.asarray(plain(state, data, rows)) for rows in order]
    perturbed = [np.asarray(step(jax.tree.map(jnp.copy, state), on_device, data, rows[None])[2][0]) for rows in order]
    return np.concatenate(clean), np.concatenate(perturbed), np.asarray(data.labels)[np.asarray(order).reshape(-1)]


def _no_methods(numbers) -> tuple:
    return ()
