"""Which samples make a batch (numpy, on the host).

Everything is a function of its arguments: a run that is resumed at epoch 7 sees the batches it would have seen.
"""

from collections.abc import Callable

import numpy as np

_BALANCED = 0x62616C  # beside seed and epoch: another stream than that of the plain order


def epoch_order(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """[steps, batch_size] int32: the positions of the samples of each batch in this epoch.

    A permutation drawn from (seed, epoch); the last partial batch is dropped, other samples in each epoch.

    >>> epoch_order(10, 4, seed=0, epoch=0).shape
    (2, 4)
    """
    if num_examples < 1:
        raise ValueError(f"epoch_order needs at least one example, got {num_examples}. Give the training set's size.")
    if not 1 <= batch_size <= num_examples:
        largest = 1 << (int(num_examples).bit_length() - 1)
        raise ValueError(
            f"epoch_order needs a batch size in 1..{num_examples} (the number of examples), got {batch_size}. "
            f"Write batch_size={min(largest, 128)}, for instance."
        )
    if seed < 0 or epoch < 0:
        raise ValueError(f"epoch_order needs seed and epoch >= 0, got {seed} and {epoch}. Write seed=0, epoch=0.")
    steps = num_examples // batch_size
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def balanced_order(labels: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """[steps, batch_size] int32: as `epoch_order`, but every class occurs equally often in the epoch, to one sample.

    labels: [N] integers. An epoch has as many steps as one of all samples, and a class's samples occur equally often in it, to one time.
    Classes without samples are left out.

    >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    >>> print(np.bincount(labels[balanced_order(labels, 4, seed=0, epoch=0)].reshape(-1)))
    [4 4]
    """
    shape = epoch_order(len(labels), batch_size, seed, epoch).shape
    rng = np.random.default_rng([seed, epoch, _BALANCED])
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    total = shape[0] * shape[1]
    extra = rng.permutation(len(members)) < total % len(members)  # classes that get one more
    chosen = []
    for own, more in zip(members, extra, strict=True):
        count = total // len(members) + int(more)
        rounds, rest = divmod(count, len(own))
        chosen += [np.tile(own, rounds), rng.permutation(own)[:rest]]
    return rng.permutation(np.concatenate(chosen)).reshape(shape).astype(np.int32)


def replayed_order(draw: Callable[[int], np.ndarray], steps: int, replays: int, epoch: int) -> np.ndarray:
    """[steps, batch_size] int32: of a run that takes every batch `replays` times in a row, an epoch of as many steps as without.

    draw: epoch -> [steps, batch_size], the batches of a run without replays; their order is kept, across the ends of epochs.

    >>> draw = lambda epoch: 10 * epoch + np.arange(3)[:, None]  # the batches 0, 1, 2; 10, 11, 12; …
    >>> print(*(replayed_order(draw, 3, 2, epoch)[:, 0] for epoch in range(3)))
    [0 0 1] [1 2 2] [10 10 11]
    """
    batches = [step // replays for step in range(epoch * steps, (epoch + 1) * steps)]  # counted from the run's beginning
    drawn = {e: draw(e) for e in range(batches[0] // steps, batches[-1] // steps + 1)}
    return np.stack([drawn[b // steps][b % steps] for b in batches])


def evaluation_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """index [steps, batch_size] int32 and mask [steps, batch_size] float32: every sample once, in order.

    The last batch is filled up with the last sample at mask 0: weigh losses and hits by the mask, divide by its sum.

    >>> index, mask = evaluation_batches(5, 3)
    >>> print(index, mask, sep="\\n")
    [[0 1 2]
     [3 4 4]]
    [[1. 1. 1.]
     [1. 1. 0.]]
    """
    if num_examples < 1 or batch_size < 1:
        raise ValueError(
            f"evaluation_batches needs at least one example and a batch size of at least 1, got {num_examples} and "
            f"{batch_size}. Write evaluation_batches(len(test_labels), 500)."
        )
    steps = -(-num_examples // batch_size)
    index = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    return np.minimum(index, np.int32(num_examples - 1)), (index < num_examples).astype(np.float32)
