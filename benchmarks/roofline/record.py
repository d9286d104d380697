"""The operations of a step, in order, at the sizes that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.roofline.scale import Scale

VIEW, KERNEL, SYNC = "view", "kernel", "sync"


class Op(NamedTuple):
    """One operation.

    Attributes:
        kind: `KERNEL`; `VIEW`, which costs the host alone; or `SYNC`, where the host waits.
        name: Of the operator; where it waits, of a `SYNC`.
        dtype: Of the first output of a product, or of the result.
        bytes: Read and written.
        flops: Of matrix products and of attention.
        shapes: Of the first inputs, scaled.
    """

    kind: str
    name: str
    dtype: str = ""
    bytes: int = 0
    flops: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()


_VIEWS = set(
    "view t transpose slice select expand unsqueeze squeeze detach alias as_strided permute "
    "_unsafe_view split unbind lift_fresh unflatten split_with_sizes chunk narrow _reshape_alias "
    "view_as empty empty_like empty_strided new_empty new_empty_strided is_same_size resize_ set_ "
    "record_stream unfold diagonal lift".split()
)
_WAITS = set(
    "_local_scalar_dense nonzero item equal is_nonzero masked_select _unique2 unique_dim "
    "unique_consecutive".split()
)
_MADE = set(
    "zeros ones full arange zeros_like ones_like full_like new_zeros new_ones new_full "
    "scalar_tensor zero_ fill_".split()
)
_GATHERED = {"embedding", "index_select", "gather", "index"}
_SCATTERED = {"index_add_": 3, "scatter_add_": 3, "index_copy_": 2, "index_put_": 2}
"""How often the last tensor argument is read or written."""
_ON_CPU_ONLY = {("entries.py", "refuse"), ("inputs.py", "check_ids")}
"""What a GPU queues or leaves out; see `masks.entries.refuse`."""
_OURS = ("metafocus", "focusft", "transformers", "benchmarks")


class Recorder(TorchDispatchMode):
    """Records what runs in its `with` block, in this thread, the backward pass included.

    Args:
        scale: What the shapes stand for.
    """

    def __init__(self, scale: Scale):
        super().__init__()
        self.scale = scale
        self.ops: list[Op] = []
        self.layouts: int = 0
        """How often spans were read on the host."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and record it."""
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.ops += self._recorded(operator.__name__.split(".")[0], args, kwargs, result)
        return result

    def kernel(self, name: str, tensors: Any, flops: float, more: float = 0) -> None:
        """Record a kernel that the CPU does not have.

        Args:
            name: Of the kernel.
            tensors: What it reads and writes.
            flops: Its operations, scaled.
            more: Bytes besides, scaled.
        """
        size = sum(map(self.scale.bytes, tensors)) + int(more)
        shapes = tuple(map(self.scale.shape, tensors))[:4]
        self.ops.append(Op(KERNEL, name, "bfloat16", size, int(flops), shapes))

    def on_host(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what copies tensors to the host and computes there; record that it waits."""
        self.layouts += 1
        self.ops.append(Op(SYNC, "copy of spans to the host"))
        with _disable_current_modes():
            return function(*args)

    def _recorded(self, name: str, args: Any, kwargs: Any, result: Any) -> list[Op]:
        outs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = {k: v for k, v in kwargs.items() if k != "out"}
        ins = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
        if name in _WAITS:
            where, host = _place()
            if host:
                return []
            waits = Op(SYNC, f"{name} in {where}")
            if name != "nonzero":
                return [waits]
            return [Op(KERNEL, name, "int64", sum(map(self.scale.bytes, ins + outs))), waits]
        same = name in ("reshape", "clone", "_to_copy", "contiguous") and outs and ins
        if name in _VIEWS or (same and outs[0].data_ptr() == ins[0].data_ptr()):
            return [Op(VIEW, name)]
        if not outs:
            return []
        if name == "_foreach_mul":
            # Factors of another shape than the tensors: a kernel for each.
            pairs = zip(*args, outs, strict=True)
            return [Op(KERNEL, name, "", sum(map(self.scale.bytes, pair))) for pair in pairs]
        flops, shown = self._flops(name, args, ins)
        dtype = str((ins[0] if flops else outs[0]).dtype).removeprefix("torch.")
        shapes = tuple(map(self.scale.shape, ins))[:4]
        return [Op(KERNEL, shown, dtype, self._bytes(name, ins, outs), flops, shapes)]

    def _bytes(self, name: str, ins: list[Tensor], outs: list[Tensor]) -> int:
        size = self.scale.bytes
        if name in _MADE:
            return sum(map(size, outs))
        if name in _GATHERED:
            return 2 * sum(map(size, outs))
        if name in _SCATTERED:
            return _SCATTERED[name] * size(ins[-1])
        if name == "copy_":
            return size(ins[-1]) + size(outs[0])
        return sum(map(size, ins)) + sum(map(size, outs))

    def _flops(self, name: str, args: Any, ins: list[Tensor]) -> tuple[int, str]:
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            left, right = args[1:3] if "add" in name else args[:2]
            shape = self.scale.shape(left)
            count = 2 * self.scale.size(right.shape[-1])
            for n in shape:
                count *= n
            return count, name
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            backward = name.endswith("backward")
            q = args[1] if backward else args[0]
            causal = bool(args[7] if backward else args[4] if len(args) > 4 else False)
            _, heads, length, width = self.scale.shape(q)
            pairs = length * length // (2 if causal else 1)
            shown = "sdpa_causal" if causal else "sdpa_mask"
            return (10 if backward else 4) * pairs * heads * width, shown + "_backward" * backward
        return 0, name


def _place() -> tuple[str, bool]:
    """Return where an operator is called, and whether a GPU would not wait there."""
    frame, places = sys._getframe(2), []
    host = False
    while frame:
        code = frame.f_code
        file = code.co_filename.rpartition("/")[2]
        host |= (file, code.co_name) in _ON_CPU_ONLY
        inside = any(f"/{part}/" in code.co_filename for part in _OURS)
        if inside and "roofline" not in code.co_filename and len(places) < 2:
            places.append(f"{file.removesuffix('.py')}.{code.co_name}")
        frame = frame.f_back
    return " from ".join(places), host
