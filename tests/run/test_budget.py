"""A recipe with a budget, end to end: measured once, planned anew, told, repeated from what it writes, kept for the next run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from armor_recipes.checkpoint.files import read_header
from armor_recipes.errors import PlanError
from armor_recipes.events import PhaseStarted
from armor_recipes.integrations.models import load_model
from armor_recipes.run import apply, execute, prepare
from armor_recipes.run.job import read_recipe
from armor_recipes.run.measurements import cache_folder
from armor_recipes.run.settling import is_settled, settled_before
from tests.support.engine import recipe

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "gqa-odd-sides": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 88}, intermediate_size=168, num_key_value_heads=2, head_dim=12)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=96,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        )
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(folder: Path, kind: str = "gqa-odd-sides") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def budgeted(model: Path, output: Path, asked: Any = None, **fields: Any) -> dict[str, Any]:
    asked = {"budget": 0.8, "windows": 3} if asked is None else asked
    own = {"targets": ["preset:attention", "preset:mlp"], "block_size": asked, "iterations": 2, **fields}
    return {**recipe(model, output, ARMORModifier=own), "moe": {"minimum_tokens": 1, "below": "layer-moment"}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("kind", MODELS)
def test_a_budget_is_spent_and_told(kind: str, tmp_path: Path) -> None:
    model, out = saved(tmp_path / "m", kind), tmp_path / "out"
    mapping = budgeted(model, out, propagate="dense", gradient_power=0.5)
    job = prepare(read_recipe(mapping))
    assert not is_settled(job)
    assert any("block_size is not settled" in note for note in job.plan.notes)
    result = execute(job)
    totals = result.plan.totals
    assert 0.7 < totals.bytes_after / totals.bytes_before <= 0.8
    assert len({row.block_size for row in result.plan.modules}) > 2
    manifest = json.loads((out / "armor_manifest.json").read_text())
    assert {n: tuple(m["block_size"]) for n, m in manifest["modules"].items()} == {
        row.name: row.block_size for row in result.plan.modules
    }
    (measured,) = result.report["measured"]
    assert (measured["windows"], measured["kept"], measured["notes"]) == (3, False, [])
    assert list(measured["costs"]) == [row.name for row in result.plan.modules]
    assert not any("not settled" in note for note in result.plan.notes)
    assert "sizes:" not in (out / "README.md").read_text()
    loaded = load_model(job.source, device=job.device)
    assert loaded is not None


def test_what_a_run_writes_repeats_it_bit_for_bit_without_measuring(tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    apply(budgeted(saved(tmp_path / "m"), out))
    job = prepare(read_recipe(out / "recipe.yaml", output=str(again)))
    assert is_settled(job)
    result = execute(job)
    assert "measured" not in result.report
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (out / "armor_manifest.json").read_bytes() == (again / "armor_manifest.json").read_bytes()


def test_a_measurement_is_kept_and_a_damaged_or_foreign_one_is_taken_again_and_told(tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    first = apply(budgeted(model, tmp_path / "1"))
    (file,) = cache_folder().iterdir()
    content = file.read_text()
    second = apply(budgeted(model, tmp_path / "2"))
    assert second.report["measured"][0]["kept"]
    assert second.report["measured"][0]["costs"] == first.report["measured"][0]["costs"]
    foreign, broken = json.loads(content), json.loads(content)
    foreign["of"]["model"] = "another"
    broken["costs"][next(iter(broken["costs"]))] = -1.0
    for text, told in (
        (json.dumps(foreign), "another measurement"),
        (json.dumps(broken), "damaged"),
        ("{", "cannot be"),
    ):
        file.write_text(text)
        phases: list[str] = []
        job = prepare(read_recipe(budgeted(model, tmp_path / "3")))
        found = settled_before(job, lambda event, seen=phases: seen.append(getattr(event, "name", "")))  # type: ignore[misc]
        assert found.plan == second.plan or found.plan.rows == second.plan.rows
        assert any(told in name and "measured again" in name for name in phases)
        assert file.read_text() == content
    assert settled_before(prepare(read_recipe(budgeted(model, "o", {"budget": 0.85, "windows": 3}))), print).plan
    assert len(list(cache_folder().iterdir())) == 1  # another budget of the same measurement
    assert settled_before(prepare(read_recipe(budgeted(model, "o", seed=1))), lambda _: None).plan
    assert len(list(cache_folder().iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_told_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = apply(budgeted(saved(tmp_path / "m"), tmp_path / "out"))
    assert any("is not kept for later runs" in note for note in result.report["measured"][0]["notes"])


def test_a_model_in_memory_is_measured_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    mapping = budgeted(folder, tmp_path / "out")
    job = prepare(read_recipe(mapping))
    model = load_model(job.source, device=job.device)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 4
    changed = execute(job, model)
    stock = apply(budgeted(folder, tmp_path / "stock"))
    assert changed.report["measured"][0]["costs"] != stock.report["measured"][0]["costs"]


def test_what_cannot_be_had_is_told_with_its_line_before_weights_are_read(tmp_path: Path) -> None:
    mapping = budgeted(saved(tmp_path / "m"), tmp_path / "out", {"budget": 0.55})
    with pytest.raises(
        PlanError, match=r"ARMORModifier: block_size: budget 0.55 is less than .*: give 0\.\d+ to 0\.\d+"
    ):
        prepare(read_recipe(mapping))
    served = {**budgeted(saved(tmp_path / "m"), tmp_path / "out"), "serve": {"tensor_parallel": [1]}}
    with pytest.raises(PlanError, match="`serve` needs one size for modules that run as one layer"):
        prepare(read_recipe(served))


def test_a_phase_says_that_it_is_measured(tmp_path: Path) -> None:
    events: list[Any] = []
    apply(budgeted(saved(tmp_path / "m"), tmp_path / "out"), observer=events.append)
    names = [event.name for event in events if isinstance(event, PhaseStarted)]
    assert names.index("measure") < names.index("compress")
    assert read_header(tmp_path / "out")
