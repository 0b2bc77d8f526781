"""Modules solved at once: the same results as one after the other, one error for all, and no thread setting left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from armor_recipes.errors import NumericalError
from armor_recipes.events import Event, ModuleFinished, SolveProgressed
from armor_recipes.modifiers.armor import ARMORModifier
from armor_recipes.modifiers.kinds.changes import ModuleResult
from armor_recipes.plan.memory import _in_turn, bytes_at_once
from armor_recipes.session import Session
from tests.support.engine import ARMOR, hook_count, make_job, make_session, recipe

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "a solve left another number of threads behind"
    assert threads_of_a_new_thread() == 3, "a solve left another default behind"
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def comparable(result: ModuleResult) -> dict[str, Any]:
    """A result without what differs between two equal runs."""
    fields = {name: getattr(result, name) for name in ModuleResult.__slots__ if name not in ("packed", "seconds")}
    return {**fields, "counts": dict(result.counts)}


def run(mapping: dict[str, Any], **options: Any) -> Session:
    with make_session(make_job(mapping), **options) as session:
        session.run()
    return session


@pytest.mark.parametrize("fields", [{}, {"solver": "adam", "iterations": 4}])
def test_solving_at_once_gives_what_solving_in_turn_gives(llama: Path, fields: dict[str, Any]) -> None:
    sessions, events = [], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        seen: list[Event] = []
        sessions.append(run(recipe(llama, ARMORModifier={**ARMOR, **fields}), observer=seen.append))
        events.append(seen)
    one, two = sessions
    assert list(one.results) == list(two.results)
    for name, result in one.results.items():
        assert comparable(result) == comparable(two.results[name])
        assert torch.equal(one.model.get_parameter(f"{name}.weight"), two.model.get_parameter(f"{name}.weight"))
    finished = [[(e.module, e.last_loss) for e in seen if isinstance(e, ModuleFinished)] for seen in events]
    assert finished[0] == finished[1]
    progress = [sorted((e.module, e.done) for e in seen if isinstance(e, SolveProgressed)) for seen in events]
    assert progress[0] == progress[1]


def test_several_are_under_way_together_each_on_one_thread(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve: Any = ARMORModifier.solve
    meeting, seen = threading.Barrier(3, timeout=20), []

    def together(self: Any, module: Any, *args: Any) -> Any:
        if ".mlp." in module.name:
            meeting.wait()  # breaks unless three modules get here
            seen.append(torch.get_num_threads())
        return solve(self, module, *args)

    monkeypatch.setattr(ARMORModifier, "solve", together)
    run(recipe(llama, ARMORModifier={**ARMOR, "targets": [r"re:.*mlp.*"]}))
    assert seen == [1] * 6


def by_part(*parts: str, **propagate: str) -> dict[str, Any]:
    """A modifier for each part of the MLP."""
    return {
        f"ARMORModifier@{part}": {
            **ARMOR,
            "targets": [rf"re:.*mlp\.{part}_proj"],
            "propagate": propagate.get(part, "dense"),
        }
        for part in parts
    }


def test_modifiers_that_need_not_see_each_others_work_are_under_way_together(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve: Any = ARMORModifier.solve
    meeting = threading.Barrier(3, timeout=20)

    def together(self: Any, module: Any, *args: Any) -> Any:
        meeting.wait()  # breaks unless all three parts get here
        return solve(self, module, *args)

    torch.set_num_threads(1)
    alone = run(recipe(llama, **by_part("gate", "up", "down")))
    torch.set_num_threads(3)
    monkeypatch.setattr(ARMORModifier, "solve", together)
    session = run(recipe(llama, **by_part("gate", "up", "down")))
    assert list(session.results) == list(alone.results)
    for name, result in alone.results.items():
        assert comparable(result) == comparable(session.results[name])
    key = "prune_stage.armor_modifiers.ARMORModifier@down"
    assert session.results["model.layers.0.mlp.down_proj"].modifier == key


def test_a_modifier_on_compressed_inputs_waits_and_is_waited_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve: Any = ARMORModifier.solve
    seen: list[tuple[str, str]] = []

    def look(self: Any, module: Any, *args: Any) -> Any:
        part = module.name.rpartition(".")[2]
        seen.append(("start", part))
        found = solve(self, module, *args)
        seen.append(("end", part))
        return found

    monkeypatch.setattr(ARMORModifier, "solve", look)
    run(recipe(llama, **by_part("gate", "up", "down", up="compressed")))
    layer = [(when, f"{part}_proj") for part in ("gate", "up", "down") for when in ("start", "end")]
    assert seen == 2 * layer


def test_the_plan_counts_the_memory_of_solves_that_run_together() -> None:
    assert bytes_at_once([1, 5, 3, 4]) == 12
    assert bytes_at_once([]) == 0


def test_the_plan_counts_results_that_wait_for_the_last_solve_of_a_layer(llama: Path) -> None:
    """Alone in the plan's order; several at once with the dearest first."""
    plan = make_job(recipe(llama, ARMORModifier=ARMOR)).plan
    rows = [row for row in plan.modules if row.layer == 0]
    waits = {row.name: row.d_out * row.d_in * 2 + row.bytes_after for row in rows}
    torch.set_num_threads(1)
    alone = max(row.peak_bytes + sum(waits[r.name] for r in rows[:i]) for i, row in enumerate(rows))
    assert _in_turn(rows, 2) == alone > max(row.peak_bytes for row in rows)
    torch.set_num_threads(7)
    assert _in_turn(rows, 2) == sum(row.peak_bytes for row in rows)
    torch.set_num_threads(3)
    assert bytes_at_once([row.peak_bytes for row in rows]) <= _in_turn(rows, 2) < sum(waits.values()) + alone * 3


