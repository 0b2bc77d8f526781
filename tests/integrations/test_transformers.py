"""With `import armor_recipes` the stock loader reads a checkpoint bit for bit; without it, none does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import armor_recipes
from armor_recipes.checkpoint.writer import tensor_hashes, write_checkpoint
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.integrations.transformers import ArmorCompressor, register
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.forks import Forks
from tests.support.packed import IGNORED, MODELS, changed, logits, session_model, write

ROOT = Path(__file__).parents[2]
KIND = "llama-attention-bias-gqa"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    write(KIND, folder)
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize("kind", MODELS)
def test_loaded_model_has_the_sessions_bits(kind: str, tmp_path: Path) -> None:
    session = write(kind, tmp_path / "model")
    expected = logits(session)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    armor = {name for name, module in stock.named_modules() if isinstance(module, ArmorLinear)}
    linear = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    assert linear - armor == set(IGNORED)
    assert torch.equal(logits(stock), expected)
    assert torch.equal(logits(armor_recipes.load(tmp_path / "model", dtype=torch.float32)), expected)
    reference = armor_recipes.load(tmp_path / "model", dtype="float32", backend="reference")
    torch.testing.assert_close(logits(reference), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_stored_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    session = write("qwen2", tmp_path / "model", dtype)
    loaded = armor_recipes.load(tmp_path / "model")
    assert loaded.dtype == dtype
    in_float32 = armor_recipes.load(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(in_float32), logits(session))


def test_stored_dtype_is_close(checkpoint: Path) -> None:
    loaded = armor_recipes.load(checkpoint)
    expected = logits(session_model(KIND)[0])
    assert loaded.dtype == torch.bfloat16
    assert (logits(loaded) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_saving_again_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits(model)
    tokens = torch.tensor([[3, 5, 7]])
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "again")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("model", "again")]
    assert files[0].keys() == files[1].keys()
    assert {name for name in files[0] if files[0][name] != files[1][name]} == {"config.json"}

    first, again = (json.loads(file["config.json"]) for file in files)
    quantization, kept = first.pop("quantization_config"), again.pop("quantization_config")
    assert first == again
    assert kept["quantization_status"] == "compressed"
    assert changed(quantization, kept) == {"version"}
    assert torch.equal(logits(armor_recipes.load(tmp_path / "again")), logits(model))


def test_a_model_loaded_in_float32_saves_the_same_numbers(checkpoint: Path, tmp_path: Path) -> None:
    model = armor_recipes.load(checkpoint, dtype=torch.float32)
    logits(model)
    model.bfloat16().save_pretrained(tmp_path)
    assert tensor_hashes(tmp_path) == tensor_hashes(checkpoint)


def test_explicit_decompression_makes_a_plain_model(checkpoint: Path) -> None:
    model = armor_recipes.load(checkpoint, dtype=torch.float32)
    before = logits(model)
    model.hf_quantizer.compressor.decompress_model(model)
    assert not any(isinstance(module, ArmorLinear) for module in model.modules())
    assert torch.equal(logits(model), before)


def test_dense_output_loads_without_quantizer(tmp_path: Path) -> None:
    session, _ = session_model(KIND)
    write_checkpoint(session, {}, tmp_path, dtype=torch.float32)
    loaded = armor_recipes.load(tmp_path)
    assert not any(isinstance(module, ArmorLinear) for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(session))


def test_compressor_refuses_to_factorise() -> None:
    with pytest.raises(CheckpointError, match="by a recipe"):
        ArmorCompressor.compress_module(nn.Linear(16, 8))


def test_registering_twice_is_once() -> None:
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor

    hook = ModelCompressor.add_decompress_hook
    register()
    assert ModelCompressor.add_decompress_hook is hook
    assert BaseCompressor.get_value_from_registry("sparse-24-bitmask") is ArmorCompressor


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for part, tensor in changes.items():
        if tensor is None:
            del tensors[f"{UP}.{part}"]
        else:
            tensors[f"{UP}.{part}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["bitmask", "armor_a", "armor_b"])
def test_a_missing_tensor_is_no_random_one(copied: Path, part: str) -> None:
    edit_tensors(copied, **{part: None})
    with pytest.raises(CheckpointError, match=rf"no file holds its tensor {UP}.{part}"):
        armor_recipes.load(copied)
    stock = AutoModelForCausalLM.from_pretrained(copied)  # logs the missing name, and no more
    with pytest.raises(CheckpointError, match=rf"holds no {part} for this layer"):
        logits(stock)


def test_damaged_bits_are_named_while_loading(copied: Path) -> None:
    edit_tensors(copied, bitmask=torch.full((64, 4), 0xFF, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=rf"{UP}: bitmask: row 0, columns 0 to 3 keep 4"):
        armor_recipes.load(copied)


def test_names_that_execute_files_are_refused(copied: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nrun = 1\n")
    file = copied / "config.json"
    written = json.loads(file.read_text())
    places = [written["quantization_config"], written["quantization_config"]["config_groups"]["group_0"]]
    for place in places:
        before, place["format"] = place["format"], f"{trap}:run"
        file.write_text(json.dumps(written))
        with pytest.raises(CheckpointError, match=r"never looks a format up by a name that a checkpoint brings"):
            armor_recipes.load(copied)
        place["format"] = before
    assert not (tmp_path / "sprung").exists()


def test_load_explains_what_is_wrong(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        armor_recipes.load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="unknown"):
        armor_recipes.load(copied, backend="fast")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(CheckpointError, match="transformers cannot load this model"):
        armor_recipes.load(copied)


# --- fresh processes ------------------------------------------------------------------------------------------------

WITHOUT = """
import json, sys, warnings
import torch, transformers
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          CompressedTensorsConfig, LlamaForCausalLM, pipeline)
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
dense = AutoConfig.from_pretrained(folder)
del dense.quantization_config

