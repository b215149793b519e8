"""B @ A in float32, with the same instructions as PyTorch, or with NumPy.

PyTorch's CPU build includes MKL and multiplies float32 matrices with its `sgemm`
(aten/src/ATen/native/CPUBlas.cpp). This module calls that function in libtorch_cpu.so: the product
has exactly PyTorch's bits, for 130 MB instead of the 500 MB and two seconds of `import torch`, most
of which is CUDA's libraries. If a build has no MKL, PyTorch itself multiplies; without PyTorch,
NumPy does, whose sums may differ in the last bit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Array = Any  # numpy.ndarray: NumPy is imported where it is used
# (B [m, k], A [k, n], out [m, n]): float32, row-major, contiguous; out = B @ A.
Multiply = Callable[[Array, Array, Array], None]
# (source [n], out [n]): one is float32, the other the bits of bfloat16 as uint16.
Convert = Callable[[Array, Array], None]


@dataclass(frozen=True)
class Products:
    """An implementation of B @ A. `exact`: bit-identical to PyTorch, so its merges equal PEFT's.

    `multiply` takes B [m, k], A [k, n] and out [m, n], float32. `convert` (float32 <-> bfloat16,
    [n]) rounds to nearest, ties to even; None if NumPy has to do it.
    """

    name: str
    exact: bool
    multiply: Multiply
    convert: Convert | None = None


def best() -> Products:
    """Return PyTorch's product if PyTorch is installed, otherwise NumPy's."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return by_numpy()
    return by_mkl(Path(torch.origin).parent / "lib" / "libtorch_cpu.so") or by_torch()


def by_mkl(library: Path) -> Products | None:
    """Return the product of the MKL inside libtorch_cpu.so, None if it has no MKL."""
    try:
        loaded = ctypes.CDLL(str(library))
        sgemm, one_thread = loaded.sgemm_, loaded.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    sgemm.restype = None
    plain, one, zero = ctypes.c_char(b"n"), ctypes.c_float(1.0), ctypes.c_float(0.0)
    word, ref = ctypes.c_int, ctypes.byref

    def multiply(b: Array, a: Array, out: Array) -> None:
        # Set for this thread: on shared cores two OpenMP threads per product are slower than one.
        one_thread(1)
        (m, k), n = b.shape, a.shape[1]
        columns, shared = ref(word(n)), ref(word(k))
        # Fortran is column-major: it sees our matrices as out' = A' @ B'.
        sgemm(
            *(ref(plain), ref(plain), columns, ref(word(m)), shared, ref(one)),
            *(ctypes.c_void_p(a.ctypes.data), columns, ctypes.c_void_p(b.ctypes.data), shared),
            *(ref(zero), ctypes.c_void_p(out.ctypes.data), columns),
        )

    return Products("mkl of torch", True, multiply, _converting(loaded))


def _converting(loaded: ctypes.CDLL) -> Convert | None:
    """Return the dtype conversion of libtorch_cpu.so, None if it has no such interface."""
    try:
        create, copy = loaded.aoti_torch_create_tensor_from_blob, loaded.aoti_torch_copy_
        threads = loaded._ZN2at15set_num_threadsEi  # at::set_num_threads(int)
        codes = {
            "u": loaded.aoti_torch_dtype_bfloat16(),
            "f": loaded.aoti_torch_dtype_float32(),
        }
        cpu = loaded.aoti_torch_device_type_cpu()
    except AttributeError:
        return None
    word, one = ctypes.c_int64, (ctypes.c_int64 * 1)(1)
    tensors: dict[tuple[int, int, str], ctypes.c_void_p] = {}
    single_threaded: list[int] = []  # id of the process that was set to one thread

    def tensor(array: Array) -> ctypes.c_void_p:
        # A tensor owns no memory and there are few blocks, so tensors are kept and reused.
        key = (array.ctypes.data, array.size, array.dtype.kind)
        if key not in tensors:
            handle = ctypes.c_void_p()
            failed = create(
                *(ctypes.c_void_p(key[0]), word(1), (word * 1)(array.size), one, word(0)),
                *(codes[key[2]], cpu, 0, ctypes.byref(handle)),
            )
            if failed:
                raise RuntimeError("libtorch_cpu.so made no tensor: see stderr")
            tensors[key] = handle
        return tensors[key]

    def convert(source: Array, out: Array) -> None:
        if single_threaded != [os.getpid()]:
            threads(1)
            single_threaded[:] = [os.getpid()]
        if copy(tensor(out), tensor(source), 0):
            raise RuntimeError("libtorch_cpu.so converted nothing: see stderr")

    return convert


def by_torch() -> Products:
    """Return PyTorch's own product, on one thread."""
    import torch

    torch.set_num_threads(1)

    def multiply(b: Array, a: Array, out: Array) -> None:
        torch.mm(*map(torch.from_numpy, (b, a)), out=torch.from_numpy(out))

    return Products("torch", True, multiply)


def by_numpy() -> Products:
    """Return NumPy's product."""
    import numpy as np

    def multiply(b: Array, a: Array, out: Array) -> None:
        np.matmul(b, a, out=out)

    return Products("numpy", False, multiply)
