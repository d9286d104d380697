"""Private torch: one folder uses it, and each name of it has a test that says what depends on it.

When a release of torch moves or changes a name, the test of that name fails here. Its docstring
begins with the name and says which part of metafocus would be wrong.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metafocus import torch_internals as ti
from metafocus.preflight.arguments import unused_by

ROOT = Path(__file__).parent.parent / "metafocus"
FILES = sorted(ROOT.rglob("*.py"))
INTERNALS = sorted((ROOT / "torch_internals").glob("*.py"))

OTHERS = {"_replace", "_asdict", "_fields", "_exit"}
"""Public in spite of their names: of named tuples and of `os`."""

ELSEWHERE = {
    "attention/kernels/varlen.py": {"_flash_attn_varlen_forward", "_flash_attn_varlen_backward"},
    "trainer/mixin.py": {"_save_checkpoint", "_micro_step", "_loss"},
    "trainer/compilation.py": {"_no_split_modules"},
    "sharding.py": {"_attn_implementation"},
}
"""Private parts of flash-attn, and of the Trainer and the models of transformers."""

HUGGING_FACE = {
    "_attn_implementation",
    "_is_stateful",
    "_keys_to_ignore_on_save",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
    "_supports_attention_backend",
}
"""Private parts of a Hugging Face model, for `lm/hf/` alone."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> set[str]:
    """Names with an underscore that a file reads from other objects, or imports from torch."""
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
    }
    own |= {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr)
    } - own
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [part for x in node.names for part in f"{node.module}.{x.name}".split(".")]
        elif isinstance(node, ast.Import):
            names = [p for x in node.names if x.name.startswith("torch") for p in x.name.split(".")]
        found |= {name for name in names if is_private(name)}
    return found


def test_no_other_file_touches_private_torch():
    found = {}
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        allowed = OTHERS | ELSEWHERE.get(name, set())
        if name.startswith("lm/hf/"):
            allowed |= HUGGING_FACE
        found[name] = private_names(ast.parse(path.read_text())) - allowed
    for path in INTERNALS:
        assert found.pop(path.relative_to(ROOT).as_posix())
    assert {name: names for name, names in found.items() if names} == {}


def test_a_private_name_is_seen():
    for source in (
        "import torch\ntorch._C._get_dispatch_mode(0)",
        "from torch._C import _functorch",
        "from torch.utils import _pytree as pytree",
        "import torch.utils._pytree",
        "module._parameters['weight']",
        "x._version",
        "getattr(node, '_forward_cls', None)",
    ):
        assert private_names(ast.parse(source)), source


def used_by_the_folder() -> set[str]:
    """Every private name in the folder, and every name of the private module `_functorch`."""
    names: set[str] = set()
    for tree in [ast.parse(path.read_text()) for path in INTERNALS]:
        names |= private_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "_functorch",
                "torch._C",
            ):
                names.add(node.attr)
            if isinstance(node, ast.ImportFrom) and re.search(r"\._", node.module or ""):
                names |= {alias.name for alias in node.names}
    # What is looked up inside private modules is tested, not the modules themselves.
    return names - {"_C", "_autograd", "_functorch", "_subclasses", "_python_dispatch"}


def test_each_private_name_has_a_test():
    documented = set()
    for function in [f for name, f in globals().items() if name.startswith("test_")]:
        documented |= set(re.findall(r"`(\w+)`", (function.__doc__ or "").partition(":")[0]))
    assert used_by_the_folder() == documented


# Which transforms are active.


def test_get_interpreter_stack():
    """`get_interpreter_stack`: nested forward mode is refused by the depth of this stack.

    It is silently wrong through a custom Function: every estimator with one depends on the count.
    """
    depths = []

    def f(x: Tensor) -> Tensor:
        depths.append(ti.forward_levels())
        return x**3

    x = torch.ones(())
    torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (x,))[1], (x,), (x,))
    assert depths == [2]
    assert ti.forward_levels() == 0