configs = {
    "": {},
    "dequantize": {"quantization_config": CompressedTensorsConfig(dequantize=True)},
    "run_compressed=False": {"quantization_config": CompressedTensorsConfig(run_compressed=False)},
    "run_compressed=True": {"quantization_config": CompressedTensorsConfig(run_compressed=True)},
    "use_optimized_inference": {"quantization_config": CompressedTensorsConfig(use_optimized_inference=True)},
    "config without quantization": {"config": dense},
}
options = {
    "": {},
    "dtype=auto": {"dtype": "auto"},
    "dtype=float32": {"dtype": torch.float32},
    "dtype=bfloat16": {"dtype": torch.bfloat16},
    "torch_dtype=float16": {"torch_dtype": torch.float16},
    "device_map=cpu": {"device_map": "cpu"},
    "device_map=auto": {"device_map": "auto"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "use_safetensors": {"use_safetensors": True},
    "output_loading_info": {"output_loading_info": True},
    "attn_implementation": {"attn_implementation": "eager"},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True},
}
calls = {
    f"{loader.__name__} {config} {option}": lambda loader=loader, c=c, o=o: loader.from_pretrained(folder, **c, **o)
    for loader in (AutoModelForCausalLM, LlamaForCausalLM, AutoModel, AutoModelForSequenceClassification)
    for config, c in configs.items()
    for option, o in options.items()
    if sys.argv[2] == "all" or not config or option in ("", "ignore_mismatched_sizes")
}
calls["pipeline"] = lambda: pipeline("text-generation", model=folder)
results = {}
for name, call in calls.items():
    where = ""
    try:
        loaded = call()
        where = "first forward pass: "
        (loaded[0] if isinstance(loaded, tuple) else loaded)(torch.tensor([[3, 5, 7]]))
        results[name] = None
    except Exception as error:
        results[name] = f"{where}{type(error).__name__}: {error}"[:300]
assert not any(name.startswith("armor_recipes") for name in sys.modules)
print("RESULTS" + json.dumps(results))
"""


@pytest.mark.parametrize("options", [{}, {"share": True}, {"bits": 8}, {"bits": 4, "group": 8}], ids=str)
def test_without_the_package_every_stock_path_raises(
    checkpoint: Path, tmp_path: Path, forks: Forks, options: dict[str, Any]
) -> None:
    if options:
        write(KIND, tmp_path / "other", **options)
    folder = tmp_path / "other" if options else checkpoint
    pairs, count = ("some", 89) if options else ("all", 289)
    printed = forks.run(WITHOUT, folder, pairs, folder=tmp_path)
    results: dict[str, str | None] = json.loads(printed.partition("RESULTS")[2])
    loaded = {name for name, error in results.items() if error is None}
    not_asked = {name for name in loaded if "ignore_mismatched_sizes" not in name}
    assert not not_asked, "loaded in silence"
    # The documented exception: dense weights were asked for (or a model whose modules have other names than the config
    # targets), and new ones where the sizes differ.
    dense = ("dequantize", "=False", "without quantization", "AutoModel ")
    assert all(any(word in name for word in dense) for name in loaded)
    assert loaded, "ignore_mismatched_sizes with dequantising raises now: say so in docs/checkpoint.md"

    assert "Unable to find" in (results["AutoModelForCausalLM  ignore_mismatched_sizes"] or "")
    # Integers that are to be dequantised: the stock conversion fails on them, before sizes are compared.
    converted = ("automatic conversion of the weights",) if "bits" in options else ()
    # Packed values that an old `AutoModel` took for a weight: no product of theirs exists.
    multiplied = ("shapes cannot be multiplied", "must have the same dtype")
    late = {name for name, error in results.items() if (error or "").startswith("first forward pass: RuntimeError")}
    assert all("AutoModel " in name for name in late)
    assert bool(late) == (Version(transformers.__version__) < Version("5.23")), "say so in docs/checkpoint.md"
    reasons = ("Unable to find sparse-24-bitmask registered", "ignore_mismatched_sizes", *converted, *multiplied)
    elsewhere = {name: error for name, error in results.items() if error and not any(r in error for r in reasons)}
    assert not elsewhere
    assert len(results) == count


WITH = """
import sys
import armor_recipes
assert "torch" not in sys.modules, "importing armor_recipes imports torch"
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = (torch.arange(48) * 7 % 96).view(2, 24)
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[2])
model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, pad_token_id=0)
model.bfloat16().save_pretrained(sys.argv[3])
"""


def test_with_the_package_one_import_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", WITH, str(checkpoint), str(tmp_path / "logits.pt"), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(session_model(KIND)[0]), rtol=1e-5, atol=1e-6)
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(checkpoint)


def test_import_after_compressed_tensors_registers_too(forks: Forks, tmp_path: Path) -> None:
    script = (
        "import sys, compressed_tensors, armor_recipes\n"
        "from compressed_tensors.compressors import BaseCompressor\n"
        "print(BaseCompressor.get_value_from_registry('sparse-24-bitmask').__name__)\n"
    )
    assert forks.run(script, folder=tmp_path, path=ROOT).strip() == "ArmorCompressor"
