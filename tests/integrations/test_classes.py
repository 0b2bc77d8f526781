"""The class that config.json names is planned, written and loaded: heads, encoders and towers with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from armor_recipes.checkpoint.packing import PackedLinear, pack_2of4
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.errors import CheckpointError, PlanError, VerificationError
from armor_recipes.integrations.classes import class_of
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.models import (
    attention_of,
    load_dense,
    load_model,
    meta_model,
    open_model,
    written_dtypes,
)
from armor_recipes.integrations.names import left_behind
from armor_recipes.integrations.transformers import load
from armor_recipes.recipe.schema import ModelSpec
from armor_recipes.run.verify import verify_reloaded

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
TEXT: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 64}
IMAGES: dict[str, Any] = {"image_size": 16, "patch_size": 4}
IDS = torch.arange(12)[None] * 5 % 96
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor]]] = {
    "bert-classifier": (lambda: BertForSequenceClassification(BertConfig(**SIZES, **TEXT)), {"input_ids": IDS}),
    "llama-classifier": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **TEXT, tie_word_embeddings=True, pad_token_id=0)),
        {"input_ids": IDS},
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=96)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "marian": (
        lambda: MarianMTModel(
            MarianConfig(
                **TEXT,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)), {"pixel_values": PIXELS}),
    "gemma3": (
        lambda: Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**SIZES, "vocab_size": 96, "head_dim": 8, "num_key_value_heads": 2},
                vision_config={**SIZES, **IMAGES},
                mm_tokens_per_image=4,
                image_token_index=90,
            )
        ),
        {"input_ids": IDS},
    ),
    "exaone4": (lambda: Exaone4ForCausalLM(Exaone4Config(**SIZES, **TEXT, num_key_value_heads=2)), {"input_ids": IDS}),
}


def save(kind: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = KINDS[kind][0]()
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def packed(model: PreTrainedModel) -> dict[str, PackedLinear]:
    """Every linear layer that fits and stands alone, its first two of four kept, folded in the model as a loader does."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape[1] % 8 == 0 and f"{name}.weight" not in tied:
            weight = module.weight.detach().bfloat16()
            mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
            mask[:, :2] = True
            layers[name] = PackedLinear.plain(*pack_2of4(weight, mask.view(weight.shape)))
            module.weight.data = layers[name].fold(torch.float32)
    return layers


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_are_written_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    source = open_model(ModelSpec(id=str(save(kind, tmp_path / "base"))), device=torch.device("cpu"))
    model = load_model(source, device=torch.device("cpu"))
    assert type(model) is type(meta_model(source)) is type(KINDS[kind][0]())
    layers, before = packed(model), tensors(tmp_path / "base")
    assert layers
    (tmp_path / "out").mkdir()
    write_checkpoint(model, layers, tmp_path / "out", dtype=torch.bfloat16, dtypes=written_dtypes(model, source))
    after = tensors(tmp_path / "out")
    assert left_behind(model, after, before, packed=True) == ()
    assert after.keys() - {f"{name}.{part}" for name in layers for part in ("bitmask", "armor_a", "armor_b")} <= set(
        model.state_dict()
    )
    verify_reloaded(tmp_path / "out", model, packed=True, probe=KINDS[kind][1])
    type(model).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == after.keys()
    export_folder(tmp_path / "out", tmp_path / "dense", to="dense")
    verify_reloaded(tmp_path / "dense", model, packed=False, probe=KINDS[kind][1])
    next(iter(model.parameters())).data.add_(1)  # of Gemma 3 in the tower, which these inputs do not reach
    with pytest.raises(VerificationError, match=r"differs from the one in memory: in \d+ of \d+ "):
        verify_reloaded(tmp_path / "dense", model, packed=False, probe=KINDS[kind][1])


@pytest.mark.parametrize(
    ("config", "named", "wanted"),
    [
        (LlamaConfig(), ["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (LlamaConfig(), ["SomebodysLlama", "LlamaModel"], "LlamaModel"),
        (LlamaConfig(), ["SomebodysLlama"], "LlamaForCausalLM"),
        (GPT2Config(), None, "GPT2LMHeadModel"),
        (T5Config(), None, "T5ForConditionalGeneration"),
        (Gemma3Config(), None, "Gemma3ForConditionalGeneration"),
        (ViTConfig(), None, "ViTModel"),
    ],
)
def test_the_class_is_the_one_that_is_named_or_the_first_of_the_auto_classes(
    config: PretrainedConfig, named: list[str] | None, wanted: str
) -> None:
    config.architectures = named
    assert class_of(config, "here").__name__ == wanted


def test_a_class_of_another_architecture_is_refused(tmp_path: Path) -> None:
    config = Gemma3Config(architectures=[Gemma3ForCausalLM.__name__])
    with pytest.raises(
        PlanError, match="names Gemma3ForCausalLM, which takes a Gemma3TextConfig, and is a Gemma3Config"
    ):
        class_of(config, "here")
    save("llama-classifier", tmp_path / "base")
    written = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**written, "architectures": ["GPT2Model"]}))
    with pytest.raises(CheckpointError, match="names GPT2Model"):
        load(tmp_path / "base")


def test_what_transformers_has_no_class_for_is_refused() -> None:
    with pytest.raises(PlanError, match="has no model class for it"):
        class_of(PretrainedConfig(), "here")


def test_each_part_is_loaded_again_on_the_attention_that_it_runs_on(tmp_path: Path) -> None:
    folder = save("gemma3", tmp_path / "base")
    mixed = {"": "eager", "text_config": "sdpa", "vision_config": "eager"}
    for asked in (mixed, "eager"):
        model = load_dense(str(folder), dtype=torch.float32, device=torch.device("cpu"), attention=asked)
        assert attention_of(model) == asked
        verify_reloaded(folder, model, packed=False, probe=KINDS["gemma3"][1])
    assert model.config.text_config._attn_implementation == "eager"


def test_what_is_never_saved_is_not_rounded(tmp_path: Path) -> None:
    source = open_model(ModelSpec(id=str(save("marian", tmp_path))), device=torch.device("cpu"))
    model, name = load_model(source, device=torch.device("cpu")), "model.encoder.embed_positions.weight"
    table = model.get_parameter(name)
    assert name not in tensors(tmp_path)
    assert name not in written_dtypes(model, source)
    assert not torch.equal(table, table.bfloat16().float())
    assert torch.equal(table, MarianMTModel.from_pretrained(tmp_path, dtype=torch.float32).get_parameter(name))


@pytest.mark.parametrize(("stored", "rest"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_tied_tensor_has_its_own_dtype_under_whichever_name_it_is_stored(
    stored: torch.dtype, rest: torch.dtype, tmp_path: Path
) -> None:
    config = LlamaConfig(**SIZES, **TEXT, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    held = {n: t.to(stored if "embed" in n else rest) for n, t in tensors(tmp_path / "base").items()}
    assert "lm_head.weight" not in held
    save_file(held, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(written | {"dtype": str(rest).removeprefix("torch.")}))
    source = open_model(ModelSpec(id=str(tmp_path / "base")), device=torch.device("cpu"))
    model = load_model(source, device=torch.device("cpu"))
    dtypes = written_dtypes(model, source)
    assert dtypes["lm_head.weight"] == dtypes["model.embed_tokens.weight"] == stored
    (tmp_path / "out").mkdir()
    write_checkpoint(model, {}, tmp_path / "out", dtype=rest, dtypes=dtypes)
    assert torch.equal(tensors(tmp_path / "out")["model.embed_tokens.weight"], held["model.embed_tokens.weight"])
