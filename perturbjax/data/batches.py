"""Which samples make a batch (numpy, on the host), and random crops and flips (JAX, on the device).

Everything is a function of its arguments: a run that is resumed at epoch 7 sees the batches it would have seen.
"""

import jax
import jax.numpy as jnp
import numpy as np


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


def augment(images: jax.Array, key: jax.Array, index: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Random crop after zero padding, and horizontal flip with probability 1/2: [B, H, W, channels], dtype unchanged.

    Sample i draws from fold_in(key, index[i]): its crop does not depend on its place in the batch, or on how the batch
    is split over devices. Pass another key at each step (fold_in(key, step)). Zero is black for pixels in 0..255 or
    [0, 1], so augment before normalising, as the papers' pipelines do.

    Args:
      images: [B, H, W, channels], any dtype. key: one PRNG key. index: [B] integers, positions in the training set.
      pad: static, pixels on each side; every of the (2·pad + 1)² crops is equally likely; 0: no crop. flip: static.
    """
    if images.ndim != 4 or index.shape != images.shape[:1]:
        raise ValueError(
            f"augment needs images [B, H, W, channels] and index [B], got {images.shape} and {index.shape}. "
            "For one image, write images[None] and index[None]."
        )
    if pad < 0:
        raise ValueError(f"augment needs pad >= 0, got {pad}. Write pad=0 for no crop.")
    if not pad and not flip:
        return images

    def one(image, i):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, i))
        if pad:
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, index)
