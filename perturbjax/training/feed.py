"""The batches of a run in order: rows of data that lie on the device, or images streamed to it in the background.

Both give the step the same numbers: which samples, in which order, is the business of `perturbjax.data.batches`, and augmentation
runs on the device.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.data import Dataset, balanced_order, epoch_order, replayed_order
from perturbjax.training.devices import Devices
from perturbjax.training.step import DeviceData, Recipe

AHEAD = 2  # calls whose images are read before they are needed
DEVICE_SHARE = 0.5  # of the device's memory that data may take without being asked for
HOST_LIMIT = 8 << 30  # bytes of data that a CPU "device" copies


class Call(NamedTuple):
    """What one call of the compiled step trains on."""

    first: int  # steps taken before it
    steps: int
    index: jax.Array  # [(S,) steps, B]
    images: jax.Array | None  # [(S,) steps, B, H, W, channels] where the data is streamed
    ends_epoch: bool


def streams(dataset: Dataset, wish: bool | None, copies: int = 1) -> bool:
    """Whether the images are streamed: as wished, or if they are a memory map or so many copies take too much of the device's memory."""
    if wish is not None:
        return wish
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = HOST_LIMIT if memory is None else int(DEVICE_SHARE * memory)
    return isinstance(dataset.train_images, np.memmap) or copies * dataset.train_images.nbytes > limit


def same_arrays(datasets: Sequence[Dataset]) -> bool:
    """Whether all of them have the same training arrays, which then lie on the device once."""
    first = datasets[0]
    names = ("train_images", "train_labels", "train_domains")
    return all(getattr(d, name) is getattr(first, name) for d in datasets for name in names)


def order_of(recipe: Recipe, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """[steps, B]: the samples of each batch that a run with this seed takes in an epoch. labels: [N] of the training set."""
    if recipe.fine_tuning is not None and epoch >= recipe.fine_tuning.first_epoch(recipe.epochs):
        return balanced_order(labels, recipe.batch_size, seed, epoch)
    draw = functools.partial(epoch_order, recipe.num_examples, recipe.batch_size, seed)
    return replayed_order(draw, recipe.steps_per_epoch, recipe.replays, epoch)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches of one run (`stacked` False), or of several runs side by side, for `compiled_step`.

    datasets and seeds: one for each run. steps_per_call: steps that one call takes, less at an epoch's end.
    """

    recipe: Recipe
    datasets: Sequence[Dataset]
    seeds: Sequence[int]
    devices: Devices
    steps_per_call: int
    streamed: bool
    stacked: bool

    @property
    def shared(self) -> bool:
        """Whether all runs train on the same arrays."""
        return same_arrays(self.datasets)

    def data(self) -> DeviceData:
        """The training sets on the device: [N, ...], or [S, N, ...] where the runs have different ones; no images if streamed."""
        stack = np.stack if self.stacked and not self.shared else lambda parts: parts[0]
        parts = self.datasets
        return self.devices.replicate(
            DeviceData(
                None if self.streamed else stack([d.train_images for d in parts]),
                stack([d.train_labels for d in parts]),
                stack([d.class_counts.astype(np.int32) for d in parts]),
                None if parts[0].train_domains is None else stack([d.train_domains for d in parts]),
            )
        )

    def example(self, steps: int) -> Call:
        """A call of that many steps, to compile for."""
        return self._call(0, self._order(0)[..., :steps, :], False)

    def calls(self, step: int) -> Generator[Call, None, None]:
        """All calls from the one that begins after `step` steps to the end of training."""
        made = self.calls_here(step)
        return ahead(made, AHEAD) if self.streamed else made

    def calls_here(self, step: int) -> Generator[Call, None, None]:
        """The same, made in this thread."""
        per_epoch, per_call = self.recipe.steps_per_epoch, self.steps_per_call
        for epoch in range(step // per_epoch, self.recipe.epochs):
            order = self._order(epoch)
            done = step - epoch * per_epoch if epoch == step // per_epoch else 0
            # Calls start at multiples of steps_per_call from the epoch's beginning, so that a resumed run makes the same ones.
            while done < per_epoch:
                steps = min(per_call - done % per_call, per_epoch - done)
                yield self._call(epoch * per_epoch + done, order[..., done : done + steps, :], done + steps == per_epoch)
                done += steps

    def _order(self, epoch: int) -> np.ndarray:
        """[(S,) steps, B]: the samples of each batch of an epoch."""
        pairs = zip(self.datasets, self.seeds, strict=True)
        orders = [order_of(self.recipe, dataset.train_labels, seed, epoch) for dataset, seed in pairs]
        return np.stack(orders) if self.stacked else orders[0]

    def _call(self, first: int, rows: np.ndarray, ends_epoch: bool) -> Call:
        axis = rows.ndim - 1
        index = self.devices.split(rows.shape, axis, lambda where: rows[..., where])
        images = None
        if self.streamed:
            shape = (*rows.shape, *self.datasets[0].image_shape)
            images = self.devices.split(shape, axis, lambda where: self._read(rows[..., where]))
        return Call(first, rows.shape[-2], index, images, ends_epoch)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        if not self.stacked:
            return np.asarray(self.datasets[0].train_images[rows])
        return np.stack([d.train_images[of] for d, of in zip(self.datasets, rows, strict=True)])


def ahead(items: Iterator, count: int) -> Generator:
    """The same items, made by a thread that is up to `count` of them ahead; its exceptions are raised here."""
    made: queue.Queue = queue.Queue(count)
    stop = threading.Event()
    end = object()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # raised again where the items are taken
            put((end, error))

    thread = threading.Thread(target=work, name="perturbjax-feed", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def call_length(steps_per_call: int | None, streamed: bool) -> int:
    """Steps of one device call: as wished; or 1 on CPU (a loop around convolutions is slow there) and for streamed images, else 100."""
    if steps_per_call is not None:
        if steps_per_call < 1:
            raise ValueError(f"fit needs steps_per_call >= 1, got {steps_per_call}. Write steps_per_call=1.")
        return steps_per_call
    return 1 if streamed or jax.default_backend() == "cpu" else 100


def stacked(trees: Sequence) -> Any:
    """Trees of the same structure as one with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
