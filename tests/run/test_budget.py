"""A recipe with a budget, end to end: measured once, planned anew, told, repeated from what it writes, kept for the next run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from armor_recipes.checkpoint.files import read_header
from armor_recipes.errors import PlanError
from armor_recipes.events import PhaseStarted
from armor_recipes.integrations.models import load_model
from armor_recipes.modifiers.armor.sizes import RATE, ladder
from armor_recipes.run import apply, execute, prepare
from armor_recipes.run.job import read_recipe
from armor_recipes.run.measurements import cache_folder
from armor_recipes.run.settling import is_settled, settled_before
from tests.support.engine import recipe

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Of which two processes have whole blocks: sides halved are multiples of 8.
SERVED: dict[str, Any] = {**SIZES, "hidden_size": 96, "intermediate_size": 224, "num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "gqa-odd-sides": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 88}, intermediate_size=168, num_key_value_heads=2, head_dim=12)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)),
    "served": lambda: LlamaForCausalLM(LlamaConfig(**SERVED)),
    "served-odd": lambda: LlamaForCausalLM(LlamaConfig(**{**SERVED, "intermediate_size": 232})),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SERVED, pad_token_id=0)),
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

#: Models of other shapes: one key-value head for five and an MLP 2.7 times as wide; heads wider than the stream and an MLP of 8
#: times a prime.
SHAPED: dict[str, Any] = {
    "embedded": None,
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **{**SIZES, "hidden_size": 160, "num_attention_heads": 5},
            intermediate_size=432,
            num_key_value_heads=1,
            head_dim=32,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **{**SIZES, "hidden_size": 120, "num_attention_heads": 6},
            intermediate_size=328,
            num_key_value_heads=2,
            head_dim=24,
        )
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(folder: Path, kind: str = "gqa-odd-sides") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {**MODELS, **SHAPED}[kind]().to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def budgeted(model: Path, output: Path, asked: Any = None, **fields: Any) -> dict[str, Any]:
    asked = {"budget": 0.8, "windows": 3} if asked is None else asked
    own = {"targets": ["preset:attention", "preset:mlp"], "block_size": asked, "iterations": 2, **fields}
    return {**recipe(model, output, ARMORModifier=own), "moe": {"minimum_tokens": 1, "below": "layer-moment"}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("kind", ["gqa-odd-sides", "gpt2", "mixtral"])
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


@pytest.mark.parametrize("kind", SHAPED)
def test_three_quarters_of_models_of_other_shapes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is kept and used, sizes divide, and by the measured costs they are better than one size in as many bytes.

    Measured again, they are the same.
    """
    model = "builtin:stdlib-llama" if kind == "embedded" else str(saved(tmp_path / "m", kind))
    mapping = budgeted(Path(model), tmp_path / "out", {"budget": 0.75, "windows": 2}, iterations=12)
    found = settled_before(prepare(read_recipe({**mapping, "model": model})), lambda _: None)
    rows, totals = found.plan.modules, found.plan.totals
    assert 0.74 < totals.bytes_after / totals.bytes_before <= 0.75
    assert all(
        side % size == 0 for row in rows for side, size in zip((row.d_out, row.d_in), row.block_size, strict=True)
    )
    assert all(row.stored_as == "packed" and row.bytes_after < row.bytes_before for row in rows)
    (file,) = cache_folder().iterdir()
    costs = json.loads(file.read_text())["costs"]
    one = max(n for n in (8, 16, 24, 32) if fits(rows, n))
    assert felt(rows, costs, {row.name: row.block_size for row in rows}) < felt(
        rows, costs, dict.fromkeys(costs, (one, one))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = settled_before(prepare(read_recipe({**mapping, "model": model})), lambda _: None)
    assert again.plan == found.plan


def fits(rows: Any, size: int) -> bool:
    """Whether blocks of one size throughout divide all sides, in no more bytes than the rows take."""
    values = sum((row.d_out + row.d_in) * size for row in rows)
    taken = sum(row.factor_bytes for row in rows)
    return 2 * values <= taken and all(side % size == 0 for row in rows for side in (row.d_out, row.d_in))


def felt(rows: Any, costs: dict[str, float], sizes: dict[str, tuple[int, int]]) -> float:
    """What errors at these sizes cost, by the law that sizes are chosen by."""
    total = 0.0
    for row in rows:
        rungs = ladder(row.shape)
        assert rungs is not None
        share = sizes[row.name][0] / row.d_in + sizes[row.name][1] / row.d_out
        total += costs[row.name] * math.exp(-RATE * (share - rungs.measured.share))
    return total


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
    assert first.estimate.cpu_seconds_by["measuring"] > 0
    assert "measuring" not in second.estimate.cpu_seconds_by  # a plan is of what is run
    assert second.report["cpu_seconds_estimated"] == round(sum(second.estimate.cpu_seconds_by.values()), 1)
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
    with pytest.raises(
        PlanError, match=r"no block size packs .*down_proj .*, with whole blocks for each process of `serve`"
    ):
        prepare(read_recipe(served(saved(tmp_path / "odd", "served-odd"), tmp_path / "out", 4)))
    with pytest.raises(PlanError, match=r"serve.tensor_parallel 3: .* 4 heads and 2 key-value heads cannot be split"):
        prepare(read_recipe(served(saved(tmp_path / "s", "served"), tmp_path / "out", 3)))


def served(model: Path, output: Path, *ways: int, **fields: Any) -> dict[str, Any]:
    return {**budgeted(model, output, **fields), "serve": {"tensor_parallel": list(ways)}}


def test_a_served_budget_gives_one_size_to_what_runs_as_one_layer_and_whole_blocks_to_each_process(
    tmp_path: Path,
) -> None:
    model, out = saved(tmp_path / "m", "served"), tmp_path / "out"
    result = apply(served(model, out, 1, 2))
    totals = result.plan.totals
    assert 0.75 < totals.bytes_after / totals.bytes_before <= 0.8
    sizes = {row.name: row.block_size for row in result.plan.modules}
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({sizes[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({sizes[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
        for inner, sides in {
            "self_attn.k": (24, 96),
            "self_attn.o": (96, 48),
            "mlp.up": (112, 96),
            "mlp.down": (96, 112),
        }.items():
            assert not any(side % size for side, size in zip(sides, sizes[f"{layer}.{inner}_proj"] or (), strict=True))
    assert len(set(sizes.values())) > 2
    again = apply(str(out / "recipe.yaml"), output=str(tmp_path / "again"))
    assert {row.name: row.block_size for row in again.plan.modules} == sizes
    apply(budgeted(model, tmp_path / "free"))
    assert len(list(cache_folder().iterdir())) == 1  # one measurement, served or not


def test_a_served_budget_keeps_blocks_in_the_parts_of_fused_layers(tmp_path: Path) -> None:
    mapping = served(saved(tmp_path / "m", "phi3"), tmp_path / "out", 1, 2)
    rows = settled_before(prepare(read_recipe(mapping)), lambda _: None).plan.modules
    parts = {"qkv_proj": 24, "gate_up_proj": 112}  # rows of the smallest part, in one of two processes
    fused = [(row, parts[last]) for row in rows if (last := row.name.rpartition(".")[2]) in parts]
    assert len(fused) == 4
    assert all(part % (row.block_size or (0, 0))[0] == 0 for row, part in fused)


def test_a_phase_says_that_it_is_measured(tmp_path: Path) -> None:
    events: list[Any] = []
    apply(budgeted(saved(tmp_path / "m"), tmp_path / "out"), observer=events.append)
    names = [event.name for event in events if isinstance(event, PhaseStarted)]
    assert names.index("measure") < names.index("compress")
    assert read_header(tmp_path / "out")
