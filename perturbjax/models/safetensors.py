"""Arrays from a .safetensors file, the form in which public weights are given away: nothing in it can run code.

    8 bytes: n, little endian │ n bytes: JSON {name: {"dtype", "shape", "data_offsets": [from, to]}} │ the arrays' bytes, row by row

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import json
import math
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}
LONGEST = 100 << 20  # bytes of a header


class _Entry(NamedTuple):
    """Where an array lies."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


def read_safetensors(file: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> array, mapped from the file: what is not looked at is not read. BF16 becomes bfloat16."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"read_safetensors needs a file, got {str(path)!r}, where there is none. Check the path.")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(LONGEST, size - 8):
            raise ValueError(_damaged(path, f"its header would be {length} bytes of {size}"))
        try:
            header = json.loads(stream.read(length))
            entries = {name: _entry(header[name]) for name in header if name != "__metadata__"}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(_damaged(path, f"header: {type(error).__name__}: {error}")) from error
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    found = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if not 0 <= begin <= end <= size - 8 - length or end - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(
                _damaged(path, f"{name} {dtype} {list(shape)} lies at {begin} to {end} of {size - 8 - length} bytes")
            )
        found[name] = data[8 + length + begin : 8 + length + end].view(dtype).reshape(shape)
    return found


def _entry(entry: dict) -> _Entry:
    if entry["dtype"] not in ("BF16", *DTYPES):
        raise ValueError(f"dtype {entry['dtype']}, which is none of BF16, {', '.join(DTYPES)}")
    dtype = np.dtype(jnp.bfloat16) if entry["dtype"] == "BF16" else np.dtype(DTYPES[entry["dtype"]])
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at {begin} to {end}")
    return _Entry(dtype, shape, begin, end)


def _damaged(path: pathlib.Path, why: str) -> str:
    return (
        f"read_safetensors needs a whole .safetensors file, got {str(path)!r} ({why}). Fetch it again; other forms of weights "
        "(.bin, .pt, .h5) are not read: safetensors.torch.save_file writes this one."
    )
