"""Modifiers that only llm-compressor has, as the first steps of a run or as all of it: what is read, and the other process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from armor_recipes import apply, load
from armor_recipes.checkpoint.reader import read_config
from armor_recipes.errors import InputError, PlanError, QualityError, RecipeError, VerificationError
from armor_recipes.integrations.oneshot import child, step
from armor_recipes.recipe.llmcompressor import STEP_PYTHON
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.support.engine import ARMOR, MLP, logits, make_model, recipe, save_model
from tests.support.tokenizers import byte_tokenizer

LOGARITHMIC: dict[str, Any] = {"smoothing_strength": 0.5, "requires_calibration_data": True}
#: Stands for llm-compressor: a module that `child.py` imports `oneshot` from.
FAKE = """
import json, shutil
from pathlib import Path
from safetensors.numpy import load_file, save_file

class Whole:
    # what a whole run leaves: the model in memory, and how it is saved

    def __init__(self, source, factor):
        from transformers import AutoModelForCausalLM

        self.model, self.factor = AutoModelForCausalLM.from_pretrained(source), factor
        self.dtype = self.model.dtype
        self.model.get_input_embeddings().weight.data.mul_(3)

    def __call__(self, **inputs):
        return self.model(**inputs)

    def save_pretrained(self, folder, save_compressed):
        self.model.get_input_embeddings().weight.data.mul_(self.factor)
        self.model.save_pretrained(folder)
        (Path(folder) / "recipe.yaml").write_text("theirs: {}")

