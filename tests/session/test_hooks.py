"""Hooks: nested scopes, and nothing left on the model however a run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError
from armor_recipes.events import Event, LayerStarted, ModuleFinished, SolveProgressed
from armor_recipes.model.hooks import Hooks
from armor_recipes.modifiers.armor import ARMORModifier
from tests.support.engine import hook_count, make_job, make_session, recipe


def ignore_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...


def ignore_after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None: ...


def test_an_inner_scope_removes_its_own_hooks_only() -> None:
    module, hooks = nn.Linear(4, 4), Hooks()
    with hooks:
        hooks.before(module, ignore_before)
        with hooks:
            hooks.before(module, ignore_before)
            hooks.after(module, ignore_after)
            assert (hooks.depth, hooks.active, hook_count(module)) == (2, 3, 3)
        assert (hooks.depth, hooks.active, hook_count(module)) == (1, 1, 1)
    assert (hooks.depth, hooks.active, hook_count(module)) == (0, 0, 0)


def test_hooks_of_others_stay() -> None:
    module, hooks = nn.Linear(4, 4), Hooks()
    module.register_forward_hook(ignore_after)
    with hooks:
        hooks.after(module, ignore_after)
    assert hook_count(module) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_removes_the_hooks_of_all_scopes(error: type[BaseException]) -> None:
    module, hooks = nn.Linear(4, 4), Hooks()

    def fail(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any]) -> None:
        raise error

    def run() -> None:
        with hooks, hooks:
            hooks.before(module, fail)
            module(torch.zeros(4))

    with pytest.raises(error):
        run()
    assert (hooks.depth, hook_count(module)) == (0, 0)


def test_a_hook_outside_of_any_scope_is_refused() -> None:
    module, hooks = nn.Linear(4, 4), Hooks()
    with pytest.raises(RuntimeError, match="outside"):
        hooks.after(module, ignore_after)
    assert hook_count(module) == 0


def test_hooks_see_keyword_arguments() -> None:
    module, hooks, seen = nn.Linear(4, 4), Hooks(), []
    with hooks:
        hooks.before(module, lambda _, args, kwargs: seen.append((args, list(kwargs))))
        module(input=torch.zeros(4))
    assert seen == [((), ["input"])]


def test_nothing_is_left_after_a_run(llama: Path) -> None:
    session = make_session(make_job(recipe(llama)))
    with session:
        session.run()
    assert hook_count(session.model) == 0


@pytest.mark.parametrize("kind", [LayerStarted, SolveProgressed, ModuleFinished])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_when_a_run_breaks_off(llama: Path, kind: type, error: type[BaseException]) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, kind):
            raise error

    session = make_session(make_job(recipe(llama)), observer=stop)
    with pytest.raises(error), session:
        session.run()
    assert hook_count(session.model) == 0
    assert session.hooks.depth == 0


def test_nothing_is_left_when_a_solve_fails(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NumericalError("the loss went up")

    monkeypatch.setattr(ARMORModifier, "solve", fail)
    session = make_session(make_job(recipe(llama)))
    with pytest.raises(NumericalError, match=r"ARMORModifier: model\.layers\.0\..*: the loss went up"), session:
        session.run()
    assert hook_count(session.model) == 0


def test_nothing_is_left_when_a_forward_pass_fails(llama: Path) -> None:
    session = make_session(make_job(recipe(llama)))
    layer = session.stacks.all[0].modules[1]
    calls = 0

    def fail_late(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:  # the probe passes; calibration does not
            raise KeyboardInterrupt

    handle = layer.register_forward_hook(fail_late)
    with pytest.raises(KeyboardInterrupt), session:
        session.run()
    handle.remove()
    assert hook_count(session.model) == 0