def test_transform_type():
    """`TransformType`: tells forward mode, which estimators refuse when nested, from the rest."""
    depths = []

    def f(x: Tensor) -> Tensor:
        depths.append(ti.forward_levels())
        return x.sum()

    torch.func.vmap(torch.func.grad(f))(torch.ones(2))
    assert depths == [0]


def test_transforms_active():
    """`_are_functorch_transforms_active`: every choice between the tape and `torch.func`.

    Without it first derivatives under a transform would be taken by the tape, and be zero.
    """
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(ti.transform_active())
        return x.sum()

    torch.vmap(f)(torch.ones(1, 2))
    torch.func.grad(f)(torch.ones(2))
    f(torch.ones(2))
    assert seen == [True, True, False]


def test_current_level():
    """`_current_level`: plain forward mode counts as a transform, since the tape loses tangents."""
    assert not ti.transforming()
    with forward_ad.dual_level():
        assert ti.transforming()
        assert ti.sole_vmap() is None
    assert not ti.transforming()


def test_dispatch_mode():
    """`_get_dispatch_mode`, `_TorchDispatchModeKey`: `mf.compiled` traces with `make_fx`.

    Code that looks at values (finiteness, row indices) must not run on tensors without values.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(ti.tracing())
        return x + 1

    make_fx(f)(torch.ones(1))
    assert seen[-1]
    assert not ti.tracing()


def test_temporarily_pop_interpreter_stack():
    """`temporarily_pop_interpreter_stack`: side computations (head checks) on plain tensors."""
    seen = []

    def f(x: Tensor) -> Tensor:
        with ti.outside_transforms():
            seen.append(ti.transforming())
            # A value can be looked at: this is no part of the transform.
            assert torch.ones(1).item() == 1
        seen.append(ti.transforming())
        return x.sum()

    torch.func.grad(lambda x: torch.vmap(f)(x).sum())(torch.ones(1, 2))
    assert seen == [False, True]


def test_retrieve_current_functorch_interpreter():
    """`retrieve_current_functorch_interpreter`: level and size of a batch of tasks.

    Inner gradients of `over_tasks` on the tape depend on them.
    """
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(ti.sole_vmap())
        return x

    torch.vmap(f)(torch.ones(3))
    torch.vmap(torch.func.grad(f))(torch.ones(3))
    assert seen[0] is not None and seen[0].size == 3
    assert seen[1] is None
    assert ti.sole_vmap() is None


def test_batch_dimension():
    """`_add_batch_dim`, `_remove_batch_dim`: the way of tensors out of `vmap` and back.

    The inner gradient of all tasks is taken by one backward pass outside `vmap`.
    """

    def f(x: Tensor) -> Tensor:
        level = ti.sole_vmap()
        assert level is not None
        whole = level.outside(x)
        with ti.outside_transforms():
            assert whole.tolist() == [[0.0, 1.0], [2.0, 3.0]]
            whole = whole * 10
        return level.inside(whole) + x

    assert torch.vmap(f)(torch.arange(4.0).view(2, 2)).tolist() == [[0.0, 11.0], [22.0, 33.0]]


# Tensors under transforms.


def test_unwrap_if_dead():
    """`unwrap_if_dead`: custom Functions whose backward pass runs after their transform has ended.

    A pullback of `torch.func.vjp` hands them wrapped tensors of a level that is gone.
    """
    kept = []

    def f(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    x = torch.ones(2)
    torch.func.grad(f)(x)
    (plain,) = ti.unwrap_dead(kept)
    assert plain.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert ti.innermost(plain) is plain


def test_tracked():
    """`is_functorch_wrapped_tensor`, `is_batchedtensor`, `maybe_get_level`: closures are found.

    The check for a tensor that a loss closes over looks through the wrappers of every level.
    """
    found = []

    def look(x: Tensor, y: Tensor) -> Tensor:
        found.append((ti.is_tracked(x), ti.is_tracked(y), ti.is_batched(x), ti.is_batched(y)))
        return (x * y).sum()

    x, y = torch.ones(2, 3), torch.ones(3)
    torch.func.grad(lambda x: torch.vmap(look, (0, None))(x, y).sum())(x)
    torch.vmap(lambda x: torch.func.grad(look, argnums=1)(x, y))(x)
    torch.func.jvp(lambda x: look(x, y), (x,), (x,))
    assert found == [
        (True, False, True, False),
        (False, True, True, False),
        (True, False, False, False),
    ]
    assert not ti.is_tracked(x)
    assert ti.is_tracked(x.requires_grad_())


def test_differentiated_again():
    """`get_interpreter_stack`: `Implicit` keeps no graph of a hypergradient that is final."""
    x, leaf, found = torch.ones(2), torch.ones(2, requires_grad=True), []

    def f(x: Tensor) -> Tensor:
        found.append(ti.differentiated_again([x]))
        return x.sum()

    grad = torch.func.grad(f)
    f(x)
    with torch.no_grad():
        f(x)
    grad(x)
    torch.func.vmap(grad)(torch.ones(2, 2))
    torch.func.grad(lambda y: torch.func.vmap(f)(y).sum())(torch.ones(2, 2))
    assert found == [True, False, False, False, False]
    found.clear()
    grad(leaf)
    torch.func.grad(lambda y: grad(y).sum())(x)
    torch.func.jvp(f, (x,), (x,))
    torch.func.jvp(grad, (x,), (x,))
    assert found == [True] * 4


def test_innermost():
    """`get_unwrapped`: the tensor inside all wrappers says whether a parameter is frozen."""
    x = torch.ones(2)
    inside = []
    torch.vmap(lambda v: inside.append(ti.innermost(v)) or v)(x)
    assert inside[0].data_ptr() == x.data_ptr()
    assert not ti.is_batched(inside[0])


def test_differentiable_level():
    """`_create_differentiable`, `grad_increment_nesting`: a tape above the active transforms.

    Fast weights that a loss ignores are found on it, and `Implicit` linearises its point on it.
    """

    def loss(at: dict[str, Tensor]) -> Tensor:
        return at["a"].sum()

    at = {"a": torch.ones(2), "b": torch.ones(2)}
    assert unused_by(loss, at) == {"b"}
    outside = torch.ones(2, requires_grad=True)
    assert unused_by(lambda at: outside.sum(), at) == {"a", "b"}
    seen = []
    torch.vmap(lambda x: seen.append(unused_by(loss, {**at, "a": x})) or x)(torch.ones(3, 2))
    assert seen == [{"b"}]


def test_batch_axis():
    """`maybe_get_bdim`: the preflight looks at the first task of a batch outside `vmap`."""
    x = torch.arange(6.0).view(2, 3)
    seen = []
    torch.vmap(lambda v: seen.append(ti.plain(v)) or v, in_dims=1)(x)
    assert seen[0].tolist() == [0.0, 3.0]
    assert ti.plain(x) is x


def test_forward_class():
    """`_forward_cls`: kernels whose second derivative may be lost are custom Functions."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = torch.ones(1, requires_grad=True)
    assert ti.forward_class(Own.apply(x).grad_fn) is Own
    assert ti.forward_class((2 * x).grad_fn) is None


