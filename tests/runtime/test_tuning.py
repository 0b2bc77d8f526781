"""Plans of the GPU's kernels: measured, kept with the card's name, and read again; a damaged file is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from armor_recipes.runtime import tuning
from armor_recipes.runtime.tuning import CorePlan, FactorPlan, Plan
from tests.runtime.test_kernel import packed

CARD = torch.device("cuda")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_card", lambda device: "NVIDIA Made Up 80GB" if device.type == "cuda" else "cpu")
    tuning.forget()
    yield tmp_path / "armor-recipes" / "gpu-plans" / "NVIDIA-Made-Up-80GB.json"
    tuning.forget()


def measured(times: dict[Plan, float]) -> Callable[[Callable[[], object]], float]:
    """Microseconds by the plan that a call returns."""
    return lambda run: times[run()]  # type: ignore[index]


def test_the_fastest_is_kept_on_disk_and_read_again(file: Path) -> None:
    plans: list[Plan] = [CorePlan(1, 4, 1), CorePlan(2, 8, 3), CorePlan(4, 1, 1, fused=True)]
    times: dict[Plan, float] = dict(zip(plans, (3.0, 1.0, 2.0), strict=True))
    assert tuning.tune(plans, "core a", CARD, lambda plan: plan, measured(times)) == times
    factor = FactorPlan(32, 16, 2)
    tuning.tune([factor], "factor b", CARD, lambda plan: plan, measured({factor: 1.0}))
    tuning.forget()
    assert tuning.known(CARD) == {"core a": plans[1], "factor b": factor}
    assert json.loads(file.read_text("utf-8"))["of"]["card"] == "NVIDIA Made Up 80GB"


def test_what_a_card_cannot_run_is_told_and_not_taken() -> None:
    from triton.runtime.errors import OutOfResources

    plans: list[Plan] = [CorePlan(1, 4, 1), CorePlan(2, 8, 3)]

    def measure(run: Callable[[], object]) -> float:
        if run() == plans[0]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    times = tuning.tune(plans, "core a", CARD, lambda plan: plan, measure)
    assert "shared memory" in str(times[plans[0]])
    assert tuning.known(CARD) == {"core a": plans[1]}


def test_plans_of_other_kernels_are_not_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = FactorPlan(32, 16, 2)
    tuning.tune([plan], "factor b", CARD, lambda plan: plan, measured({plan: 1.0}))
    monkeypatch.setattr(tuning, "KERNELS", tuning.KERNELS + 1)
    tuning.forget()
    assert tuning.known(CARD) == {}


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"of": {}}', b"\xff"])
def test_a_damaged_file_is_told(file: Path, damage: bytes) -> None:
    plan = FactorPlan(32, 16, 2)
    tuning.tune([plan], "factor b", CARD, lambda plan: plan, measured({plan: 1.0}))
    content = json.loads(file.read_text("utf-8"))
    content["plans"]["factor b"]["threads"] = 3
    for written in (json.dumps(content).encode(), damage):
        file.write_bytes(written)
        tuning.forget()
        if written == b'{"of": {}}':
            assert tuning.known(CARD) == {}
            continue
        with pytest.warns(UserWarning, match="cannot be read .* the defaults are taken"):
            assert tuning.known(CARD) == {}


def test_nothing_is_read_or_written_for_other_devices(file: Path) -> None:
    plan = FactorPlan(32, 16, 2)
    tuning.tune([plan], "factor b", torch.device("cpu"), lambda plan: plan, measured({plan: 1.0}))
    assert not file.parent.exists()


def test_defaults_follow_from_the_shape() -> None:
    layer = packed(4096, 512, (128, 128), torch.bfloat16)
    plan = tuning.core_plan(layer, 1)
    assert plan == tuning.core_plans(layer)[0] == CorePlan(1, 1, 1)
    assert tuning.core_plan(packed(32, 2048, (16, 16), torch.bfloat16), 1).splits == 8
    assert not any(isinstance(plan, CorePlan) and plan.fused for plan in tuning.core_plans(layer))
    assert tuning.factor_plan(layer.a, 1).tokens == 16
    assert tuning.factor_plan(layer.a, 2000) == FactorPlan(128, 64, 4)
    assert tuning.core_key(layer, 3) == tuning.core_key(layer, 8) != tuning.core_key(layer, 9)
    assert tuning.factor_key(layer.a, 300) == tuning.factor_key(layer.a, 512) != tuning.factor_key(layer.a, 513)
