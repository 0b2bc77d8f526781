"""Plain quantised layers of models that no loader reads by itself: experts in one tensor, Conv1D, code that reads weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import armor_recipes
from armor_recipes.errors import PlanError, VerificationError
from armor_recipes.run.verify import verify_reloaded
from tests.support.engine import recipe

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=64, num_key_value_heads=1, num_local_experts=2)
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            intermediate_size=64,
            intermediate_size_mlp=64,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=2,
            interleave_moe_layer_step=1,
        )
    ),
    "conv1d": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
}
CASES = [
    ("experts", "W8A16"),
    ("experts", "FP8"),
    ("llama4", "W8A16"),
    ("conv1d", "W4A16"),
    ("conv1d", "W8A8"),
    ("t5", "W4A16"),
    ("t5", "FP8"),
]
IDS = torch.arange(10)[None]


def written(folder: Path, kind: str, weights: dict[str, Any], **other: Any) -> Path:
    """A folder in which all linear modules but the head are quantised so."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().bfloat16()
    model.save_pretrained(folder / "model")
    quantised = {"ignore": ["lm_head", "re:.*router"], **weights}
    wanted = recipe(folder / "model", folder / "out", QuantizationModifier=quantised, **other)
    data = "builtin:random-inputs" if kind == "t5" else "builtin:random-tokens"
    wanted["calibration"] |= {"dataset": data, "experts": "all"}
    armor_recipes.apply(wanted)
    return folder / "out"


def logits(model: Any) -> Tensor:
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, **given).logits
    return found


def groups(scheme: str) -> dict[str, Any]:
    """The scheme, of weights of 32 columns."""
    args = {"W4A16": (4, 16), "W8A16": (8, 16)}.get(scheme)
    if args is None:
        return {"scheme": scheme}
    return {"config_groups": {"all": {"weights": {"num_bits": args[0], "group_size": args[1]}}}}


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_they_load_and_are_saved_as_they_were(tmp_path: Path, kind: str, scheme: str) -> None:
    """The run itself compares the folder with the model in memory bit for bit."""
    out = written(tmp_path, kind, groups(scheme))
    loaded = armor_recipes.load(out)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    assert torch.equal(logits(loaded), logits(auto.from_pretrained(out, dtype="auto")))
    loaded.save_pretrained(tmp_path / "again")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def test_experts_that_are_not_quantised_stay_in_one_tensor(tmp_path: Path) -> None:
    """Transformers takes Llama 4's apart in every quantised model, and would not find the tensor."""
    out = written(
        tmp_path, "llama4", {**groups("W8A16"), "ignore": ["lm_head", "re:.*router", "re:.*feed_forward.experts.*"]}
    )
    name = "model.layers.0.feed_forward.experts.down_proj"
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(loaded.get_parameter(name), load_file(tmp_path / "model" / "model.safetensors")[name])


def test_experts_that_lie_apart_and_are_not_quantised_are_read(tmp_path: Path) -> None:
    """As llm-compressor writes them."""
    out = written(
        tmp_path, "llama4", {**groups("W8A16"), "ignore": ["lm_head", "re:.*router", "re:.*feed_forward.experts.*"]}
    )
    tensors, name = load_file(out / "model.safetensors"), "model.layers.0.feed_forward.experts"
    down, both = tensors.pop(f"{name}.down_proj"), tensors.pop(f"{name}.gate_up_proj")
    for number in range(len(down)):
        gate, up = both[number].chunk(2, dim=-1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down[number]}
        tensors |= {f"{name}.{number}.{part}.weight": x.T.contiguous() for part, x in parts.items()}
    wanted = logits(armor_recipes.load(out))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "armor_manifest.json").unlink()
    torch.testing.assert_close(logits(armor_recipes.load(out)), wanted)


def test_the_weight_of_a_quantised_layer_is_what_it_stands_for(tmp_path: Path) -> None:
    loaded: Any = armor_recipes.load(written(tmp_path, "conv1d", groups("W4A16")))
    layer, x = loaded.transformer.h[0].mlp.c_fc, torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer.weight.shape == (128, 32)
    assert "weight" not in layer.state_dict()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("change", ["in place", "other memory", "other values"])
def test_what_it_stands_for_follows_its_tensors(tmp_path: Path, change: str) -> None:
    loaded: Any = armor_recipes.load(written(tmp_path, "conv1d", groups("W4A16")))
    layer, x = loaded.transformer.h[0].mlp.c_fc, torch.randn(3, 32, dtype=torch.bfloat16)
    before = layer(x) - layer.bias
    with torch.no_grad():
        if change == "in place":
            layer.weight_scale.mul_(2)
        elif change == "other memory":
            layer.weight_scale.data = 2 * layer.weight_scale.data
        else:
            layer.load_state_dict({**layer.state_dict(), "weight_scale": 2 * layer.weight_scale})
        layer.bias.zero_()
    torch.testing.assert_close(layer(x), 2 * before, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_not_merged_into_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = armor_recipes.load(written(tmp_path, "t5", groups("W4A16")))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "wo"]))
    with pytest.raises(PlanError, match=r"q is a quantised layer, .* merging an adapter into it .*`armor export"):
        adapted.merge_and_unload()


def test_a_folder_that_loads_and_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 casts what comes to `wo` to the dtype of its weight, which is that of packed integers in a core of 4 bits."""
    out = written(tmp_path, "conv1d", groups("W8A16"))
    model = armor_recipes.load(out)
    monkeypatch.setattr(
        "armor_recipes.run.verify.load", lambda *_, **__: AutoModel.from_config(T5Config(d_model=8, d_kv=4))
    )
    with pytest.raises(VerificationError, match=r"\(T5Model\) cannot be run as the one in memory: ValueError"):
        verify_reloaded(out, model, packed=True, probe={"input_ids": IDS})
