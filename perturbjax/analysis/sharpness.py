r"""How sharp a minimum is: the loss over a data set, its gradient and Hessian products, the largest eigenvalues, SAM's sharpness.

    L(w) = (1/N) Σ_i CE(f(x_i; w), y_i)          the net in evaluation mode (BatchNorm by its running statistics, no dropout)
    λ_max(∇²L(w))                                 by Lanczos
    (1/N) Σ_b |b| (L_b(w + ρ ∇L_b/‖∇L_b‖) − L_b(w))   max_{‖e‖ ≤ ρ} L_b(w + e) − L_b(w) to first order, over batches b

Hessian products differentiate the gradient backwards again (reverse over reverse): the models' convolutions have no forward mode.
Batches are evaluated one after another by one compiled program, so a data set of any size fits.
Sources: Foret et al., "Sharpness-Aware Minimization", ICLR 2021 (sharpness). Golub and Van Loan, "Matrix Computations", section 10.3
(Lanczos, full re-orthogonalisation).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from perturbjax.checks import check_labels, check_number
from perturbjax.classes import own_entries, wide
from perturbjax.data import evaluation_batches
from perturbjax.parameter.ascent import dot, move, unit_tree

BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class DataLoss:
    """L(w), made by `data_loss`: call it with parameters, or ask for `gradient`, `hessian_product`, `along`."""

    apply: Callable[[Any, Any, jax.Array], jax.Array]
    """(params, stats, inputs [B, ...]) -> logits [B, C]; hashable."""
    stats: Any
    inputs: np.ndarray
    labels: np.ndarray
    batch_size: int

    def batches(self) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """(inputs, labels, weights), all of one size: the last one is padded with samples of weight 0."""
        for rows, weights in zip(*evaluation_batches(len(self.labels), self.batch_size), strict=True):
            inputs = self.inputs[rows]
            if inputs.dtype == np.uint8:
                inputs = inputs.astype(np.float32) / 255
            yield jnp.asarray(inputs), jnp.asarray(self.labels[rows]), jnp.asarray(weights)

    def __call__(self, params: Any) -> float:
        """L(w)."""
        return float(self.along(params, (), np.zeros([1, 0]))[0])

    def gradient(self, params: Any) -> Any:
        """∇L(w)."""
        return self._mean(lambda batch: _gradient(self.apply, params, self.stats, *batch))

    def hessian_product(self, params: Any, direction: Any) -> Any:
        """∇²L(w) · direction."""
        return self._mean(lambda batch: _hessian_product(self.apply, params, self.stats, *batch, direction))

    def along(self, params: Any, directions: tuple, places: np.ndarray) -> np.ndarray:
        """[K] losses at w + Σ_j places[k, j] · directions[j], for places [K, J]."""
        places = jnp.asarray(np.asarray(places), jax.tree.leaves(params)[0].dtype)
        parts = [_along(self.apply, params, self.stats, *batch, directions, places) for batch in self.batches()]
        return np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0) / len(self.labels)

    def _mean(self, of_batch: Callable) -> Any:
        total = functools.reduce(functools.partial(jax.tree.map, jnp.add), map(of_batch, self.batches()))
        return jax.tree.map(lambda x: x / len(self.labels), total)


def data_loss(model: Any, inputs: np.ndarray, labels: np.ndarray, *, stats: Any = None, batch_size: int = BATCH) -> DataLoss:
    """The mean cross entropy of a net over a data set, as a function of its parameters.

    Args:
      model: one of `perturbjax.models` (run in evaluation mode with the BatchNorm statistics `stats`), or a function
        (params, inputs [B, ...]) -> logits [B, C].
      inputs: [N, ...]; uint8 is divided by 255. labels: [N] integers.
      batch_size: samples evaluated at a time; sharpness is measured on batches of this size.

    >>> loss = data_loss(lambda w, x: x @ w, np.eye(2, dtype=np.float32), np.array([0, 1]))
    >>> round(loss(jnp.zeros([2, 2])), 4)
    0.6931
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    check_number("data_loss", low=1, batch_size=batch_size)
    if len(inputs) != len(labels) or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"data_loss needs inputs [N, ...] and labels [N], got {inputs.shape} and {labels.shape}. Write labels.ravel()."
        )
    check_labels("data_loss", labels, int(labels.max()) + 1 if np.issubdtype(labels.dtype, np.integer) else 1)
    apply = _of_module(model) if hasattr(model, "apply") else _of_function(model)
    return DataLoss(apply, stats or {}, inputs, labels.astype(np.int32), min(batch_size, len(labels)))


@functools.cache
def _of_module(model: Any) -> Callable:
    """One function per module, so that its nets share compiled programs."""

    def apply(params, stats, inputs):
        return model.apply({"params": params, **({"batch_stats": stats} if stats else {})}, inputs, train=False)

    return apply


@functools.cache
def _of_function(logits: Callable) -> Callable:
    return lambda params, stats, inputs: logits(params, inputs)


def _total(apply, params, stats, inputs, labels, weights):
    """Σ weight · CE of a batch."""
    log_p = jax.nn.log_softmax(wide(apply(params, stats, inputs)))
    losses = -own_entries(log_p, labels)
    return jnp.sum(weights.astype(losses.dtype) * losses)


