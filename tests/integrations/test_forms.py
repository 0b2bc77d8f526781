"""Linear forms: the same function and the same numbers, there and back, packed and dense, here and in stock loaders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import use_experts_implementation

from armor_recipes.errors import PlanError
from armor_recipes.integrations.dense import to_dense
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.transformers import load
from armor_recipes.model.forms import forms_of, fused_names, fused_state, linearise, restore
from armor_recipes.model.hooks import Hooks
from armor_recipes.run import apply, prepare
from armor_recipes.run.job import read_recipe
from tests.support.engine import recipe
from tests.support.forks import Forks

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
JET = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
LAST: dict[str, Any] = {"eos_token_id": 1, "bos_token_id": 1}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, **EXPERTS, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            **{**EXPERTS, "num_experts_per_tok": 1},
            head_dim=8,
            intermediate_size_mlp=32,
            interleave_moe_layer_step=1,
        )
    ),
    "jetmoe": lambda: JetMoeForCausalLM(
        JetMoeConfig(**JET, kv_channels=8, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    ),
    "dbrx": lambda: DbrxForCausalLM(
        DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=96,
            max_seq_len=64,
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32},
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=96, n_positions=64, **LAST)),
    # Its attention has a causal mask that no file holds.
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(n_embd=32, n_head=4, n_layer=2, vocab_size=96, n_positions=64)
    ),
}
#: Of the second block alone, so that the first stays as its architecture has it.
TARGETS = {"jetmoe": r"re:.*layers\.1\..*linear\.\d+$", "gpt2": r"re:.*h\.1\..*c_(fc|proj)$"}
TARGETS["openai-gpt"] = TARGETS["gpt2"]
EXPERT = r"re:.*\.1\..*experts\.\d+\..*_proj$"
IDS = torch.arange(24)[None] * 5 % 96


def make(kind: str) -> PreTrainedModel:
    """A random model in float32 whose numbers are those of bfloat16, on the loop that transformers calls eager."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]()
    model.eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.bfloat16().float()
    return model


def save(kind: str, folder: Path) -> Path:
    cast: nn.Module = make(kind)
    cast.to(torch.bfloat16)
    cast.save_pretrained(folder)  # type: ignore[operator]
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    for kind in KINDS:
        save(kind, root / kind)
    return root


def mapping(folders: Path, kind: str, output: Path, output_format: str = "compressed-tensors") -> dict[str, Any]:
    found = recipe(
        folders / kind,
        output,
        ARMORModifier={"targets": [TARGETS.get(kind, EXPERT)], "block_size": 8, "iterations": 1},
    )
    found["calibration"] |= {"samples": 12, "sequence_length": 24}
    found["output"]["format"] = output_format
    return found


# --- the function -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_form_is_the_same_function_and_back_the_same_bits(kind: str) -> None:
    model: Any = make(kind)
    model.set_experts_implementation("eager")
    before, wanted = model.state_dict(), logits(model)
    forms = linearise(model)
    assert forms
    assert forms_of(model, [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]) == forms
    assert {name: tensor.shape for name, tensor in fused_state(model).items()} == {
        n: t.shape for n, t in before.items()
    }
    assert not [name for name, tensor in model.named_parameters() if tensor.dim() > 2]
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    assert linearise(model) == ()
    assert restore(model) == forms
    assert equal(model.state_dict(), before)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(("gate", "bias", "transposed", "concatenated"), list(product([True, False], repeat=4)))
def test_every_layout_of_transformers_goes_there_and_back(
    gate: bool, bias: bool, transposed: bool, concatenated: bool
) -> None:
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.SiLU()
            first, sizes = ("gate_up_proj", (8, 12)) if gate else ("up_proj", (8, 6))
            for name, (i, o) in {first: sizes, "down_proj": (6, 8)}.items():
                setattr(self, name, nn.Parameter(torch.randn(3, *((i, o) if transposed else (o, i)))))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(3, o)))

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            halves = gate_up.chunk(2, -1) if concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
            return nn.functional.silu(halves[0]) * halves[1]

        def forward(self, *args: Tensor) -> Tensor:
            raise NotImplementedError

    kind = use_experts_implementation(
        has_gate=gate, has_bias=bias, is_transposed=transposed, is_concatenated=concatenated
    )(Experts)
    config = type("Config", (), {"_experts_implementation": "batched_mm"})()
    module: Any = nn.ModuleDict({"experts": kind(config)})
    x, index = torch.randn(5, 8), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]])
    weights, before = torch.rand(5, 2), {name: value.clone() for name, value in module.state_dict().items()}
    wanted = module["experts"](x, index, weights)
    assert linearise(module) == ("experts",)
    layers = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    assert layers == {f"experts.{n}.{p}_proj" for n in range(3) for p in (["gate"] if gate else []) + ["up", "down"]}
    torch.testing.assert_close(module["experts"](x, index, weights), wanted)
    assert restore(module) == ("experts",)
    assert equal(module.state_dict(), before)