def test_created_first():
    """`_sequence_nr`: the nodes of a long graph are freed from the last one on."""
    x = torch.ones(1, requires_grad=True)
    y = x.exp()
    nodes = [y.sin().grad_fn, y.grad_fn, y.cos().grad_fn]
    assert ti.created_first(nodes) == [nodes[1], nodes[0], nodes[2]]


def test_is_view():
    """`_is_view`: outputs of attention kernels that are views refuse a tangent in forward mode."""
    x = torch.ones(2, 2)
    assert ti.is_view(x.t()) and not ti.is_view(x)


def test_version():
    """`_version`: turns that were read from spans are used again only if these have not changed."""
    x = torch.ones(2)
    before = ti.version(x)
    x.add_(1)
    assert before is not None and ti.version(x) == before + 1
    with torch.inference_mode():
        assert ti.version(torch.ones(1)) is None


def test_cdata():
    """`_cdata`: the peak memory that `compare` reports counts each storage once."""
    x, y = torch.ones(4), torch.ones(4)
    assert ti.storage_key(x.untyped_storage()) == ti.storage_key(x[1:].untyped_storage())
    assert ti.storage_key(x.untyped_storage()) != ti.storage_key(y.untyped_storage())


def test_values_of_a_sparse_tensor():
    """`_values`: writes to sparse tensors and to what wrappers hold are found by the preflight."""
    x = torch.eye(2)
    assert ti.parts_of(x) == [x]
    for sparse in (x.to_sparse(), x.to_sparse().transpose(0, 1)):
        (part,) = ti.parts_of(sparse)
        part.mul_(2.0)
        assert torch.equal(sparse.to_dense(), 2 * x)
    assert ti.parts_of(x.to_mkldnn()) == []
    # Batched rows of different lengths are one tensor of all rows, and another one of offsets.
    ragged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    assert ti.is_wrapper(ragged) and not ti.is_wrapper(x)
    assert [part.shape for part in ti.parts_of(ragged)][:2] == [(3,), (3,)]


