"""What is written is what was there: every tensor in its dtype, files that a user needs, and nothing that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from armor_recipes import builtin
from armor_recipes.errors import CheckpointError, InputError, PlanError
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.transformers import load
from armor_recipes.run import apply, prepare
from armor_recipes.run.job import read_recipe
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.engine import ARMOR, SIZES, logits, make_model, recipe, save_model

PACKED = "model.layers.0.mlp.down_proj"
ONE = {**ARMOR, "targets": [PACKED]}


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "base"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def run(base: Path, **options: Any) -> Path:
    mapping = recipe(base, base.parent / "out", ARMORModifier=ONE)
    mapping["output"] |= options
    return apply(mapping, overwrite=True).output


# --- tensors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["compressed-tensors", "dense"])
def test_tensors_of_no_module_are_carried_over(base: Path, output_format: str) -> None:
    extra = {"model.layers.2.eh_proj.weight": torch.randn(4, 8).bfloat16(), "score.weight": torch.randn(2, 32).double()}
    change_tensors(base, lambda held: held.update(extra))
    out = run(base, format=output_format)
    before, after = tensors(base), tensors(out)
    assert before.keys() <= after.keys()
    for name, value in extra.items():
        assert torch.equal(after[name], value)
        assert after[name].dtype == value.dtype
    manifest = json.loads((out / "armor_manifest.json").read_text())
    assert manifest["carried_over"] == sorted(extra)
    if output_format == "compressed-tensors":
        load(out)
        export_folder(out, base.parent / "exported", to="dense")
        assert tensors(base.parent / "exported").keys() == before.keys()


def test_a_tensor_that_nobody_listed_is_no_part_of_a_checkpoint(base: Path) -> None:
    out = run(base)
    change_tensors(out, lambda held: held.update({"model.layers.2.eh_proj.weight": torch.zeros(4, 8)}))
    with pytest.raises(CheckpointError, match=r"unexpected_keys.*layers\.2\.eh_proj"):
        load(out)


def test_a_sharded_source_keeps_its_extra_tensors(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="20KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    save_file({"score.weight": torch.ones(2, 32)}, base / "model-extra.safetensors", metadata={"format": "pt"})
    index["weight_map"]["score.weight"] = "model-extra.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(tensors(run(base))["score.weight"], torch.ones(2, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tensor_keeps_its_own_dtype(base: Path, dtype: torch.dtype) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    exact = 1 + torch.randn(32, generator=torch.Generator().manual_seed(3)).to(dtype) * 1e-2
    change_tensors(base, lambda held: held.update({norm: exact}))
    after = tensors(run(base))
    assert torch.equal(after[norm], exact)
    kept = {name: value.dtype for name, value in tensors(base).items() if not name.startswith(PACKED)}
    assert {name: after[name].dtype for name in kept} == kept
    assert after[f"{PACKED}.armor_a"].dtype == torch.bfloat16


def test_weights_that_lose_bits_are_told_before_anything_is_computed(base: Path) -> None:
    wide = f"{PACKED}.weight"
    change_tensors(base, lambda held: held.update({wide: held[wide].float()}))
    mapping = recipe(base, base.parent / "out", ARMORModifier=ONE)
    (note,) = prepare(read_recipe(mapping)).plan.notes
    assert note.startswith("1 of the weights are torch.float32 in the model's files and are packed in torch.bfloat16")
    mapping["model"] = {"id": str(base), "dtype": "bfloat16"}
    assert prepare(read_recipe(mapping)).plan.notes == ()


def deepseek() -> PreTrainedModel:
    sizes = {**SIZES, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model: Any = DeepseekV3ForCausalLM(
        DeepseekV3Config(**sizes, **ranks, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4)
    )
    return model.to(torch.bfloat16)  # type: ignore[no-any-return]


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_what_the_architecture_keeps_in_float32_stays_so(tmp_path: Path, asked: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deepseek().save_pretrained(tmp_path / "base")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = 7 + torch.randn(4, generator=torch.Generator().manual_seed(1)) * 2e-2
    change_tensors(tmp_path / "base", lambda held: held.update({bias: exact}))
    mapping = recipe(tmp_path / "base", tmp_path / "out", MagnitudeModifier={"targets": [PACKED]})
    mapping |= {
        "model": {"id": str(tmp_path / "base"), "dtype": asked},
        "output": {**mapping["output"], "format": "dense"},
    }
    after = tensors(apply(mapping).output)
    assert torch.equal(after[bias], exact)
    assert {value.dtype for name, value in after.items() if name != bias} == {torch.bfloat16}
    assert after.keys() == tensors(tmp_path / "base").keys()


def test_pickled_weights_keep_their_dtype_and_run_no_code(base: Path) -> None:
    torch.save(tensors(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    config = {k: v for k, v in json.loads((base / "config.json").read_text()).items() if k != "dtype"}
    (base / "config.json").write_text(json.dumps(config))
    out = run(base)
    assert {value.dtype for value in tensors(out).values()} == {torch.bfloat16, torch.uint8}
    with pytest.raises(PlanError, match=r"PyTorch files \(pytorch_model.bin\), and an export reads safetensors only"):
        export_folder(base, base.parent / "exported", to="armor")
    torch.save({"model.norm.weight": print}, base / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as a file of tensors"):
        run(base)


def test_a_float64_model_is_refused_before_anything_is_read(base: Path) -> None:
    model: Any = make_model()
    model.to(torch.float64).save_pretrained(base)
    with pytest.raises(PlanError, match=r"stored in torch\.float64.*set model\.dtype"):
        run(base)


# --- what the model is ---------------------------------------------------------------------------------------------------


def test_a_head_is_written_with_the_model(base: Path) -> None:
    config = make_model("llama-gqa-tied").config
    config.pad_token_id = 0
    LlamaForSequenceClassification(config).save_pretrained(base)
    out = run(base)
    assert torch.equal(tensors(out)["score.weight"], tensors(base)["score.weight"])
    assert isinstance(load(out), LlamaForSequenceClassification)


def test_another_class_in_memory_is_refused(base: Path) -> None:
    model = LlamaForSequenceClassification(make_model().config)
    with pytest.raises(PlanError, match="the model given is a LlamaForSequenceClassification"):
        apply(recipe(base, base.parent / "out"), model)


def test_an_unknown_name_of_a_class_is_let_pass(base: Path) -> None:
    change_config(base, architectures=["LLaMAForCausalLM"])
    load(run(base))


def test_an_adapter_beside_the_model_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(PlanError, match="holds a PEFT adapter beside its weights"):
        run(base)
    (base / "adapter_config.json").unlink()
    out = run(base)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a PEFT adapter beside the model"):
        load(out)


@pytest.mark.parametrize("keys", [{"return_dict": False}, {"quantization_config": None}, {"use_cache": False}])
def test_keys_of_config_json_that_mean_nothing_here(base: Path, keys: dict[str, object]) -> None:
    change_config(base, **keys)
    mapping = recipe(base, base.parent / "out", ARMORModifier=ONE)
    plain = recipe(base, base.parent / "plain", MagnitudeModifier={"targets": [PACKED]})
    assert torch.equal(logits(load(apply(mapping).output)).isnan(), torch.zeros(2, 16, 96, dtype=torch.bool))
    export_folder(apply(plain).output, base.parent / "exported", to="armor")


def test_which_file_is_verified_is_which_is_loaded(base: Path) -> None:
    out = run(base)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(out), "model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    load(out)
    export_folder(out, base.parent / "exported", to="dense")
    assert not (base.parent / "exported" / "model.safetensors.index.json").exists()
    index["weight_map"] = dict.fromkeys(tensors(out), "other.safetensors")
    shutil.copyfile(out / "model.safetensors", out / "other.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="an index of other files"):
        load(out)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    shutil.rmtree(out)
    run(base)  # of a dense model the single file is taken, as transformers does


# --- what fails early ----------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_all_named_at_once(base: Path) -> None:
    def spoil(held: dict[str, Tensor]) -> None:
        held[f"{PACKED}.weight"][0, 0] = torch.nan
        held["model.layers.1.self_attn.q_proj.weight"][:2] = torch.inf

    change_tensors(base, spoil)
    mapping = recipe(base, base.parent / "out")
    with pytest.raises(Exception, match=r"2 modules .*down_proj \(1\).*q_proj \(64\)"):
        apply(mapping)


def test_nan_where_nothing_uses_it(base: Path) -> None:
    change_tensors(base, lambda held: held["lm_head.weight"][95].fill_(torch.nan))
    assert logits(load(run(base)))[..., 95].isnan().all()


def test_the_attention_that_is_used_is_what_a_reload_uses(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    out = apply(recipe(base, base.parent / "eager"), model).output
    assert json.loads((out / "armor_manifest.json").read_text())["compute"]["attention"] == "eager"
    again = load(out, dtype=torch.float32, attention="eager")
    assert torch.equal(logits(again), logits(model))
    change_config(base, attn_implementation="eager")
    assert load(run(base)).config._attn_implementation == "eager"


def test_weights_at_an_odd_address_are_no_false_alarm(base: Path) -> None:
    """All that products read is moved to an address of their own; values and masks, which are only unpacked, stay in the file."""
    out = run(save_model(base.parent / "float", dtype=torch.float32))
    expected, held = logits(load(out)), tensors(out)
    text = "x" * 3  # moves every tensor in the file by a few bytes
    save_file(held, out / "model.safetensors", metadata={"format": "pt", "note": text})
    model = load(out)
    packed = {id(p) for m in model.modules() if isinstance(m, ArmorLinear) for p in (m.weight, m.bitmask)}
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters() if p.numel() and id(p) not in packed)
    assert torch.equal(logits(model), expected)


# --- files beside the weights --------------------------------------------------------------------------------------------


def test_files_that_a_user_needs_come_along(base: Path) -> None:
    wanted = (
        "tokenizer.model",
        "special_tokens_map.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "NOTICE.txt",
    )
    others = ("pytorch_model.bin.index.json", "optimizer.pt", "trainer_state.json", "training_args.bin", "notes.txt")
    for name in (*wanted, *others):
        (base / name).write_text("{}")
    shutil.copyfile(builtin.model_folder("stdlib-llama") / "tokenizer.json", base / "tokenizer.json")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    result = apply(recipe(base, base.parent / "out", ARMORModifier=ONE), tokenizer=None)
    names = {path.name for path in result.output.rglob("*")}
    assert {*wanted, "rag.jinja"} <= names
    assert not names & set(others)
    assert set(others) <= set(result.report["left_out"])


def test_auto_map_goes_where_its_files_do_not_come_along(base: Path) -> None:
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change_config(base, auto_map=code)
    processor = {"auto_map": {"AutoProcessor": "processing_x.X"}}
    (base / "processor_config.json").write_text(json.dumps(processor))
    out = run(base)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert "auto_map" not in json.loads((out / "processor_config.json").read_text())
    (base / "processing_x.py").write_text("from .helper_x import X")
    (base / "helper_x.py").write_text("class X: ...")
    out = run(base)
    assert json.loads((out / "processor_config.json").read_text()) == processor
    assert {"processing_x.py", "helper_x.py"} <= {path.name for path in out.iterdir()}
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_links_out_of_the_folder_are_not_followed(base: Path) -> None:
    (base.parent / "secret").write_text("private key")
    for name in ("LICENSE", "merges.txt", "README.md"):
        (base / name).symlink_to(base.parent / "secret")
    out = run(base)
    assert "private key" not in "".join(
        path.read_text() for path in out.iterdir() if path.suffix in ("", ".md", ".model")
    )
    (out / "notes.md").symlink_to(base.parent / "secret")
    assert "notes.md" in export_folder(out, base.parent / "exported", to="dense").left_out


@pytest.mark.parametrize("date", ["2024-13-45", "!!python/object:os.system x", "&a [*a]", "[" * 90])
def test_a_card_that_cannot_be_read_ends_no_run(base: Path, date: str) -> None:
    (base / "README.md").write_text(f"---\nlicense: apache-2.0\ndate: {date}\n---\nHello\n")
    front = yaml.safe_load((run(base) / "README.md").read_text().split("---")[1])
    assert front.get("license") in ("apache-2.0", None)


@pytest.mark.parametrize(
    ("recorded", "named"), [("org/model-1b", "org/model-1b"), ("/home/me/model", None), ("./model", None), (None, None)]
)
def test_the_card_names_a_hub_id_or_nothing(base: Path, recorded: str | None, named: str | None) -> None:
    change_config(base, _name_or_path=recorded)
    out = run(base)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front.get("base_model") == named
    assert ("base_model_relation" in front) == (named is not None)
    assert str(base.parent) not in card
    assert str(base.parent) not in (out / "armor_manifest.json").read_text()