def test_the_observer_is_called_by_one_thread_at_a_time(llama: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def observer(_: Event) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.0005)
        inside.pop()

    run(recipe(llama, ARMORModifier={**ARMOR, "iterations": 20, "tolerance": 0}), observer=observer)
    assert max(most) == 1
    assert len(most) > 14 * 20


def test_an_error_in_one_module_names_it_and_stops_the_others(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve: Any = ARMORModifier.solve
    steps: list[str] = []

    def broken(self: Any, module: Any, weight: Any, statistic: Any, progress: Any) -> Any:
        if module.name.endswith("gate_proj"):
            raise NumericalError("it would not converge")
        for step in range(10_000):
            steps.append(module.name)
            progress(step + 1, 10_000, 1.0)
            time.sleep(0.001)
        return solve(self, module, weight, statistic, progress)

    monkeypatch.setattr(ARMORModifier, "solve", broken)
    session = make_session(make_job(recipe(llama, ARMORModifier={**ARMOR, "targets": [r"re:.*mlp.*"]})))
    before = [p.clone() for p in session.model.parameters()]
    with (
        session,
        pytest.raises(NumericalError, match=r": ARMORModifier: model\.layers\.0\.mlp\.gate_proj: it would not"),
    ):
        session.run()
    assert len(steps) < 5_000
    assert all(torch.equal(one, two) for one, two in zip(before, session.model.parameters(), strict=True))
    assert hook_count(session.model) == 0


@pytest.mark.parametrize("failing", ["gate", "up", "down"])  # the first, the middle and the last in order
@pytest.mark.parametrize("error", [NumericalError("no"), KeyboardInterrupt("no"), SystemExit(0)], ids=repr)
def test_the_place_of_a_failure_in_the_order_does_not_matter(
    llama: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    steps: list[str] = []
    under_way = threading.Barrier(3, timeout=20)

    def broken(self: Any, module: Any, weight: Any, statistic: Any, progress: Any) -> Any:
        under_way.wait()
        if module.name.endswith(f"{failing}_proj"):
            raise error
        for step in range(10_000):  # ten seconds and more
            steps.append(module.name)
            progress(step + 1, 10_000, 1.0)
            time.sleep(0.001)
        raise AssertionError("nobody stopped this solve")

    monkeypatch.setattr(ARMORModifier, "solve", broken)
    session = make_session(make_job(recipe(llama, ARMORModifier={**ARMOR, "targets": [r"re:.*layers\.0\.mlp.*"]})))
    with session, pytest.raises(type(error)) as raised:
        session.run()
    assert raised.value is error or isinstance(raised.value.__cause__, NumericalError)
    assert len(steps) < 2_000
    assert session.results == {}
    assert hook_count(session.model) == 0


def test_of_several_errors_the_first_in_order_is_raised(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = threading.Barrier(3, timeout=20)

    def broken(self: Any, module: Any, *_: Any) -> Any:
        under_way.wait()
        time.sleep(0.3 if "gate" in module.name else 0)  # it fails last
        raise NumericalError("it would not converge")

    monkeypatch.setattr(ARMORModifier, "solve", broken)
    session = make_session(make_job(recipe(llama, ARMORModifier={**ARMOR, "targets": [r"re:.*layers\.0\.mlp.*"]})))
    with session, pytest.raises(NumericalError, match=r"layers\.0\.mlp\.gate_proj: it would not"):
        session.run()


def test_after_a_failure_nothing_is_begun_and_no_result_is_used(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve: Any = ARMORModifier.solve
    begun: list[str] = []
    failed = threading.Event()

    def broken(self: Any, module: Any, *args: Any) -> Any:
        begun.append(module.name)
        if module.name.endswith("down_proj"):
            failed.set()
            raise NumericalError("no")
        failed.wait(20)
        time.sleep(0.2)
        return solve(self, module, *args)

    monkeypatch.setattr(ARMORModifier, "solve", broken)
    session = make_session(make_job(recipe(llama)))  # seven modules in a layer, on three threads, the dearest first
    with session, pytest.raises(NumericalError, match=r"down_proj: no"):
        session.run()
    assert len(begun) == 3
    assert session.results == {}


@pytest.mark.parametrize("event", [SolveProgressed, ModuleFinished])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_observer_that_raises_ends_the_run(llama: Path, event: type, error: type[BaseException]) -> None:
    running = threading.active_count()
    seen: list[Event] = []

    def observer(found: Event) -> None:
        seen.append(found)
        if isinstance(found, event):
            raise error("enough")

    mapping = recipe(
        llama, ARMORModifier={**ARMOR, "iterations": 100_000, "tolerance": 0} if event is SolveProgressed else ARMOR
    )
    session = make_session(make_job(mapping), observer=observer)
    with session, pytest.raises(error, match="enough"):
        session.run()
    assert torch.get_num_threads() == 3
    assert threading.active_count() == running
    assert hook_count(session.model) == 0
    assert session.results == {}


def test_a_solver_may_be_asked_again_after_an_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve: Any = ARMORModifier.solve
    left = [1]

    def broken_once(self: Any, *args: Any) -> Any:
        if left:
            left.clear()
            raise NumericalError("only this once")
        return solve(self, *args)

    monkeypatch.setattr(ARMORModifier, "solve", broken_once)
    session = make_session(make_job(recipe(llama)))
    with session, pytest.raises(NumericalError, match="only this once"):
        session.run()
    torch.set_num_threads(1)
    with session:
        assert len(session.run()) == 14
    torch.set_num_threads(3)