# Modules.


def test_reparametrize_module():
    """`_reparametrize_module`: layers that are recomputed, and starts that see the slow weights.

    `functional_call` does the same for one call; here the block holds several, and hooks.
    """
    layer = nn.Linear(2, 1)
    own = layer.weight
    with pytest.raises(KeyboardInterrupt):
        with ti.swapped_weights(layer, {"weight": torch.full((1, 2), 5.0)}):
            assert layer.weight.tolist() == [[5.0, 5.0]]
            raise KeyboardInterrupt
    assert layer.weight is own
    model = nn.Sequential(layer, nn.Linear(2, 1))
    model[1].weight = own
    with ti.swapped_weights(model, {"0.weight": torch.zeros(1, 2)}, tie_weights=True):
        assert model[1].weight.tolist() == [[0.0, 0.0]]


def test_buffers_of_a_module():
    """`_buffers`: weights that an interrupted exit has left swapped are put back in this table."""
    norm = nn.BatchNorm1d(1, affine=False)
    *_, table = ti.weight_tables(norm)
    table["running_mean"] = torch.ones(1)
    assert norm.running_mean.tolist() == [1.0]
    assert ti.weight_tables(nn.Tanh()) == ()


def test_parameters_of_a_module():
    """`_parameters`: full fast weights stand in for parameters by an exchange in this table."""
    layer = nn.Linear(2, 1, bias=False)
    own = layer.weight
    ti.parameter_table(layer)["weight"] = torch.zeros(1, 2)
    assert layer(torch.ones(2)).tolist() == [0.0]
    ti.parameter_table(layer)["weight"] = own
    assert layer.weight is own


def test_children_of_a_module():
    """`_modules`: below the fast weights, sharded layers are left out by an exchange there."""
    model = nn.Sequential(nn.Tanh())
    ti.child_table(model)["0"] = nn.Identity()
    assert model(torch.ones(1)).item() == 1


def test_state_of_a_sharded_module():
    """`_get_fsdp_state`, `_fsdp_param_groups`: whether FSDP2 keeps weights for a second derivative.

    Without them `Unrolled()` would be let through where its backward pass reads freed memory.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for reshard in (True, False):
            model = fully_shard(nn.Linear(2, 1), reshard_after_forward=reshard)
            assert not ti.keeps_gathered(model)
            model.set_reshard_after_backward(False)
            assert ti.keeps_gathered(model) != reshard
        assert ti.keeps_gathered(nn.Linear(2, 1))
    finally:
        dist.destroy_process_group()


def test_the_wrapper_around_a_module():
    """`_module_parameters`, `_active_ddp_module`: a loss beside the forward pass of DDP is refused.

    Without them each process would train a model of its own there.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        assert [id(p) for p in wrapper._module_parameters] == [id(p) for p in wrapper.parameters()]
        seen = []
        wrapper.module.register_forward_hook(lambda *_: seen.append(wrapper._active_ddp_module))
        wrapper(torch.ones(2))
        assert seen == [wrapper] and wrapper._active_ddp_module is None
        # One process has nothing to average.
        assert not ti.runs_beside_ddp(list(wrapper.parameters()))
    finally:
        dist.destroy_process_group()