def test_only_experts_that_get_tokens_are_called_and_their_layers_tell_how_many() -> None:
    model: Any = make("mixtral")
    linearise(model)
    experts = model.model.layers[0].mlp.experts
    seen: dict[int, int] = {}

    def counting(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, __: seen.update({number: len(args[0])})

    with Hooks() as hooks:
        for number in range(3):
            hooks.before(experts.get_submodule(f"{number}.up_proj"), counting(number))
        experts(torch.randn(4, 32), torch.tensor([[0, 2], [0, 2], [2, 3], [0, 2]]), torch.rand(4, 2))
    assert seen == {0: 3, 2: 4}  # nobody chose expert 1, and 3 is past the last


# --- plan, checkpoint, export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "llama4", "jetmoe", "dbrx", "gpt2"])
def test_packed_experts_are_loaded_as_they_were_and_exported_for_stock_loaders(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    plan = apply(mapping(folders, kind, tmp_path / "out")).plan
    assert plan.forms
    assert all(".1." in name for name in plan.forms)
    assert plan.to_dict()["linear_forms"] == list(plan.forms)
    ours: Any = load(tmp_path / "out")
    assert not fused_names(ours.named_modules()).keys() & ours.state_dict().keys() or kind == "gpt2"
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(ours))
    assert ours.generate(IDS[:, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)
    stock.save_pretrained(tmp_path / "again")
    assert equal(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    export_folder(tmp_path / "out", tmp_path / "dense", to="dense")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    exported, info = found
    assert not any(info.values())
    assert torch.equal(logits(exported), logits(to_dense(ours)))
    ours.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved").keys() == tensors(folders / kind).keys()


def test_dense_output_is_read_by_a_process_without_this_package(folders: Path, tmp_path: Path, forks: Forks) -> None:
    models: dict[str, Any] = {kind: make(kind) for kind in ("mixtral", "gpt2")}
    for kind, model in models.items():
        assert apply(mapping(folders, kind, tmp_path / kind, "dense"), model).plan.forms
        assert not fused_names(model.named_modules())  # put back in the model that was given
        assert tensors(tmp_path / kind).keys() == tensors(folders / kind).keys()
    code = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()) and "armor_recipes" not in sys.modules
    torch.save(model(input_ids=torch.arange(24)[None] * 5 % 96, use_cache=False).logits, folder + "/logits")
"""
    forks.run(code, *(tmp_path / kind for kind in models), folder=tmp_path)
    for kind, model in models.items():
        assert torch.equal(torch.load(tmp_path / kind / "logits"), logits(model))


def test_a_model_in_memory_becomes_linear_where_the_recipe_takes_it(folders: Path, tmp_path: Path) -> None:
    model: Any = make("mixtral")
    apply(mapping(folders, "mixtral", tmp_path / "one"), model)
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts.2.gate_proj"), nn.Linear)
    assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()
    apply(mapping(folders, "mixtral", tmp_path / "two"))
    assert equal(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


def test_experts_have_no_place_in_formats_of_others(folders: Path, tmp_path: Path) -> None:
    apply(mapping(folders, "mixtral", tmp_path / "out"))
    with pytest.raises(
        PlanError, match=r"model\.layers\.1\.mlp\.experts .* are linear layers in ARMOR checkpoints alone"
    ):
        export_folder(tmp_path / "out", tmp_path / "legacy", to="sparse-24-bitmask")


def test_a_pattern_of_fused_names_is_told_the_linear_ones(folders: Path, tmp_path: Path) -> None:
    found = mapping(folders, "mixtral", tmp_path / "out")
    found["prune_stage"]["armor_modifiers"]["ARMORModifier"]["targets"] = [r"re:.*experts\.gate_up_proj$"]
    with pytest.raises(PlanError, match=r"fused.*model\.layers\.0\.mlp\.experts\.0\.gate_proj, .*experts\.0\.up_proj"):
        prepare(read_recipe(found))