_gradient = jax.jit(jax.grad(_total, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _hessian_product(apply, params, stats, inputs, labels, weights, direction):
    def slope(params):
        gradient = jax.grad(_total, argnums=1)(apply, params, stats, inputs, labels, weights)
        return dot(gradient, direction)

    return jax.grad(slope)(params)


@functools.partial(jax.jit, static_argnums=0)
def _along(apply, params, stats, inputs, labels, weights, directions, places):
    def at(place):
        moved = params
        for number, direction in enumerate(directions):
            moved = move(moved, direction, place[number])
        return _total(apply, moved, stats, inputs, labels, weights)

    return jax.lax.map(at, places)


def sam_sharpness(loss: DataLoss, params: Any, *, radius: float = 0.05) -> float:
    """max_{‖e‖ ≤ ρ} L_b(w + e) − L_b(w) to first order, with e = ρ ∇L_b/‖∇L_b‖, averaged over the loss's batches.

    It depends on the batch size (smaller batches: sharper), and on the batches: shuffle data that is sorted by class.
    """
    check_number("sam_sharpness", low=0, radius=radius)
    found = [_climb(loss.apply, params, loss.stats, *batch, jnp.float32(radius)) for batch in loss.batches()]
    return float(np.sum(np.asarray(jax.device_get(found), np.float64)) / len(loss.labels))


@functools.partial(jax.jit, static_argnums=0)
def _climb(apply, params, stats, inputs, labels, weights, radius):
    """Σ weights · (L_b(w + e) − L_b(w)) of a batch."""
    here, gradient = jax.value_and_grad(_total, argnums=1)(apply, params, stats, inputs, labels, weights)
    return _total(apply, move(params, unit_tree(gradient), radius), stats, inputs, labels, weights) - here


class Spectrum(NamedTuple):
    """The largest eigenvalues of a symmetric matrix."""

    values: np.ndarray  # [k], largest first
    errors: np.ndarray  # [k]: there is an eigenvalue within that distance of each
    vectors: list  # k of length 1, in the form of the parameters
    products: int  # matrix products that it took


def hessian_spectrum(
    loss: DataLoss, params: Any, *, top: int = 1, steps: int = 40, tolerance: float = 1e-3, seed: int = 0
) -> Spectrum:
    """The `top` largest eigenvalues of the loss's Hessian.

    Args:
      steps: of Lanczos at most, each one Hessian product over the data. tolerance: it ends when the errors are below that share of
      the largest eigenvalue's size. seed: of the start.
    """
    flat, unravel = ravel_pytree(params)
    product = lambda v: ravel_pytree(loss.hessian_product(params, unravel(v)))[0]
    found = lanczos(product, flat.shape[0], dtype=flat.dtype, top=top, steps=steps, tolerance=tolerance, seed=seed)
    return found._replace(vectors=[unravel(v) for v in found.vectors])


def lanczos(
    product: Callable[[jax.Array], jax.Array],
    size: int,
    *,
    dtype: Any = jnp.float32,
    top: int = 1,
    steps: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Spectrum:
    """The `top` largest eigenvalues of a symmetric matrix [size, size] that is known by its products with vectors.

    Every new vector is made orthogonal to all before it, twice: without, rounding brings converged eigenvalues back as copies.
    An eigenvalue of several eigenvectors is found once.

    >>> found = lanczos(lambda v: jnp.array([1.0, 5.0, 3.0]) * v, 3, top=2)
    >>> print(found.values.round(4))
    [5. 3.]
    """
    check_number("lanczos", low=1, high=size, top=top)
    check_number("lanczos", low=1, steps=steps)
    check_number("lanczos", low=0, tolerance=tolerance)
    limit = min(steps, size)
    basis, vector = jnp.zeros([limit, size], dtype), jax.random.normal(jax.random.key(seed), [size], dtype)
    vector = vector / jnp.linalg.norm(vector)
    diagonal, beside = [], []
    for step in range(limit):
        basis = basis.at[step].set(vector)
        image = product(vector).astype(dtype)
        diagonal.append(float(image @ vector))
        image = _without(basis, image)
        beside.append(float(jnp.linalg.norm(image)))
        values, own = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        values, own = values[::-1][:top], own[:, ::-1][:, :top]
        errors, scale = np.abs(beside[-1] * own[-1]), max(np.abs(diagonal).max(), np.abs(values).max(), *beside)
        exhausted = beside[-1] <= 10 * float(jnp.finfo(dtype).eps) * scale  # nothing new: the matrix maps the basis to itself
        if exhausted or (len(values) == top and (errors <= tolerance * np.abs(values).max()).all()):
            break
        vector = image / beside[-1]
    vectors = jnp.asarray(own.T, dtype) @ basis[: len(diagonal)]
    return Spectrum(values, errors, list(vectors), len(diagonal))


@jax.jit
def _without(basis: jax.Array, vector: jax.Array) -> jax.Array:
    """The vector without its part in the span of the rows (those of zeros are no part of it)."""
    for _ in range(2):
        inside = jnp.matmul(basis, vector, precision=jax.lax.Precision.HIGHEST)
        vector = vector - jnp.matmul(inside, basis, precision=jax.lax.Precision.HIGHEST)
    return vector
