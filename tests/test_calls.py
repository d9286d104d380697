"""Changes that last as long as a block, and what is undone where an exit was interrupted."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from interrupts import Interrupt
from torch import nn

from metafocus import calls
from metafocus.calls import blocks, owners

A = calls.ABSENT


def broken_exit(manager, function="_undone"):
    """Leave a block by an interrupt at the first line of an exit; return the exception."""
    manager.__enter__()
    with pytest.raises(KeyboardInterrupt) as caught, Interrupt(1, function=function):
        manager.__exit__(None, None, None)
    return caught


def is_clean() -> bool:
    return not blocks._UNDO and not owners._OWNERS and calls.current() is None


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_changes_of_attributes_and_entries(error):
    layer, table, thing = nn.Linear(1, 1), {"a": 1, "b": 2}, SimpleNamespace(x=1)
    places = (
        (layer, "training", False),
        (layer, "forward", len),
        (table, "a", 3),
        (table, "b", A),
        (table, "c", 4),
        (thing, "x", 5),
    )
    try:
        with calls.changed(*places):
            assert not layer.training and layer.forward is len
            assert table == {"a": 3, "c": 4} and thing.x == 5
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert layer.training and "forward" not in vars(layer)
    assert table == {"a": 1, "b": 2} and thing.x == 1 and is_clean()


def test_a_place_keeps_its_position_in_a_dict():
    """Hooks run in the order of their table."""
    table = {"a": 1, "b": 2}
    with calls.changed((table, "a", 3)):
        assert list(table) == ["a", "b"]
    assert list(table) == ["a", "b"]


def test_changes_nest():
    table = {"a": 0}
    with calls.changed((table, "a", 1)), calls.changed((table, "a", 2)):
        assert table == {"a": 2}
    assert table == {"a": 0} and is_clean()


def test_an_interrupted_exit_is_made_good_by_the_next_call():
    done = []
    broken_exit(calls.undone(lambda: done.append(1)))
    assert done == []
    with calls.inside():
        assert done == [1]
    assert is_clean()


def test_an_interrupted_exit_is_made_good_by_the_call_around_it():
    table = {"a": 0}
    broken_exit(calls.changed((table, "a", 1)))
    assert table == {"a": 0} and is_clean()


def test_an_interrupted_exit_is_made_good_by_the_next_change_of_the_place():
    table = {"a": 0}
    with calls.inside():
        broken_exit(calls.changed((table, "a", 1)))
        with calls.changed((table, "a", 2)):
            assert table == {"a": 2}
        assert table == {"a": 0}
    assert is_clean()


def test_what_a_user_has_changed_since_stays():
    table = {"a": 0}
    with calls.inside():
        broken_exit(calls.changed((table, "a", 1)))
        assert table == {"a": 1}
        table["a"] = 7
    assert table == {"a": 7} and is_clean()


def test_what_is_newer_is_undone_first():
    done = []
    with calls.undone(lambda: done.append("outer")):
        broken_exit(calls.undone(lambda: done.append("inner")))
        assert done == []
    assert done == ["inner", "outer"] and is_clean()


def test_a_block_that_is_dropped_is_closed():
    table = {"a": 0}
    manager = calls.changed((table, "a", 1))
    manager.__enter__()
    del manager
    assert table == {"a": 0} and is_clean()


def test_weights_are_put_back_even_where_torch_is_interrupted():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1))
    model[2].weight = model[0].weight
    own = {k: v for k, v in (*model.named_parameters(), *model.named_buffers())}
    given = {"0.weight": torch.zeros(1, 1), "1.running_mean": torch.ones(1)}
    with pytest.raises(KeyboardInterrupt), calls.holding(model, given, tie_weights=True):
        assert model[2].weight is given["0.weight"]
        # As after an interrupt in torch's exit: nothing is swapped back.
        for module in model:
            module.register_parameter("bias", nn.Parameter(torch.zeros(1)))
        raise KeyboardInterrupt
    assert all(dict(model.named_parameters())[k] is own[k] for k in ("0.weight", "1.weight"))
    assert model[2].weight is own["0.weight"] and model[1].running_mean is own["1.running_mean"]
    # What was not swapped is not touched.
    assert model[0].bias is not own["0.bias"]


def test_scoped_variables():
    depth = calls.Scoped(0)
    with depth.set(1):
        with pytest.raises(RuntimeError), depth.set(2):
            assert depth.get() == 2
            raise RuntimeError
        assert depth.get() == 1
        other = []
        thread = threading.Thread(target=lambda: other.append(depth.get()))
        thread.start()
        thread.join()
        assert other == [0]
        broken_exit(depth.set(3), "_set")
        # The block is over, whatever its exit has done.
        assert depth.get() == 1
    assert depth.get() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_attempt_that_fails_has_drawn_nothing(error):
    own, inner = torch.Generator(), torch.Generator()

    @calls.attempted
    def draw(generator, fail):
        calls.draws_from(inner)
        values = torch.rand(1).item(), torch.rand(1, generator=generator).item()
        values += (torch.rand(1, generator=inner).item(),)
        if fail:
            torch.set_grad_enabled(False)
            torch.overrides.TorchFunctionMode().__enter__()
            torch.autocast("cpu").__enter__()
            torch._C.DisableTorchFunction().__enter__()
            raise error
        return values

    before = [torch.get_rng_state(), own.get_state(), inner.get_state()]
    with pytest.raises(error):
        draw(own, True)
    after = [torch.get_rng_state(), own.get_state(), inner.get_state()]
    assert all(map(torch.equal, before, after))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch._C._is_torch_function_enabled()
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0
    assert not torch.overrides._get_current_function_mode_stack()
    draw(own, False)
    after = [torch.get_rng_state(), own.get_state(), inner.get_state()]
    assert not any(map(torch.equal, before, after)) and is_clean()
