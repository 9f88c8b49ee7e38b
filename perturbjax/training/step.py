"""One training step for any chain of perturbations, any optax optimiser and any model.

Everything that fixes the computation's structure is a `Recipe`; everything that is a number (bounds, step sizes, learning rate) is
an argument of the step, and chain and optimiser are built from it inside the trace. So all seeds and all settings of one structure
share one compiled step.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.core import Batch, Chain, Objective, chain, objective
from perturbjax.data import Dataset, augment

Numbers = Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of a run. Two equal recipes share one compilation."""

    model: Any
    """A Flax module with sites (`perturbjax.models.create`)."""
    build: Callable[[Numbers], Iterable]
    """Numbers -> methods: perturbations, tuples of them and optax links, in order. Must be hashable: a function, a partial."""
    num_classes: int
    num_examples: int
    batch_size: int = 128
    epochs: int = 30
    schedule: str = "cosine"
    """"cosine" to zero or "constant", after the warm-up."""
    warmup_epochs: float = 1.0
    momentum: bool = True
    """Whether there is a momentum buffer; its decay is a number."""
    nesterov: bool = False
    pad: int = 0
    """Random crops after padding by this many pixels; 0: none."""
    flip: bool = False
    """Random horizontal flips."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the last partial one is dropped."""
        return self.num_examples // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class DeviceData(NamedTuple):
    """A training set on the device, passed to the step as an argument."""

    images: jax.Array  # [N, H, W, channels], uint8 or float32 in [0, 1]
    labels: jax.Array  # [N] int32
    class_counts: jax.Array  # [C] int32


def device_data(dataset: Dataset) -> DeviceData:
    """The dataset's training part."""
    return DeviceData(
        jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels), jnp.asarray(dataset.class_counts, jnp.int32)
    )


class TrainState(NamedTuple):
    """Everything that changes during training."""

    params: Any
    stats: Any  # BatchNorm statistics, or {}
    opt_state: optax.OptState
    states: tuple  # of the perturbations
    step: jax.Array  # [] int32, steps taken
    key: jax.Array  # the run's key; each step folds its number in


_PIXELS = (np.arange(256) / 255).astype(np.float32)


def pixels(images: jax.Array) -> jax.Array:
    """Images as float32 in [0, 1], the unit of the input site: uint8 is divided by 255.

    By a table: a product would be fused with the model's normalisation, and rounded otherwise as soon as something stands between.
    """
    return jnp.asarray(_PIXELS)[images] if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def split_methods(made: Iterable) -> tuple[Chain, tuple[optax.GradientTransformation, ...]]:
    """Methods as a chain for the loss and links for the optimiser, each in the order given."""
    links, transforms = [], []
    for one in made:
        if hasattr(one, "update") and hasattr(one, "init"):
            transforms.append(one)
        else:
            links.append(one)
    return chain(*links), tuple(transforms)


