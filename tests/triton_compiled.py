"""Compile Triton's attention for compute capability 9.0, without a device; see `test_triton.py`.

    python tests/triton_compiled.py bfloat16 64

prints the shared memory of each kernel and how many products on tensor cores it has.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metafocus.attention.kernels.kernel import QKV, Scaling
from metafocus.attention.kernels.triton import double_backward, gradient
from metafocus.attention.kernels.triton.launch import Triton, constants_of

KERNELS = (
    *(gradient.attend, gradient.query_gradient, gradient.key_gradient),
    *(double_backward.row_sums, double_backward.query_second, double_backward.key_second),
)
NUMBERS = ("S", "H", "blocks")
INDICES = ("START", "STOP", "LOW_KEY", "HIGH_KEY", "LOW_QUERY", "HIGH_QUERY")
SUMS = ("LSE", "E", "MU", "C")
NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def compiled(kernel, dtype: str, size: int):
    x = torch.zeros(1, 2, 16, size, dtype=getattr(torch, dtype))
    constants = constants_of(Triton(), QKV(x, x[:, :1], x[:, :1]), Scaling(0.1, 30.0))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "i32"
        else:
            kind = "i32" if name in INDICES else "fp32" if name in SUMS else NAMES[dtype]
            signature[name], aligned[i,] = f"*{kind}", [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", 90, 32), options)


def main() -> None:
    dtype, size = sys.argv[1], int(sys.argv[2])
    found = {}
    for kernel in KERNELS:
        done = compiled(kernel, dtype, size)
        ptx = done.asm["ptx"]
        products = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
        found[kernel.__name__] = done.metadata.shared, products
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
