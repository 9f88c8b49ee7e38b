r"""Low rank for LPA: gradients kept in the span of their k largest right singular vectors.

    G_c = Σ_j σ_j u_j v_jᵀ (positions × channels),    Ĝ = G V_c V_cᵀ,   V_c = (v_1 … v_k)

V_c comes from the first (clean) gradient and holds for all steps: δ_c has rank k at most. As printed, eq. 12 compresses nothing
(the gradient of a class is one vector, of rank 1) and drops u_j. Where a site has no positions (features), the gradients of all
classes are the rows of one matrix, whose v_j all of them share. Where nothing but a mean over positions and a linear head follows
("last_stage" of the cnn and the resnets here), a class's gradient is alike at all positions, of rank 1: any k gives the same delta,
whose first step is that of full rank and whose others keep its direction. Source: "Learning to Perturb Activations" (LPA), section 3.4.4.
"""

import functools
import logging
import math
from collections.abc import Callable
from numbers import Integral

import jax
import jax.numpy as jnp

from perturbjax.checks import is_traced
from perturbjax.classes import wide

Rank = int | float | None


def right_vectors(matrix: jax.Array, rank: int) -> jax.Array:
    """The `rank` largest right singular vectors of each matrix [..., P, D]: [..., D, rank]; a zero where a matrix has fewer.

    From the smaller one of the two Gram matrices. Vectors with σ² below √(machine precision)·σ_1² count as none: of a matrix of lower
    rank they would be rounding alone.
    """
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    m = matrix / jnp.where(largest > 0, largest, 1)  # its square neither overflows nor vanishes
    across = jnp.swapaxes(m, -2, -1)
    tall = matrix.shape[-1] <= matrix.shape[-2]
    square, vectors = jnp.linalg.eigh(_matmul(across, m) if tall else _matmul(m, across))
    square, vectors = square[..., None, -rank:], vectors[..., -rank:]
    kept = square > jnp.finfo(m.dtype).eps ** 0.5 * square[..., -1:]
    right = vectors if tall else _matmul(across, vectors) / jnp.sqrt(jnp.where(kept, square, 1))
    return jnp.where(kept, right, 0)


def within(gradients: jax.Array, vectors: jax.Array) -> jax.Array:
    """Ĝ [C, ..., D]: each row projected on the span of the class's `vectors` [C, D, k] ([1, D, k]: the same for all classes)."""
    rows = gradients.reshape(vectors.shape[0], -1, gradients.shape[-1])
    return _matmul(_matmul(rows, vectors), jnp.swapaxes(vectors, -2, -1)).reshape(gradients.shape)


def low_rank(gradients: jax.Array, rank: int) -> jax.Array:
    """Ĝ of each class's own gradient [C, ..., D]: its best approximation of rank k; of [C, D], that of the matrix.

    >>> g = jnp.array([[[3.0, 0.0], [0.0, 2.0]]])  # one class, two positions, two channels
    >>> print(low_rank(g, 1))
    [[[3. 0.]
      [0. 0.]]]
    """
    gradients = wide(gradients)
    return within(gradients, right_vectors(_matrices(gradients), rank))


def batch_vectors(gradients: jax.Array, rank: int, most: int) -> jax.Array:
    """The right vectors of each class's gradient [C, P, D], of which no more than `most` are not zero: no others are decomposed."""
    number = gradients.shape[0]
    if number <= most:
        return right_vectors(gradients, rank)
    (there,) = jnp.nonzero(jnp.any(gradients != 0, axis=(1, 2)), size=most, fill_value=number)
    own = right_vectors(gradients.at[there].get(mode="fill", fill_value=0), rank)
    return jnp.zeros((number, *own.shape[1:]), own.dtype).at[there].set(own, mode="drop")


def first_span(rank: int | None, most: int) -> Callable[[jax.Array], jax.Array] | None:
    """For `pgd(transform=)`: projects on the span of the gradient that it is called with first. None for full rank.

    most: how many classes a batch can have samples of.
    """
    if rank is None:
        return None
    found: list[jax.Array] = []

    def transform(gradients: jax.Array) -> jax.Array:
        if not found:
            found.append(batch_vectors(_matrices(gradients), rank, most))
        return within(gradients, found[0])

    return transform


def check_rank(rank: Rank) -> None:
    """Raises ValueError unless the setting is None, k >= 1 or a share in (0, 1]."""
    if is_traced(rank):
        raise ValueError("lpa needs a rank that is known before tracing (it is a shape), got a traced one. Write rank=8.")
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if rank is None or (whole and rank >= 1) or (isinstance(rank, float) and 0 < rank <= 1):
        return
    raise ValueError(
        f"lpa needs rank to be a number of directions >= 1, or a share of the channels in (0, 1], got {rank!r}. "
        "Write rank=8, rank=0.25 or rank=None (full)."
    )


def rank_at(rank: Rank, shape: tuple[int, ...], num_classes: int, site: str) -> int | None:
    """k at a site whose values have this shape [..., D] per sample; None where that is no restriction.

    More than the matrix's rank (D channels, but fewer positions; at a flat site: fewer classes) is cut to that, with a note in the log.

    Raises:
      ValueError: a number above D.
    """
    if rank is None:
        return None
    channels = shape[-1]
    rows = num_classes if len(shape) == 1 else math.prod(shape[:-1])
    wanted = max(1, round(rank * channels)) if isinstance(rank, float) else int(rank)
    if wanted > channels:
        raise ValueError(
            f"lpa needs rank <= {channels}, the channels at the site {site!r}, got {rank}. Write rank={channels}, or a share: rank=0.25."
        )
    if wanted == channels:
        return None
    if wanted > rows:
        _note(wanted, rows, "classes" if len(shape) == 1 else "positions", site)
    return min(wanted, rows)


@functools.cache  # once for each
def _note(wanted: int, rows: int, what: str, site: str) -> None:
    logging.getLogger(__name__).warning("lpa: rank %d at site %s is %d, the number of %s", wanted, site, rows, what)


def _matrices(gradients: jax.Array) -> jax.Array:
    """[C, P, D], or of a flat site [1, C, D]."""
    return gradients[None] if gradients.ndim == 2 else gradients.reshape(gradients.shape[0], -1, gradients.shape[-1])


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
