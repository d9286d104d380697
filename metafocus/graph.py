"""The whole hypergradient as one compiled graph.

`torch.compile` cannot look into a custom Function, and a transform around compiled code is an
error. So the hypergradient is traced first, with every estimator, transform and Function in it
running as usual on tensors without values, into one graph of plain operators; this is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafocus import params as pt
from metafocus.closures import Unseen, closures_of
from metafocus.errors import MetafocusError, ProblemError, TransformError
from metafocus.factories import picklable
from metafocus.problem import check_params, is_frozen, refuse_empty
from metafocus.torch_internals import (
    compiled_for_unknown,
    operator_arguments,
    pytree,
    transforming,
    without_values,
)
from metafocus.traces import Dims, Trace, Traces
from metafocus.types import Aux, Params

Hypergrad = Callable[[Params, Any], tuple[Params, tuple[Tensor, Aux]]]

RETRACES = 8
"""How often a change of what is closed over is followed, for one set of shapes."""


@picklable
def compiled(
    hypergradient: Hypergrad,
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool = True,
) -> Hypergrad:
    """Return the hypergradient as one graph, compiled by `torch.compile(fullgraph=True)`.

    The first call with new shapes runs eagerly once, with all checks, then traces and compiles,
    which takes seconds to minutes. Later calls run the graph alone: a NaN inner loss raises
    nothing there, look at `aux.inner_losses`. The result carries no graph.

    Inputs may change: other types or devices are compiled anew. Shapes of the episode may too: the
    second set of shapes is compiled with the sizes that changed as unknowns, and serves all further
    sets where the code allows that; where it does not, each set is compiled. The graphs of the 16
    sets used last are kept. A number, a tensor that is replaced, a module's mode, what is frozen:
    where the losses read one of these and it has changed, the function is compiled anew too. What
    installed packages keep to themselves is not noticed, nor are Python's own random numbers.

    Args:
        hypergradient: `mf.hypergrad(meta_loss)`, of any estimator, also over tasks.
        backend: the `backend` of `torch.compile`. "inductor" needs a C++ compiler for the CPU;
            "aot_eager" and "eager" run the same graph without one, and without the gain.
        mode: the `mode` of `torch.compile`.
        options: the `options` of `torch.compile`.
        dynamic: False compiles each set of shapes by itself, which may give faster code.

    Returns:
        A function like `hypergradient`.

    Warns:
        RecompiledWarning: at the eighth compilation.

    Raises:
        ProblemError: for an empty `outer`, for data that are not tensors or constants, and what
            the eager call raises.
        TransformError: at the first call, for what cannot be compiled: a branch on a value, a
            shape that depends on values, random numbers; inside `vmap`, `torch.func.grad` or
            `torch.compile`; if the back end fails; if what is closed over changes at every call or
            cannot be watched, as an iterator.

    Example:
        >>> import metafocus as mf
        >>> def loss(fast, slow, x):
        ...     return ((fast["w"] - x) ** 2).sum()
        >>> maml = mf.Problem(loss, loss)
        >>> meta = mf.bilevel(maml, solver=mf.SGD(0.1, steps=1), estimator=mf.Unrolled())
        >>> gradient = mf.compiled(mf.hypergrad(meta), backend="eager")
        >>> x = torch.tensor([0.0])
        >>> gradient({"w": torch.tensor([1.0])}, mf.Episode(x, x))[0]
        {'w': tensor([1.2800])}
    """
    if not callable(hypergradient):
        raise ProblemError(
            f"compiled needs mf.hypergrad(meta_loss), got {type(hypergradient).__name__}."
        )
    traces = Traces()
    settings = {"backend": backend, "mode": mode, "options": options}

    def run(outer: Params, episode: Any) -> tuple[Params, tuple[Tensor, Aux]]:
        _refuse_transforms()
        check_params(outer, "outer", "outer parameters")
        refuse_empty(outer, "compiled")
        frozen = frozenset(k for k, v in outer.items() if is_frozen(v))
        at = _with_frozen(hypergradient, frozen)
        outer, episode = pt.detach((outer, episode))
        leaves, spec = pytree.tree_flatten((outer, episode))
        tensors = pt.tensors(leaves)
        around = (spec, frozen, *_ambient(leaves))
        family = (*around, *_family(leaves, len(outer))) if dynamic else None
        key = (*around, *map(_kind, leaves))
        found, trace = traces.find((key, family), tensors)
        now, count = closures_of(hypergradient), 0
        _refuse_unseen(now)
        if trace is not None and trace.closures != now:
            count = trace.retraces + 1
            if count > RETRACES:
                raise TransformError(
                    f"compiled: {_changed(trace.closures, now)} changes from call to call, and "
                    "each change is compiled anew. Pass it in outer or in the episode, as a "
                    "tensor; or write a loss that does not reach it."
                )
            traces.drop(found)
            trace = None
        if trace is None:
            with torch.no_grad():
                eager = _checked(at(outer, episode))
            graph, fits = None, None
            dims = traces.changing(family, tensors) if dynamic and not count else None
            if dims is not None:
                graph, fits = _for_many(at, outer, episode, dims)
            if graph is None:
                graph, _ = _graph(at, outer, episode)
            _refuse_random(graph)
            run = _compile(graph, tensors, None if fits is None else dims, settings)
            # The eager call may change what is closed over: it keeps what a preflight found.
            closures = closures_of(hypergradient)
            trace = Trace(run, pytree.tree_structure(eager), closures, count, fits)
            traces.keep(key if fits is None else family, trace)
        with torch.no_grad():
            outputs = trace.run(*tensors)
        return pytree.tree_unflatten(outputs, trace.out_spec)

    return run


def _with_frozen(hypergradient: Hypergrad, names: frozenset[str]) -> Hypergrad:
    """Return a hypergradient that takes some of its outer parameters for frozen ones."""

    def at(outer: Params, episode: Any) -> tuple[Params, tuple[Tensor, Aux]]:
        frozen = {k: nn.Parameter(outer[k], requires_grad=False) for k in names}
        return hypergradient({k: frozen.get(k, v) for k, v in outer.items()}, episode)

    return at


def _checked(result: Any) -> Any:
    if not (isinstance(result, tuple) and isinstance(result[0], dict)):
        raise ProblemError(
            "compiled needs mf.hypergrad(meta_loss), not the meta loss: the derivative is taken "
            "inside the graph."
        )
    return result


def _compile(
    graph: torch.fx.GraphModule, tensors: list[Tensor], dims: Dims | None, settings: dict[str, Any]
) -> Callable[..., Any]:
    run = torch.compile(graph, fullgraph=True, dynamic=None if dims else False, **settings)
    if dims is not None:
        compiled_for_unknown(tensors, dims)
    try:
        with torch.no_grad():
            run(*tensors)
    except Exception as error:
        raise TransformError(
            f"compiled: backend={settings['backend']!r} failed: {_beginning(error)} The graph "
            'itself is fine: backend="aot_eager" runs it, and "inductor" on a CPU needs a C++ '
            "compiler (g++, or the one that CXX names)."
        ) from error
    return run


def _for_many(
    hypergradient: Hypergrad, outer: Params, episode: Any, dims: Dims
) -> tuple[torch.fx.GraphModule | None, Callable[[Sequence[Tensor]], bool] | None]:
    """Return a graph for other sizes too, and what says for which; None if there is no such one."""
    try:
        return _graph(hypergradient, outer, episode, dims)
    except MetafocusError:
        # Code that needs to know a size, such as a loop over it.
        return None, None


def _graph(
    hypergradient: Hypergrad, outer: Params, episode: Any, dims: Dims | None = None
) -> tuple[torch.fx.GraphModule, Callable[[Sequence[Tensor]], bool]]:
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs, rebuild = pt.partition((outer, episode))

    def flat(*tensors: Tensor) -> list[Tensor]:
        return pt.tensors(hypergradient(*rebuild(tensors)))

    # Tensors without values: what depends on a value raises.
    unreal, fits = without_values(inputs, dims)
    try:
        with torch.no_grad():
            graph = make_fx(flat, tracing_mode="real")(*unreal)
            fits = fits()
    except MetafocusError:
        raise
    except Exception as error:
        raise TransformError(
            f"compiled: the hypergradient runs, but cannot be traced: {type(error).__name__}: "
            f"{_beginning(error)} Usual reasons: a branch on a value or .item() (use torch.where), "
            "a shape that depends on values, as in x[mask] (multiply by the mask), numpy."
        ) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, fits


def _refuse_transforms() -> None:
    if transforming():
        raise TransformError(
            "compiled inside vmap, torch.func.grad, forward mode or torch.compile: the transforms "
            "must be inside the graph. Use mf.compiled(mf.hypergrad(mf.over_tasks(meta))), or the "
            "hypergradient that is not compiled."
        )


def _refuse_unseen(closures: dict[str, Any]) -> None:
    for name, value in closures.items():
        if isinstance(value, Unseen):
            raise TransformError(
                f"compiled: {name} is a {type(value.value).__name__} that may change without "
                "notice: an iterator, or a large container or array. Pass what the losses read of "
                "it in outer or in the episode, as tensors, and write a loss that reaches nothing "
                "else: a function of its arguments, not a method of an object that holds all data."
            )


def _refuse_random(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        names = [argument.name for argument in operator_arguments(node.target)]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        # Attention is tagged as random, and draws numbers with dropout only.
        if "dropout_p" in names and not given.get("dropout_p"):
            continue
        raise TransformError(
            f"compiled: {node.target} draws random numbers, and compiled code draws others than "
            "eager code, in each product of a linear solve anew. Switch dropout off "
            "(model.eval()); draw outside, a random init too, and pass the numbers in the episode "
            "or in outer."
        )


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg()
    if isinstance(x, bool | int | float | str | bytes | type(None)):
        # 0.0 equals -0.0, and NaN differs from itself.
        return type(x), repr(x) if isinstance(x, float) else x
    raise ProblemError(
        f"compiled: outer and episode must hold tensors and constants, got {type(x).__name__}."
    )


def _family(leaves: list[Any], outer: int) -> list[Any]:
    """Return what sets of inputs have in common that one graph may serve."""
    return [
        (x.ndim, x.dtype, x.device, x.is_conj(), x.is_neg())
        if i >= outer and isinstance(x, Tensor) and x.is_contiguous()
        else _kind(x)
        for i, x in enumerate(leaves)
    ]


def _ambient(leaves: list[Any]) -> list[Any]:
    """Return what else decides which operators run: precision, and where new tensors are made."""
    kinds = sorted({x.device.type for x in leaves if isinstance(x, Tensor)})
    autocast = [
        torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k)
        for k in kinds
        if torch.amp.is_autocast_available(k)
    ]
    return [torch.get_default_dtype(), str(torch.get_default_device()), *autocast]


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    odd = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return repr(odd[0]) if odd else "what is closed over"


def _beginning(error: Exception) -> str:
    # The compiler adds its advice and a stack trace after an empty line.
    return " ".join(str(error).partition("\n\n")[0].split())