def oneshot(model, recipe, output_dir=None, dataset=None, **options):
    given = json.loads(Path(recipe).read_text())
    fields = next(iter(given["step_stage"]["step0_modifiers"].values()))
    if fields.get("smoothing_strength") == 0.25:
        raise RuntimeError("what went wrong")
    if output_dir is None:
        return Whole(model, -1 if fields.get("iters") == 7 else 1)
    shutil.copytree(model, output_dir)
    file = Path(output_dir) / "model.safetensors"
    state = load_file(file)
    kind = next(iter(given["step_stage"]["step0_modifiers"]))
    if kind == "SpinQuantModifier":
        place = "input" if "R4" in fields["rotations"] else "weight_input"
        config = json.loads((Path(output_dir) / "config.json").read_text())
        groups = {"R": {"apply": [{"location": place}]}}
        config["quantization_config"] = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": groups}}
        if config["tie_word_embeddings"]:
            config["tie_word_embeddings"] = False
            state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
        (Path(output_dir) / "config.json").write_text(json.dumps(config))
    if kind == "ConstantPruningModifier":
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:90].copy()
        config = json.loads((Path(output_dir) / "config.json").read_text())
        (Path(output_dir) / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
        state["lm_head.weight"] = state["lm_head.weight"][:90].copy()
    norm = "model.layers.0.input_layernorm.weight"
    state[norm] = state[norm] * 2 if dataset is None else state[norm] * (1 + len(dataset))
    save_file(state, file, metadata={"format": "pt"})
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "python"
    (place / "llmcompressor-0.14.dist-info").mkdir(parents=True)
    (place / "llmcompressor-0.14.dist-info" / "METADATA").write_text("Name: llmcompressor\nVersion: 0.14\n")
    (place / "llmcompressor.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv(STEP_PYTHON, sys.executable)


@pytest.fixture
def inside(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is this one, which has imported transformers already."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        child.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.syspath_prepend(str(tmp_path / "python"))
    monkeypatch.delitem(sys.modules, "llmcompressor", raising=False)
    monkeypatch.setattr(step.subprocess, "run", run)


def read(llama: Path, **modifiers: Any) -> Any:
    return read_recipe(recipe(llama, **modifiers))


def test_what_comes_first_is_a_step_with_its_own_fields(llama: Path, fake: None) -> None:
    found = read(llama, LogarithmicEqualizationModifier=LOGARITHMIC, ARMORModifier=ARMOR)
    (first,) = found.steps
    assert (first.kind, first.fields) == ("LogarithmicEqualizationModifier", {"smoothing_strength": 0.5})
    assert [entry.kind for entry in found.modifiers] == ["ARMORModifier"]
    assert "LogarithmicEqualizationModifier" in found.resolved_yaml()
    assert found.hash() != read(llama, ARMORModifier=ARMOR).hash()
    notes = prepare(found).plan.notes
    assert any("LogarithmicEqualizationModifier runs first, on the dense model" in note for note in notes)


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ({"ARMORModifier": ARMOR, "SpinQuantModifier": {}}, "not after ARMORModifier.*put it before ARMORModifier"),
        ({"AutoRoundModifier": {"scheme": "W4A16"}, "ARMORModifier": ARMOR}, "which leaves a quantised model"),
        ({"REAPPruningModifier": {"sparsity": 0.5}, "ARMORModifier": ARMOR}, "takes experts away"),
        (
            {"QuIPModifier": {}, "ARMORModifier": ARMOR},
            "leaves rotations that are made as the model runs, and no modifier here",
        ),
        (
            {"SpinQuantModifier": {"rotations": ["R1", "R4"]}, "ARMORModifier": ARMOR},
            r"as the model runs \(R1 and R2 lie in the weights\), and no modifier here goes on",
        ),
        (
            {
                "AutoRoundModifier": {"scheme": "W4A16"},
                "QuantizationModifier": {"scheme": "W4A16", "gauge": "diagonal"},
            },
            "llm-compressor's QuantizationModifier has no such field; fields: targets",
        ),
        ({"SpinQuantModifier": {"rotation": ["R1"]}, "ARMORModifier": ARMOR}, "no such field; nearest.*rotations"),
    ],
)
def test_what_cannot_be_a_step_is_told_with_the_recipe(
    llama: Path, fake: None, modifiers: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        read(llama, **modifiers)


def test_without_the_extra_it_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP_PYTHON, raising=False)
    monkeypatch.setattr("armor_recipes.modifiers.registry.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"install `armor-recipes\[llmcompressor\]` to run it as a step"):
        read(llama, SpinQuantModifier={}, ARMORModifier=ARMOR)


def changed(kind: str, **fields: Any) -> Any:
    model = make_model()
    given = step.Step([(kind, fields)], None, [])
    step.run_step(model, given, dtype=torch.float32, dtypes={})
    return model


def test_weights_come_back_from_the_other_process(fake: None) -> None:
    before, after = make_model().state_dict(), changed("LogarithmicEqualizationModifier").state_dict()
    norm = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(after.pop(norm), before.pop(norm) * 2)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rotations_that_lie_in_the_weights_are_taken_and_others_are_not(fake: None) -> None:
    changed("SpinQuantModifier", rotations=["R1"])
    with pytest.raises(PlanError, match="SpinQuantModifier left a quantised model or online transforms"):
        changed("SpinQuantModifier", rotations=["R4"])


def test_another_structure_is_no_dense_model_of_this_run(fake: None) -> None:
    with pytest.raises(PlanError, match=r"ConstantPruningModifier left a model of another structure \(lm_head.weight"):
        changed("ConstantPruningModifier")


def test_what_the_other_process_says_is_told(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"LogarithmicEqualizationModifier failed:\n(.|\n)*what went wrong"):
        changed("LogarithmicEqualizationModifier", smoothing_strength=0.25)
    monkeypatch.setenv(STEP_PYTHON, "/nowhere/python")
    with pytest.raises(InputError, match="ARMOR_LLMCOMPRESSOR_PYTHON is '/nowhere/python', which cannot be run"):
        changed("LogarithmicEqualizationModifier")


def test_a_run_goes_on_from_what_the_step_left(fake: None, tmp_path: Path) -> None:
    """Its five windows came along, and made the norm six times as large."""
    source = save_model(tmp_path / "source", "llama", torch.float32)
    given = recipe(source, tmp_path / "out", LogarithmicEqualizationModifier=LOGARITHMIC, ARMORModifier=ARMOR)
    apply(given)
    norm = "model.layers.0.input_layernorm.weight"
    stepped, plain = load(tmp_path / "out"), load(source)
    torch.testing.assert_close(stepped.get_parameter(norm), plain.get_parameter(norm) * 6)
    assert logits(stepped).isfinite().all()


def test_an_output_layer_that_the_step_unties_stays_so(
    fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source", "llama-gqa-tied", torch.float32)
    given = recipe(
        source, tmp_path / "out", SpinQuantModifier={"rotations": ["R1"]}, MagnitudeModifier={"targets": [MLP]}
    )
    checked: list[int] = []
    monkeypatch.setattr("armor_recipes.run.preflight.check_disk", lambda _, nbytes, *__: checked.append(nbytes))
    result = apply(given)
    written = sum(tensor.nbytes for tensor in load_file(result.output / "model.safetensors").values())
    assert checked[0] >= written - 64  # not of a tied one
    assert any("if it unties lm_head from the embeddings, both are written" in note for note in result.plan.notes)
    found, embeddings = load(tmp_path / "out"), load(source).get_parameter("model.embed_tokens.weight")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    torch.testing.assert_close(found.get_parameter("lm_head.weight"), embeddings * 2, rtol=0, atol=0)
    torch.testing.assert_close(found.get_parameter("model.embed_tokens.weight"), embeddings, rtol=0, atol=0)


AUTO: dict[str, Any] = {"scheme": "W4A16", "ignore": ["lm_head"]}


def test_what_both_have_is_llm_compressors_beside_what_only_it_has(llama: Path, fake: None) -> None:
    found = read(llama, SmoothQuantModifier={"smoothing_strength": 0.5}, AutoRoundModifier=AUTO)
    assert [step.kind for step in found.steps] == ["SmoothQuantModifier", "AutoRoundModifier"]
    assert found.is_theirs
    assert not found.modifiers
    assert any("runs, as all of this recipe does, by llm-compressor" in note for note in prepare(found).plan.notes)
    ours = read(llama, LogarithmicEqualizationModifier=LOGARITHMIC, QuantizationModifier=AUTO)
    assert [entry.kind for entry in ours.modifiers] == ["QuantizationModifier"]


def test_a_whole_run_is_the_folder_that_llm_compressor_wrote(inside: None, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.float32)
    found = apply(recipe(source, tmp_path / "out", AutoRoundModifier=AUTO))
    name = "model.embed_tokens.weight"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter(name)
    torch.testing.assert_close(stock, load(source).get_parameter(name) * 3)
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    assert manifest["llmcompressor"]["versions"]["llmcompressor"] == "0.14"
    assert manifest["llmcompressor"]["modifiers"] == ["prune_stage.armor_modifiers.AutoRoundModifier"]
    assert manifest["tensors"].keys() == load(source).state_dict().keys()
    assert "AutoRoundModifier" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert "compressed by llm-compressor" in (tmp_path / "out" / "README.md").read_text()
    assert not found.modules
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "python", "source"]


def test_a_whole_run_keeps_the_bound_on_perplexity(inside: None, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(save_model(tmp_path / "source", "llama", torch.float32))
    (tmp_path / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)  # whose ids are below 96
    given = recipe(tmp_path / "source", tmp_path / "out", AutoRoundModifier={"iters": 3})
    measured = {"dataset": str(tmp_path / "letters.txt"), "sequence_length": 32, "windows": 2}
    given["evaluation"] = {"perplexity": measured, "max_perplexity_ratio": 0.01}
    with pytest.raises(QualityError, match=r"max_perplexity_ratio allows 0\.01.*complete and kept in .*out\.rejected$"):
        apply(given)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.rejected"]
    assert json.loads((tmp_path / "out.rejected" / "armor_manifest.json").read_text())["llmcompressor"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out.rejected")


def test_a_folder_that_loads_as_another_model_is_none(inside: None, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.float32)
    with pytest.raises(
        VerificationError, match="AutoRoundModifier does not load in transformers as the model that it had"
    ):
        apply(recipe(source, tmp_path / "out", AutoRoundModifier={**AUTO, "iters": 7}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "source"]


def test_a_folder_that_does_not_run_is_none(inside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed-tensors decompresses 4-bit floats to bfloat16, which the layers of a float32 model do not take."""

    def feed(model: Any, _: Any) -> Any:
        return torch.ones(2) @ torch.ones(2, dtype=torch.bfloat16)

    source = save_model(tmp_path / "source", "llama", torch.float32)
    monkeypatch.setattr(step, "feed_alike", feed)
    with pytest.raises(VerificationError, match=r"AutoRoundModifier does not run in transformers in torch\.float32"):
        apply(recipe(source, tmp_path / "out", AutoRoundModifier=AUTO))


def test_other_models_are_given_as_they_are_and_samples_by_name(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.float32)
    assert child._model(source) == str(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    assert type(child._model(source)).__name__ == "LlamaModel"
    samples = {f"{n}.{name}": torch.full((1, 2), n) for n in (10, 9) for name in ("input_ids", "pixel_values")}
    save_file(samples, tmp_path / "samples.safetensors")
    first, second = child._samples(tmp_path / "samples.safetensors")
    assert first.keys() == second.keys() == {"input_ids", "pixel_values"}
    assert (int(first["input_ids"][0, 0]), int(second["pixel_values"][0, 0])) == (9, 10)


def test_a_whole_run_is_neither_dense_nor_in_place(fake: None, llama: Path, tmp_path: Path) -> None:
    given = recipe(llama, tmp_path / "out", AutoRoundModifier=AUTO)
    with pytest.raises(PlanError, match=r"output\.format dense: what llm-compressor makes"):
        apply(given, overrides=["output.format=dense"])
    with pytest.raises(InputError, match="on a folder and not in place"):
        apply(given, make_model())
