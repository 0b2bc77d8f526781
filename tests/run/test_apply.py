"""`armor_recipes.run.apply`: what it takes, what it gives, and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.errors import InputError, PlanError, RecipeError
from armor_recipes.events import Event, LayerStarted, ModuleFinished, PhaseStarted, SolveProgressed
from armor_recipes.integrations.transformers import load
from armor_recipes.run import Result, apply
from armor_recipes.run.job import read_recipe
from tests.support.engine import ALL, ARMOR, ATTENTION, MLP, hook_count, logits, make_model, recipe, save_model


def stock(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


# --- forms of a recipe and a model -------------------------------------------------------------------------------------


def test_every_form_of_a_recipe_gives_the_same(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama, tmp_path / "zero")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping))
    over = tmp_path / "over.yaml"
    over.write_text("calibration: {batch_size: 2}\n")
    forms: list[Any] = [mapping, file, str(file), [file, over], read_recipe(mapping)]
    found = set()
    for index, form in enumerate(forms):
        output = None if index == 4 else tmp_path / f"out{index}"
        found.add((apply(form, output=output).output / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_the_model_argument_replaces_the_recipes(llama: Path, tmp_path: Path) -> None:
    mapping = recipe("nowhere", tmp_path / "out")
    models: list[str | Path] = [str(llama), llama]
    for number, model in enumerate(models):
        result = apply(mapping, model, output=tmp_path / str(number))
        assert result.plan.model == str(llama)
    with pytest.raises(InputError, match=r"'nowhere' cannot be read .there is no such folder, and as a hub id: "):
        apply(mapping)
    for name in ("./nowhere", str(tmp_path / "nowhere"), "some/where/else"):  # none of a hub
        with pytest.raises(InputError, match=rf"'{name}' cannot be read: there is no such folder .paths are relative"):
            apply({**mapping, "model": name})


def test_a_model_in_memory_is_compressed_in_place(llama: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    result = apply(recipe(llama, tmp_path / "out"), model)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(logits(load(result.output, dtype=torch.float32)), logits(model))
    from_folder = apply(recipe(llama, tmp_path / "two"))
    assert tensor_hashes(result.output) == tensor_hashes(from_folder.output)
    assert hook_count(model) == 0


def test_a_model_in_memory_is_rounded_to_what_is_stored(llama: Path, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)  # as after training: numbers that bfloat16 does not hold
    result = apply(recipe(llama, tmp_path / "out"), model)
    assert torch.equal(logits(load(result.output, dtype=torch.float32)), logits(model))


def test_a_model_loaded_in_half_precision_is_computed_in_full(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    result = apply(recipe(llama, tmp_path / "out"), model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tensor_hashes(result.output) == tensor_hashes(apply(recipe(llama, tmp_path / "two")).output)


def test_a_model_whose_rotary_frequencies_were_rounded_is_refused(llama: Path, tmp_path: Path) -> None:
    model: Any = make_model("llama")
    with pytest.raises(PlanError, match=r"rotary_emb\.(original_)?inv_freq in torch\.bfloat16.*from_pretrained"):
        apply(recipe(llama, tmp_path / "out"), model.to(torch.bfloat16))


def test_another_model_in_memory_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"has no model\.layers\.0\.self_attn\.q_proj"):
        apply(recipe(llama, tmp_path / "out"), make_model("gpt-neox"))
    with pytest.raises(PlanError, match=r"k_proj \(16, 32\), planned was \(32, 32\)"):
        apply(recipe(llama, tmp_path / "out"), make_model("llama-gqa-tied"))
    with pytest.raises(RecipeError, match="model is a Linear: give a hub id"):
        apply(recipe(llama, tmp_path / "out"), torch.nn.Linear(4, 4))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_loaded_recipe_takes_no_overrides(llama: Path) -> None:
    loaded = read_recipe(recipe(llama))
    for options in ({"output": "x"}, {"overrides": ["a=1"]}):
        with pytest.raises(RecipeError, match="not with a loaded Recipe"):
            apply(loaded, **options)


# --- the result ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("result") / "out"
    modifiers = {"ARMORModifier": {**ARMOR, "targets": [ATTENTION]}, "NoWagModifier": {"targets": [MLP]}}
    return apply(recipe(llama, folder, **modifiers))


def test_the_result_tells_what_was_done(result: Result) -> None:
    assert list(result.modules) == [m.name for m in result.plan.modules]
    for name, module in result.modules.items():
        assert module.name == name
        assert (module.packed is None) == ("mlp" in name)
        assert module.stop_reason in ("iterations", "tolerance", "closed form")
        assert module.iterations == len(module.losses) - 1
        assert module.tokens == 5 * 12
        assert 0 < module.error < 1
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    assert result.report == json.loads((result.output / "report.json").read_text())


def test_the_manifest_says_the_same_as_the_result(result: Result) -> None:
    manifest = json.loads((result.output / "armor_manifest.json").read_text())
    assert list(manifest["modules"]) == list(result.modules)
    for name, row in manifest["modules"].items():
        module = result.modules[name]
        assert (row["first_loss"], row["last_loss"]) == (module.losses[0], module.losses[-1])
        assert (row["stored_loss"], row["relative_error"]) == (module.stored_loss, module.error)
        assert row["counts"] == dict(module.counts)
    assert manifest["tensors"] == tensor_hashes(result.output)
    assert manifest["evaluation"] == {"before": None, "after": None}
    assert [row["modifiers"] for row in manifest["calibration"]] == [
        ["prune_stage.armor_modifiers.ARMORModifier", "prune_stage.armor_modifiers.NoWagModifier"]
    ]


def test_the_card_says_that_nothing_was_evaluated_and_what_is_dense(result: Result) -> None:
    card = (result.output / "README.md").read_text()
    assert "Nothing was evaluated: the recipe has no `evaluation`." in card
    assert "6 of these weights are stored dense" in card
    assert "import armor_recipes" in card


def test_the_written_recipe_runs_again(result: Result, tmp_path: Path) -> None:
    again = apply(result.output / "recipe.yaml", output=tmp_path / "again")
    assert tensor_hashes(again.output) == tensor_hashes(result.output)
    one, two = (json.loads((r.output / "armor_manifest.json").read_text()) for r in (result, again))
    assert one == two


def test_counts_reach_the_manifest(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data[:3] = 0  # three input channels of q, k and v are dead
    model.save_pretrained(tmp_path / "m")
    result = apply(recipe(tmp_path / "m", tmp_path / "out"))
    manifest = json.loads((result.output / "armor_manifest.json").read_text())
    for name in ("q_proj", "k_proj", "v_proj"):
        assert manifest["modules"][f"model.layers.0.self_attn.{name}"]["counts"] == {"dead_channels": 3}
    assert sum(bool(row["counts"]) for row in manifest["modules"].values()) == 3


def test_events_come_in_order(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    apply(recipe(llama, tmp_path / "out"), observer=events.append)
    phases = [event.name for event in events if isinstance(event, PhaseStarted)]
    assert phases == ["preflight", "tokenize", "load weights", "compress", "stage prune_stage", "save", "verify"]
    assert [e.index for e in events if isinstance(e, LayerStarted)] == [0, 1]
    finished = [e for e in events if isinstance(e, ModuleFinished)]
    assert [e.share for e in finished] == sorted(e.share for e in finished)
    assert finished[-1].share == pytest.approx(1)
    assert {e.at_most for e in events if isinstance(e, SolveProgressed)} == {3}


# --- what is written ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen2-bias", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_load_again_and_save_the_same(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(kind, dtype)
    folder = save_model(tmp_path / "m", kind, dtype)
    result = apply(recipe(folder, tmp_path / "out"), model)
    loaded = stock(result.output)
    assert torch.equal(logits(loaded), logits(model))
    stored = AutoModelForCausalLM.from_pretrained(result.output)  # as stored: dtype auto
    stored.save_pretrained(tmp_path / "again")
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(result.output)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-neox", "opt"])
def test_dense_output_needs_no_package(kind: str, tmp_path: Path) -> None:
    targets = {"gpt-neox": [r"re:.*mlp\.dense.*"], "opt": [r"re:.*\.fc[12]$"]}.get(kind, [ALL])
    folder, model = save_model(tmp_path / "m", kind), make_model(kind)
    mapping = recipe(folder, tmp_path / "out", ARMORModifier={**ARMOR, "targets": targets})
    mapping["output"]["format"] = "dense"
    result = apply(mapping, model)
    assert "quantization_config" not in json.loads((result.output / "config.json").read_text())
    assert "import armor_recipes" not in (result.output / "README.md").read_text()
    loaded = stock(result.output)
    assert not any("armor" in type(module).__module__ for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(model))
    assert all(module.packed is None for module in result.modules.values())


def test_plain_pruning_leaves_two_of_four_untouched(llama: Path, tmp_path: Path) -> None:
    result = apply(recipe(llama, tmp_path / "out", NoWagModifier={"targets": [ALL]}))
    before, after = load_file(llama / "model.safetensors"), load_file(result.output / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if name.removesuffix(".weight") in result.modules:
            kept = weight != 0
            assert (kept.view(len(weight), -1, 4).sum(-1) == 2).all()
            assert torch.equal(weight[kept], before[name][kept])
        else:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("stored", "compute"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float16"),
        ("float16", "auto"),
        ("bfloat16", "bfloat16"),
        ("auto", "float16"),
    ],
)
def test_any_pair_of_dtypes_verifies(llama: Path, tmp_path: Path, stored: str, compute: str) -> None:
    mapping = recipe(
        llama, tmp_path / "out", ARMORModifier={**ARMOR, "targets": [ATTENTION]}, NoWagModifier={"targets": [MLP]}
    )
    mapping["model"] = {"id": str(llama), "dtype": stored, "compute_dtype": compute}
    result = apply(mapping)
    wanted = torch.bfloat16 if stored == "auto" else getattr(torch, stored)
    tensors = load_file(result.output / "model.safetensors").values()
    assert {t.dtype for t in tensors if t.is_floating_point()} == {wanted}


def test_numbers_that_do_not_fit_are_told_before_any_work(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.embed_tokens.weight.data[3, 4] = 1e30
    model.save_pretrained(tmp_path / "m")
    mapping = recipe(tmp_path / "m", tmp_path / "out")
    mapping["model"] = {"id": str(tmp_path / "m"), "dtype": "float16"}
    with pytest.raises(InputError, match=r"1 numbers of model\.embed_tokens\.weight do not fit torch\.float16"):
        apply(mapping)


def test_optional_modifiers_that_match_nothing_leave_the_model_as_it_is(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "targets": ["re:.*experts.*"], "optional": True})
    result = apply(mapping)
    assert result.modules == {}
    assert tensor_hashes(result.output) == tensor_hashes(llama)


def test_evaluation_before_and_after(tmp_path: Path) -> None:
    mapping = recipe("builtin:stdlib-llama", tmp_path / "out", NoWagModifier={"targets": [r"re:.*layers\.0\..*_proj$"]})
    mapping["evaluation"] = {"perplexity": {"dataset": "builtin:pydoc-heldout", "sequence_length": 32, "windows": 2}}
    result = apply(mapping)
    before, after = result.perplexity_before, result.perplexity_after
    assert before is not None
    assert after is not None
    assert (before.windows, before.tokens, before.sha256) == (2, 62, after.sha256)
    assert before.value < after.value
    assert f"{after.value:.3f}" in (result.output / "README.md").read_text()


# --- where it goes -----------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_told(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "iterations": 0})
    first = tensor_hashes(apply(mapping).output)
    longer = recipe(llama, tmp_path / "out")
    with pytest.raises(RecipeError, match="--overwrite"):
        apply(longer)
    assert tensor_hashes(tmp_path / "out") == first
    apply(longer, overwrite=True)
    assert tensor_hashes(tmp_path / "out") != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_somebodys_data_is_never_replaced(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="is no model"):
        apply(recipe(llama, tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("output", ["model", "link", "model/../model", "."])
def test_the_source_is_never_replaced(llama: Path, tmp_path: Path, output: str) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "config.json").write_text("{}")  # so that the folder above looks like a model, too
    with pytest.raises(RecipeError, match="is or holds the model that is to be compressed"):
        apply(recipe(tmp_path / "model", tmp_path / output), overwrite=True)
    assert tensor_hashes(tmp_path / "model") == tensor_hashes(llama)


def test_a_folder_has_no_revision(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama, tmp_path / "out")
    mapping["model"] = {"id": str(llama), "revision": "main"}
    with pytest.raises(InputError, match="has no revision 'main'"):
        apply(mapping)


@pytest.mark.parametrize("backend", ["reference", "nonsense"])
def test_the_environments_backend_does_not_touch_a_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("ARMOR_BACKEND", backend)
    assert apply(recipe(llama, tmp_path / "out")).output.is_dir()


@pytest.mark.parametrize("name", ["file/below", "a" * 300, "nul\0byte"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    events: list[Event] = []
    with pytest.raises(RecipeError, match=r"output\.path"):
        apply(recipe(llama, tmp_path / name), observer=events.append)
    assert not events
