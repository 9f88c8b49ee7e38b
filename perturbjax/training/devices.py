"""Where training runs: on one device, on a mesh of them under one `jit`, or under `pmap`.

    jit    (default) one program over a mesh, batch sharded, parameters replicated. Everything means what it means on one device,
           BatchNorm and mixing pairs included: the same numbers on any number of devices, to rounding.
    pmap   the same step as per-device code. Class statistics, losses and gradients are taken over all devices; what a device does
           with its own share of the batch is per device: BatchNorm's statistics, mixing pairs, quantiles within a batch.

Several processes (one per host) work with jit: each holds the data, and its devices get their rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perturbjax.checks import check_choice

AXIS = "data"
PARALLEL = ("jit", "pmap")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The first `count` devices of all processes, and how the batch is spread over them.

    Raises ValueError when made: more devices than there are, pmap with several processes, or devices left out with several.
    """

    count: int = 1
    parallel: str = "jit"

    def __post_init__(self):
        check_choice("Devices", "parallel", self.parallel, PARALLEL)
        available = jax.device_count()
        if not 1 <= self.count <= available:
            raise ValueError(
                f"Devices needs 1 to {available} devices (those that JAX sees), got {self.count}. Write --devices {available}"
                + (
                    ", or start Python with JAX_NUM_CPU_DEVICES=8 for eight on a CPU."
                    if jax.default_backend() == "cpu"
                    else "."
                )
            )
        if jax.process_count() > 1 and (self.parallel == "pmap" or self.count not in (1, available)):
            raise ValueError(
                f"Devices needs parallel='jit' and all {available} devices (or 1: every process for itself) with several processes, "
                f"got parallel={self.parallel!r} and {self.count}. Leave out --devices and --parallel."
            )

    @property
    def mapped(self) -> bool:
        """Whether the step is per-device code (pmap)."""
        return self.parallel == "pmap"

    @property
    def single(self) -> bool:
        """One device under jit: nothing is placed by hand."""
        return self.count == 1 and not self.mapped

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices in a row, along the axis "data"."""
        return Mesh(np.asarray(jax.devices()[: self.count]), (AXIS,))

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError unless the batch divides over the devices; names the nearest sizes that do."""
        if batch_size % self.count:
            below, n = batch_size - batch_size % self.count, self.count
            sizes = f"{below} or {below + n}" if below else f"{n}"
            raise ValueError(
                f"Devices needs a batch size that divides by its {n} devices, got {batch_size}. Write --batch-size {sizes}."
            )

    def compile(self, step: Callable, options: dict | None = None) -> Callable:
        """Jits `step(state, numbers, data, index, images=None) -> (state, metrics, losses [..., B])`; the state is donated.

        options: for the compiler (jit only).
        """
        if self.single:
            return jax.jit(step, donate_argnums=0, compiler_options=options)
        if not self.mapped:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            return jax.jit(step, donate_argnums=0, compiler_options=options, out_shardings=everywhere)
        program: Any = jax.pmap(step, axis_name=AXIS, donate_argnums=0, devices=jax.devices()[: self.count])

        def run(state, numbers, data, index, images=None):
            state, metrics, losses = program(state, numbers, data, index, images)
            # [devices, ..., share of the batch] -> [..., B]; metrics are the same on all devices.
            losses = jnp.concatenate(list(losses), axis=-1)
            return state, jax.tree.map(lambda x: x[0], metrics), losses

        return run

    def replicate(self, tree: Any) -> Any:
        """The same values on every device (pmap: with a leading axis of devices)."""
        if self.single:
            return jax.tree.map(jnp.array, tree)  # copies: the step gives the state's buffers away
        if self.mapped:
            # Device i gets its copy by counting the devices: pmap wants one argument that is mapped.
            copy = jax.pmap(lambda i, x: x, in_axes=(0, None), devices=jax.devices()[: self.count])
            return copy(np.arange(self.count), tree)
        return jax.tree.map(lambda x: self._global(x, PartitionSpec()), tree)

    def first(self, tree: Any) -> Any:
        """What `replicate` was given, from what it returned."""
        return jax.tree.map(lambda x: x[0], tree) if self.mapped else tree

    def split(self, shape: tuple[int, ...], axis: int, rows: Callable[[slice], np.ndarray]) -> Any:
        """An array of this shape whose `axis` is divided over the devices; `rows(where)` gives its part along that axis.

        Every process reads the rows of its own devices only.
        """
        if self.single:
            return jnp.asarray(rows(slice(0, shape[axis])))
        share = shape[axis] // self.count
        if self.mapped:
            parts = [rows(slice(i * share, (i + 1) * share)) for i in range(self.count)]
            return np.stack(parts)  # pmap spreads them
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))
        return jax.make_array_from_callback(shape, sharding, lambda where: rows(where[axis]))

    def _global(self, x: Any, spec: PartitionSpec) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = self._global(jax.random.key_data(x), spec)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, NamedSharding(self.mesh, spec), lambda where: host[where])


def to_host(tree: Any) -> Any:
    """Copies of all leaves as numpy arrays, PRNG keys as their data; replicated arrays of several processes too."""

    def copy(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        # A copy: on CPU np.asarray is a view of a buffer that the next step gives away.
        return np.array(x)

    return jax.tree.map(copy, tree)


def from_host(tree: Any, like: Any) -> Any:
    """The inverse of `to_host`: numpy leaves with the key types of `like`."""

    def restore(x, template):
        if isinstance(template, jax.Array) and jnp.issubdtype(template.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(template))
        return x

    return jax.tree.map(restore, tree, like)


def start_processes(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins this process to the others (`jax.distributed`); call before anything else touches JAX.

    coordinator: "host:port" of process 0, the same in all. process_id: 0..num_processes-1, another in each.
    """
    if num_processes < 2 or not 0 <= process_id < num_processes or ":" not in coordinator:
        raise ValueError(
            f"start_processes needs coordinator 'host:port' and a process id in 0..num_processes-1, got {coordinator!r}, "
            f"{process_id} of {num_processes}. Write --coordinator HOST:1234 --num-processes 2 --process-id 0, and 1 in the other."
        )
    jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)