def test_hooks():
    """`_forward_hooks`, `_forward_pre_hooks`: slots of fast weights and hooks of heads are found.

    Without them a second hook would be installed at each call, and `mf.compiled` would not notice
    a hook that has come or gone.
    """
    layer = nn.Linear(2, 1)
    before = layer.register_forward_pre_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None)
    assert len(ti.forward_hooks(layer)) == 2
    before.remove()
    assert len(ti.forward_hooks(layer)) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_uncompiled_function():
    """`_torchdynamo_orig_callable`: a kept cell is known by the function that was compiled."""

    def f(x):
        return x + 1

    assert ti.uncompiled_function(torch.compile(f)) is f
    assert ti.uncompiled_function(f) is f


def test_generator_key():
    """`_cdata`: `preflight.draws` tells the global generator from a loss's own."""
    given = []

    class Seen(ti.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            given.append(kwargs["generator"])
            return func(*args, **kwargs)

    with Seen():
        torch.rand(1, generator=torch.default_generator)
        torch.rand(1, generator=torch.Generator())
    default = ti.generator_key(torch.default_generator)
    assert [ti.generator_key(x) == default for x in given] == [True, False]


def test_plain_attributes():
    """What a module holds besides weights and children, which closures watch."""
    layer = nn.BatchNorm1d(2)
    layer.inner, layer.rates = nn.Linear(2, 2), [1.0]
    found = ti.plain_attributes(layer)
    assert found["eps"] == layer.eps and found["rates"] is layer.rates and found["training"]
    assert not {"weight", "running_mean", "inner"} & set(found)
    tables = (ti.parameter_table(layer), ti.child_table(layer), *ti.weight_tables(layer))
    assert not any(x is table for x in found.values() for table in tables)


def test_backward_hooks():
    """`_backward_hooks`, `_backward_pre_hooks`: a head that has some is called, not multiplied."""
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        layer = nn.Linear(2, 1)
        assert not ti.has_backward_hooks(layer)
        getattr(layer, register)(lambda *_: None)
        assert ti.has_backward_hooks(layer)


def test_compiled_call():
    """`_compiled_call_impl`: the layers of a model that was compiled are not run in two parts."""
    layer = nn.Linear(2, 1)
    assert not ti.is_compiled(layer)
    layer.compile(backend="eager")
    assert ti.is_compiled(layer)


def test_original_module():
    """`_orig_mod`: a loss runs inside the DDP wrapper of a model that was compiled around it."""
    layer = nn.Linear(2, 1)
    assert ti.uncompiled(torch.compile(layer, backend="eager")) is layer
    assert ti.uncompiled(layer) is layer


def test_an_unknown_name_is_told_from_other_attribute_errors():
    with pytest.raises(AttributeError) as caught:
        torch.func.functional_call(nn.Linear(2, 1), {"no.weight": torch.ones(1)}, torch.ones(2))
    assert ti.raised_by_functional_call(caught.value)
    with pytest.raises(AttributeError) as caught:
        torch.ones(1).wight  # noqa: B018
    assert not ti.raised_by_functional_call(caught.value)


# Modes.


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return 2 * func(*args, **(kwargs or {}))


def test_function_mode_stack():
    """`_get_current_function_mode_stack`: a recomputation swaps the operators of the first time."""
    assert ti.function_modes() == []
    with Doubled() as mode:
        assert ti.function_modes() == [mode]


def test_disable_torch_function():
    """`DisableTorchFunction`: attention does not pass each look at a tensor through a mode."""
    x = torch.ones(1)
    with Doubled():
        plain, seen = x + 0, None
        with ti.without_function_modes():
            seen = x + 0
    assert (plain.item(), seen.item()) == (2.0, 1.0)


def test_modes_that_an_interrupt_leaves():
    """`_len_torch_function_stack`, `_len_torch_dispatch_stack`, `_get_current_dispatch_mode_stack`,
    `_get_torch_function_state`, `_set_torch_function_state`: they leave it as it was.
    """
    before = ti.mode_state()
    for enter in (TorchFunctionMode, ti.TorchDispatchMode, ti.without_function_modes):
        # As if its exit had not run.
        enter().__enter__()
    assert all(a != b for a, b in zip(before, ti.mode_state(), strict=True))
    ti.leave_modes(before)
    assert ti.mode_state() == before


def test_dispatch_modes():
    """`TorchDispatchMode`: live bytes of `compare`, and writes that the preflight looks for."""
    seen = []

    class Watch(ti.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(1) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_fake_tensors():
    """`FakeTensorMode`: `mf.compiled` traces a hypergradient on tensors without values."""
    (x,), _ = ti.without_values([torch.ones(2)])
    assert (x + 1).shape == (2,)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        x.sum().item()


def test_unknown_sizes():
    """A symbolic graph says which sizes it is right for."""
    (x, y), fits = ti.without_values([torch.ones(5, 2), torch.ones(5)], [[True, False], [True]])
    (x[:, 0] + y).sum()
    right = fits()
    assert right([torch.ones(9, 2), torch.ones(9)])
    assert not right([torch.ones(9, 3), torch.ones(9)])
    assert not right([torch.ones(9, 2), torch.ones(8)])
    with pytest.raises(Exception, match="_local_scalar_dense"):
        x.sum().item()


def test_compiled_for_unknown():
    """`_dynamo`: a graph of `mf.compiled` for many shapes is compiled once."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(lambda x, w: x @ w, backend=backend, fullgraph=True)
    w = torch.ones(4, 4)
    for size in (4, 5, 2, 9):
        x = torch.ones(size, 4)
        ti.compiled_for_unknown([x, w], [[True, False], [False, False]])
        assert run(x, w).shape == (size, 4)
    assert len(graphs) == 1


def test_pytree():
    """`_pytree`: episodes, streams and solver states are trees of tensors of any depth."""
    leaves, spec = ti.pytree.tree_flatten({"a": (1, [2]), "b": None})
    assert leaves == [1, 2, None]
    assert ti.pytree.tree_unflatten(leaves, spec) == {"a": (1, [2]), "b": None}
    assert ti.pytree.tree_map_only(int, lambda x: x + 1, (1, "a")) == (2, "a")


# Operators.


def test_kernels_for_many_tensors():
    """`_foreach_norm`, `_foreach_mul`, `_foreach_add`: clipping and steps in a few kernels."""
    several = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])]
    assert ti.norms(several).tolist() == [5.0, 2.0]
    first, second = ti.scaled(several, torch.tensor([0.5, 2.0]))
    assert first.tolist() == [1.5, 2.0] and second.tolist() == [[4.0]]
    first, second = ti.moved_by(several, -0.5, several)
    assert first.tolist() == [1.5, 2.0] and second.tolist() == [[1.0]]


def test_grad_modes():
    """`_set_grad_enabled`, `_set_fwd_grad_enabled`, `_is_fwd_grad_enabled`: no_grad, forward.

    Without them hvp_forward differentiates what a loss computes under `no_grad()`.
    """
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        pass
    assert seen == [ti.set_grad_mode, ti.set_grad_mode]
    modes = ti.GradModes()

    def constant(x):
        before = torch.is_grad_enabled()
        modes.set(False)
        y = x * 3
        modes.set(before)
        return y + x

    one = torch.ones(())
    assert torch.func.jvp(constant, (one,), (one,)) == (4, 1)
    assert torch.is_grad_enabled()


def test_weight_norm():
    """`_weight_norm`: its second derivative is silently wrong in torch, so it is swapped."""
    v, g = torch.randn(3, 2), torch.rand(3, 1)
    layer = nn.Linear(2, 3)
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(layer)
    with Watch():
        normed(torch.ones(2))
    assert ti.weight_norm in seen
    torch.testing.assert_close(ti.weight_norm(v, g, 0), v * g / v.norm(dim=1, keepdim=True))


def test_flash_attention_of_the_cpu():
    """`_scaled_dot_product_flash_attention_for_cpu`: the kernel of `backend="flash"` on a CPU."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    out, lse = ti.flash_cpu(q, k, v, 0.0, True, scale=0.5)[:2]
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    )
    logits = (0.5 * q @ k.mT).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_flash_attention_of_the_cpu_backward():
    """`_scaled_dot_product_flash_attention_for_cpu_backward`: its gradient."""
    q, k, v, do = torch.randn(4, 1, 2, 5, 8).unbind()
    out, lse = ti.flash_cpu(q, k, v, 0.0, False, scale=0.5)[:2]
    got = ti.flash_cpu_backward(do, q, k, v, out, lse, 0.0, False, scale=0.5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attended = (0.5 * leaves[0] @ leaves[1].mT).softmax(-1) @ leaves[2]
    for one, other in zip(got, torch.autograd.grad(attended, leaves, do), strict=True):
        torch.testing.assert_close(one, other)


def names_of(operator) -> list[str]:
    return [argument.name for argument in ti.operator_arguments(operator)]


def test_flash_attention_of_variable_length():
    """`_flash_attention_forward`, `_flash_attention_backward`: `backend="flash"` on CUDA.

    They run on a GPU only; here their arguments are looked at, there `tests/test_cuda.py`.
    """
    names = names_of(ti.flash_varlen.default)
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    names = names_of(ti.flash_varlen_backward.default)
    assert names[:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k",
        "max_q", "max_k", "dropout_p", "is_causal", "rng_state", "unused",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


def test_cudnn_attention():
    """`_scaled_dot_product_cudnn_attention`, `_scaled_dot_product_cudnn_attention_backward`: cuDNN.

    They run on a GPU only; here their arguments are looked at, there `flash.fault`.
    """
    assert names_of(ti.cudnn) == [
        "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal",
        "return_debug_mask", "scale",
    ]  # fmt: skip
    assert names_of(ti.cudnn_backward) == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset",
        "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale",
    ]  # fmt: skip


def test_assert_async():
    """`_assert_async`: a batch that cannot be right stops a run on CUDA, which does not wait."""
    ti.assert_later(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="a row is wrong"):
        ti.assert_later(torch.tensor(False), "a row is wrong")


def test_reduction():
    """`_reduction`: losses that are swapped still take the arguments that `reduction` replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ti.reduction_of(False, None) == "sum"
        assert ti.reduction_of(None, False) == "none"
        assert ti.reduction_of(True, True) == "mean"


def test_schema():
    """`_schema`: writes of a loss are found by it, and dropout in what `mf.compiled` has traced."""
    assert names_of(torch.ops.aten.native_dropout.default) == ["input", "p", "train"]
    first, second, *_ = ti.operator_arguments(torch.ops.aten.add_.Tensor)
    assert first.alias_info.is_write and second.alias_info is None


def test_dynamo_marked_constant():
    """`_dynamo_marked_constant`: Nystrom draws its columns by Python's random when compiled.

    The mark of `torch.compiler.assume_constant_result`, which imports the compiler.
    """
    marked = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(marked) == vars(ti.constant_when_compiled(lambda: 1))


def test_get_current_graph_task_keep_graph():
    """`_get_current_graph_task_keep_graph`: a store drops states that no later pass can ask for."""
    seen = []

    class Asked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(ti.keeps_graph())
            return grad

    y = Asked.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]
