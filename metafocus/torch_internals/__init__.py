"""The one folder that touches private parts of torch.

Each private name is used in one small function of a public meaning, and has a test in
`tests/test_torch_internals.py` that says what depends on it. Where a new release of torch moves a
name, that test fails, and its file here is the only one to change.

`transforms` knows which transforms of `torch.func` are active, `modes` what operators pass through,
`tensors` the tape, memory and operators, and `modules` the tables and hooks of a module.
"""

from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metafocus.torch_internals.modes import (
    compiled_for_unknown,
    function_modes,
    leave_modes,
    mode_state,
    without_function_modes,
    without_values,
)
from metafocus.torch_internals.modules import (
    forward_hooks,
    has_backward_hooks,
    is_compiled,
    parameter_table,
    raised_by_functional_call,
    swapped_weights,
    uncompiled,
    weight_tables,
)
from metafocus.torch_internals.tensors import (
    assert_later,
    constant_when_compiled,
    flash_cpu,
    flash_cpu_backward,
    flash_varlen,
    flash_varlen_backward,
    forward_class,
    is_view,
    is_wrapper,
    keeps_graph,
    operator_arguments,
    parts_of,
    reduction_of,
    storage_key,
    version,
    weight_norm,
)
from metafocus.torch_internals.transforms import (
    OwnTape,
    VmapLevel,
    differentiated_again,
    forward_levels,
    innermost,
    is_batched,
    is_tracked,
    outside_transforms,
    plain,
    refuse_nested_forward_mode,
    sole_vmap,
    tape_of_its_own,
    tracing,
    transform_active,
    transforming,
    unwrap_dead,
)

__all__ = [
    "OwnTape",
    "TorchDispatchMode",
    "VmapLevel",
    "assert_later",
    "compiled_for_unknown",
    "constant_when_compiled",
    "differentiated_again",
    "flash_cpu",
    "flash_cpu_backward",
    "flash_varlen",
    "flash_varlen_backward",
    "forward_class",
    "forward_hooks",
    "forward_levels",
    "function_modes",
    "has_backward_hooks",
    "innermost",
    "is_batched",
    "is_compiled",
    "is_tracked",
    "is_view",
    "is_wrapper",
    "keeps_graph",
    "leave_modes",
    "mode_state",
    "operator_arguments",
    "outside_transforms",
    "parameter_table",
    "parts_of",
    "plain",
    "pytree",
    "raised_by_functional_call",
    "reduction_of",
    "refuse_nested_forward_mode",
    "sole_vmap",
    "storage_key",
    "swapped_weights",
    "tape_of_its_own",
    "tracing",
    "transform_active",
    "transforming",
    "uncompiled",
    "unwrap_dead",
    "version",
    "weight_norm",
    "weight_tables",
    "without_function_modes",
    "without_values",
]