def learning_rate(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """The schedule's factor of the base learning rate, by step."""
    warmup = int(round(recipe.warmup_epochs * recipe.steps_per_epoch))
    if recipe.schedule == "constant":
        tail = optax.constant_schedule(1.0)
    else:
        tail = optax.cosine_decay_schedule(1.0, max(recipe.total_steps - warmup, 1))
    if warmup < 1:
        return tail
    return optax.join_schedules([optax.linear_schedule(1 / (warmup + 1), 1.0, warmup), tail], [warmup])


def optimizer(
    transforms: Iterable[optax.GradientTransformation], numbers: dict, recipe: Recipe
) -> optax.GradientTransformationExtraArgs:
    """SGD with the methods' own links first, then coupled weight decay, momentum and learning rate."""
    factor = learning_rate(recipe)
    momentum = numbers["momentum"] if recipe.momentum else None
    return optax.chain(
        *transforms,
        optax.add_decayed_weights(numbers["weight_decay"]),
        optax.sgd(lambda count: numbers["learning_rate"] * factor(count), momentum=momentum, nesterov=recipe.nesterov),
    )


def build(recipe: Recipe, numbers: dict, class_counts: jax.Array) -> tuple[Objective, optax.GradientTransformationExtraArgs]:
    """Objective and optimiser of a recipe with these numbers, {"method", "learning_rate", "momentum", "weight_decay"}."""
    links, transforms = split_methods(recipe.build(numbers["method"]))
    made = objective(
        recipe.model, links, num_classes=recipe.num_classes, class_counts=class_counts, num_examples=recipe.num_examples
    )
    return made, optimizer(transforms, numbers, recipe)


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that can't run, before anything compiles."""
    if recipe.schedule not in ("cosine", "constant"):
        raise ValueError(f"Recipe needs schedule 'cosine' or 'constant', got {recipe.schedule!r}.")
    if recipe.epochs < 1:
        raise ValueError(f"Recipe needs epochs >= 1, got {recipe.epochs}.")
    if not 1 <= recipe.batch_size <= recipe.num_examples:
        raise ValueError(
            f"Recipe needs 1 <= batch_size <= {recipe.num_examples} (the training samples), got {recipe.batch_size}. "
            f"Take batch_size={min(64, recipe.num_examples)}, or more data."
        )


def init_state(recipe: Recipe, numbers: dict, data: DeviceData, seed: int) -> TrainState:
    """The state before the first step. Runs on the host with plain numbers, so that every setting is checked here."""
    check_recipe(recipe)
    key = jax.random.key(seed)
    init_key, run_key = jax.random.split(key)
    example = pixels(data.images[:1])
    variables = _compiled_init(recipe.model)(init_key, example)
    params, stats = variables["params"], variables.get("batch_stats", {})
    made, tx = build(recipe, numbers, np.asarray(data.class_counts))
    like = jax.ShapeDtypeStruct((recipe.batch_size, *example.shape[1:]), example.dtype)
    # Every leaf gets a buffer of its own (a method's init may use one array twice): the step donates them.
    opt_state, states = jax.tree.map(jnp.array, (tx.init(params), made.init(params, like, stats=stats)))
    return TrainState(params, stats, opt_state, states, jnp.int32(0), run_key)


@functools.cache
def _compiled_init(model: Any) -> Callable:
    return jax.jit(functools.partial(model.init, train=False))


def as_arrays(numbers: Numbers) -> Numbers:
    """Numbers as float32 arrays: Python floats would be weakly typed."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)


def draw_batch(recipe: Recipe, state: TrainState, data: DeviceData, index: jax.Array) -> Batch:
    """The (augmented) batch of the samples `index` [B] at this step; the same for every method and setting."""
    images = data.images[index]
    if recipe.pad or recipe.flip:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        images = augment(images, key, index, pad=recipe.pad, flip=recipe.flip)
    return Batch(pixels(images), data.labels[index], index=index)


def evaluate_loss(
    made: Objective, params: Any, state: TrainState, recipe: Recipe, batch: Batch, key: jax.Array, **options: Any
):
    """The objective at the state's place in training: (loss, Output)."""
    return made(
        params, state.states, batch, key=key, step=state.step, stats=state.stats,
        progress=state.step.astype(jnp.float32) / recipe.total_steps, epoch=state.step // recipe.steps_per_epoch, **options,
    )  # fmt: skip


def train_step(
    recipe: Recipe, state: TrainState, numbers: dict, data: DeviceData, index: jax.Array
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """One optimiser step on the samples `index` [B]: (new state, metrics, the perturbed losses [B])."""
    made, tx = build(recipe, numbers, data.class_counts)
    loss_key, update_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step))
    batch = draw_batch(recipe, state, data, index)

    def loss(params, weights=None):
        return evaluate_loss(made, params, state, recipe, batch, loss_key, weights=weights)

    def grad_fn(params, *, weights=None):
        """The gradient of the same loss on the same batch, with the same key and incoming states; BatchNorm untouched."""
        return jax.grad(loss, has_aux=True)(params, weights)[0]

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, grad_fn=grad_fn, value=value, step=state.step,
        progress=state.step.astype(jnp.float32) / recipe.total_steps, labels=batch.labels, local_grads=grads, key=update_key,
    )  # fmt: skip
    after = TrainState(optax.apply_updates(state.params, updates), out.stats, opt_state, out.states, state.step + 1, state.key)
    return after, {"loss": value, **out.metrics}, out.losses


@functools.cache
def compiled_step(recipe: Recipe) -> Callable:
    """The jitted step of a recipe: (state, numbers, data, index [K, B]) -> (state, metrics [K], losses [K, B]), K steps in one call.

    The state is donated. One step is a plain call; several are a scan, which saves dispatches on accelerators.
    """

    def steps(state, numbers, data, index):
        def step(state, rows):
            state, metrics, losses = train_step(recipe, state, numbers, data, rows)
            return state, (metrics, losses)

        if index.shape[0] == 1:
            state, seen = step(state, index[0])
            return state, *jax.tree.map(lambda x: x[None], seen)
        state, seen = jax.lax.scan(step, state, index)
        return state, *seen

    return jax.jit(steps, donate_argnums=0)


@functools.cache
def compiled_logits(model: Any) -> Callable:
    """The jitted forward pass in evaluation mode: (params, stats, images) -> logits."""

    def logits(params, stats, images):
        variables = {"params": params, **({"batch_stats": stats} if stats else {})}
        return model.apply(variables, pixels(images), train=False)

    return jax.jit(logits)


@functools.cache
def compiled_plain_losses(recipe: Recipe) -> Callable:
    """Jitted (state, data, index [B]) -> unperturbed losses [B] of the batch that the next step would train on."""
    plain = objective(recipe.model, (), num_classes=recipe.num_classes)

    def losses(state, data, index):
        return plain(state.params, (), draw_batch(recipe, state, data, index), stats=state.stats)[1].losses

    return jax.jit(losses)
