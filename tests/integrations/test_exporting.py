"""Exports load in stock loaders with the same numbers, and legacy folders are read, run and written as compressed-tensors did."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import armor_recipes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import inspect, read_layers
from armor_recipes.checkpoint.verify import verify
from armor_recipes.checkpoint.writer import tensor_hashes, write_checkpoint
from armor_recipes.errors import CheckpointError, PlanError, RecipeError, VerificationError
from armor_recipes.integrations.exporting import export_folder
from tests.support.forks import Forks
from tests.support.packed import IGNORED, logits, made_up, random_mask, session_model, write

KIND = "llama-attention-bias-gqa"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    write(KIND, folder, share=True)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose linear layers, but lm_head, are 2:4, some with more zeros; its rotary base is no default."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).bfloat16().eval()
    generator = torch.Generator().manual_seed(4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            pruned = ~random_mask(module.out_features, module.in_features, generator)
            module.weight.data = (10 * module.weight.data).masked_fill(
                pruned, 0
            )  # a product would leave zeros of both signs
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    model.save_pretrained(folder)
    return folder


def stock_logits(folder: Path, tmp_path: Path, forks: Forks) -> torch.Tensor:
    """Of a stock transformers in a fresh process."""
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = (torch.arange(48) * 7 % 96).view(2, 24)\n"
        "with torch.no_grad(): torch.save(model(tokens).logits, sys.argv[2])\n"
        "assert not any(name.startswith('armor_recipes') for name in sys.modules)\n"
    )
    forks.run(script, folder, tmp_path / "logits.pt", folder=tmp_path)
    return torch.load(tmp_path / "logits.pt")


def run_python(python: str, script: str, *args: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", script, *map(str, args)],
        cwd=args[0].parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dense_loads_in_stock_transformers_with_the_same_logits(checkpoint: Path, tmp_path: Path, forks: Forks) -> None:
    out = tmp_path / "dense"
    done = export_folder(checkpoint, out, to="dense")
    assert (done.layers, done.left_out) == (13, ())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "LICENSE").read_bytes() == b"free"
    assert torch.equal(stock_logits(out, tmp_path, forks), logits(armor_recipes.load(checkpoint)))
    assert verify(out).tensors == len(load_file(out / "model.safetensors"))


def test_equal_exports_have_equal_bytes_and_shards_stay(checkpoint: Path, tmp_path: Path) -> None:
    write(KIND, tmp_path / "sharded", share=True, max_shard_bytes=20_000)
    export_folder(checkpoint, tmp_path / "one", to="dense")
    for name in ("two", "three"):
        export_folder(tmp_path / "sharded", tmp_path / name, to="dense")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("two", "three")]
    assert files[0] == files[1]
    assert "model.safetensors.index.json" in files[0]
    assert tensor_hashes(tmp_path / "one") == tensor_hashes(tmp_path / "two")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(loaded), logits(armor_recipes.load(checkpoint)))


@pytest.mark.parametrize("to", ["dense-2of4", "sparse-24-bitmask"])
def test_factors_that_are_not_the_identity_are_refused(checkpoint: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(PlanError, match=r"down_proj in .* has factors other than the identity"):
        export_folder(checkpoint, tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_identity_factors_of_any_block_size_are_plain(tmp_path: Path) -> None:
    model, layers = session_model(KIND)
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        factors = made_up(*layer.shape, layer.block_size, generator)
        eyes = {
            part: torch.eye(factor.shape[-1]).expand_as(factor) for part, factor in (("a", factors.a), ("b", factors.b))
        }
        layers[name] = PackedLinear.from_factorization(replace(factors, **eyes), torch.bfloat16)
        model.get_submodule(name).weight.data = layers[name].fold(torch.float32)
    (tmp_path / "armor").mkdir()
    write_checkpoint(model, layers, tmp_path / "armor", dtype=torch.bfloat16)
    export_folder(tmp_path / "armor", tmp_path / "plain", to="dense-2of4")
    export_folder(tmp_path / "armor", tmp_path / "legacy", to="sparse-24-bitmask")
    dense = load_file(tmp_path / "plain" / "model.safetensors")
    for name, layer in layers.items():
        assert torch.equal(dense[f"{name}.weight"], layer.unpack()[0])
    ignored = json.loads((tmp_path / "legacy" / "config.json").read_text())["quantization_config"]["sparsity_config"][
        "ignore"
    ]
    assert ignored == sorted(IGNORED)
    expected = logits(armor_recipes.load(tmp_path / "armor", dtype=torch.float32))
    assert torch.equal(logits(armor_recipes.load(tmp_path / "legacy", dtype=torch.float32)), expected)


def test_legacy_round_trip(plain: Path, tmp_path: Path) -> None:
    legacy, back = tmp_path / "legacy", tmp_path / "back"
    assert export_folder(plain, legacy, to="sparse-24-bitmask").layers == 14
    export_folder(legacy, back, to="dense-2of4")
    assert tensor_hashes(back) == tensor_hashes(plain)
    size = inspect(legacy)
    assert (size.format, size.layers[0].block_size) == ("sparse-24-bitmask", (1, 1))
    up = load_file(legacy / "model.safetensors")
    assert up[f"{UP}.shape"].tolist() == [[64], [32]]
    assert up[f"{UP}.bitmask"][3].tolist() == [0b00110011] * 4  # a group of zeros keeps its first two
    dense = AutoModelForCausalLM.from_pretrained(plain)
    ran = armor_recipes.load(legacy)
    assert torch.equal(logits(ran), logits(dense))
    ran.save_pretrained(tmp_path / "armor")
    assert torch.equal(logits(armor_recipes.load(tmp_path / "armor")), logits(dense))
    reference = armor_recipes.load(legacy, backend="reference", dtype=torch.float32)
    torch.testing.assert_close(
        logits(reference), logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    )


LEGACY_PYTHON = os.environ.get("ARMOR_LEGACY_PYTHON", "")
OLD = """
import sys, torch, compressed_tensors, transformers
from transformers import AutoModelForCausalLM
assert compressed_tensors.__version__ == "0.14.0.1", compressed_tensors.__version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
tokens = (torch.arange(48) * 7 % 96).view(2, 24)
with torch.no_grad():
    torch.save((model(tokens).logits, state), sys.argv[2])
"""
OLD_WRITES = """
import sys, torch
from transformers import AutoModelForCausalLM
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import Sparse24BitMaskConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
config = Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5)
compressor = ModelCompressor(sparsity_config=config)
model.save_pretrained(sys.argv[2], state_dict=compressor.compress(model))
compressor.update_config(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not LEGACY_PYTHON,
    reason="set ARMOR_LEGACY_PYTHON to a Python with compressed-tensors 0.14.0.1, transformers 4.57, accelerate and psutil",
)
def test_compressed_tensors_0_14_reads_what_we_write_and_writes_what_we_read(plain: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export_folder(plain, ours, to="sparse-24-bitmask")
    run_python(LEGACY_PYTHON, OLD, ours, tmp_path / "read.pt")
    old_logits, state = torch.load(tmp_path / "read.pt")
    for name, tensor in load_file(plain / "model.safetensors").items():
        assert torch.equal(state[name], tensor.float()), name
    expected = logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    torch.testing.assert_close(old_logits, expected, rtol=1e-5, atol=1e-5)

    export_folder(
        plain, tmp_path / "dense", to="sparse-24-bitmask"
    )  # its config has the rotary base where they look for it
    stock = tmp_path / "stock"
    stock.mkdir()
    config = json.loads((ours / "config.json").read_text())
    written = config.pop("quantization_config")
    (stock / "config.json").write_text(json.dumps(config))
    save_file(load_file(plain / "model.safetensors"), stock / "model.safetensors", metadata={"format": "pt"})
    run_python(LEGACY_PYTHON, OLD_WRITES, stock, theirs)
    assert json.loads((theirs / "config.json").read_text())["quantization_config"] == written
    a, b = read_layers(ours), read_layers(theirs)
    for name, layer in a.items():
        assert torch.equal(layer.unpack()[0], b[name].unpack()[0])
    same = [
        name
        for name in a
        if torch.equal(a[name].bitmask, b[name].bitmask) and torch.equal(a[name].values, b[name].values)
    ]
    assert set(a) - set(same) <= {UP}  # groups with more than two zeros: which ones are kept is anybody's choice
    left, right = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert all(torch.equal(left[name], right[name]) for name in right if not name.startswith(UP))
    assert torch.equal(logits(armor_recipes.load(theirs)), logits(AutoModelForCausalLM.from_pretrained(plain)))


def test_dense_2of4_weights_are_packed(plain: Path, tmp_path: Path) -> None:
    done = export_folder(plain, tmp_path / "armor", to="armor")
    assert done.layers == 14
    assert json.loads((tmp_path / "armor" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert done.nbytes < sum(tensor.nbytes for tensor in load_file(plain / "model.safetensors").values())
    expected = logits(AutoModelForCausalLM.from_pretrained(plain))
    assert torch.equal(logits(armor_recipes.load(tmp_path / "armor", backend="folded")), expected)


def edit(folder: Path, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for key, value in change.items():
        (quantization if key in ("config_groups", "format", "transform_config") else quantization["sparsity_config"])[
            key
        ] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"format": "pack-quantized", "config_groups": {"group_0": {}}},
            "together with quantisation in the format 'pack-q",
        ),
        ({"sparsity_structure": "unstructured"}, "only sparse-24-bitmask with 2:4 is read"),
        ({"transform_config": {"x": 1}}, "transforms are not read"),
        ({"ignore": [UP]}, f"ignore names '{UP}', which is stored compressed"),
        ({"ignore": 3}, "it must be a list"),
    ],
)
def test_other_legacy_configs_are_refused(plain: Path, tmp_path: Path, change: dict, says: str) -> None:
    export_folder(plain, tmp_path / "legacy", to="sparse-24-bitmask")
    edit(tmp_path / "legacy", change)
    for read in (read_layers, inspect, armor_recipes.load):
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / "legacy")  # type: ignore[operator]


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.shape"] += 8


def no_bitmask(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{UP}.bitmask"]


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.zeros(64, 32)


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.bitmask"][0, 0] = 0b00110001


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wrong_shape, rf"{UP}.shape says \[72, 40\]; the compressed values make \[64, 32\]"),
        (no_bitmask, f"no file holds the tensor {UP}.bitmask"),
        (twice, f"{UP} is stored both compressed and dense"),
        (one_bit, f"{UP}: bitmask: row 0, columns 0 to 3 keep 1"),
    ],
)
def test_damaged_legacy_tensors_are_named(plain: Path, tmp_path: Path, change: object, says: str) -> None:
    export_folder(plain, tmp_path / "legacy", to="sparse-24-bitmask")
    file = tmp_path / "legacy" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        read_layers(tmp_path / "legacy")
    with pytest.raises(CheckpointError, match=says):
        armor_recipes.load(tmp_path / "legacy")


def test_what_cannot_be_exported(plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is dense already"):
        export_folder(plain, tmp_path / "out", to="dense")
    write_checkpoint(session_model(KIND)[0], {}, new(tmp_path / "full"), dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="no linear layer with 2:4 weights"):
        export_folder(tmp_path / "full", tmp_path / "out", to="sparse-24-bitmask")
    with pytest.raises(RecipeError, match="one in the other"):
        export_folder(checkpoint, checkpoint / "out", to="dense")
    export_folder(checkpoint, tmp_path / "out", to="dense")
    with pytest.raises(RecipeError, match="exists: pass --overwrite"):
        export_folder(checkpoint, tmp_path / "out", to="dense")
    export_folder(checkpoint, tmp_path / "out", to="dense", overwrite=True)


def test_rotary_settings_that_old_releases_cannot_hold(plain: Path, tmp_path: Path) -> None:
    folder = new(tmp_path / "nested")
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    export_folder(folder, tmp_path / "legacy", to="sparse-24-bitmask")
    config = json.loads((tmp_path / "legacy" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, None)
    config["rope_parameters"] = {"full_attention": {"rope_theta": 1.0}}
    (tmp_path / "legacy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="rope_parameters differ between layers"):
        export_folder(tmp_path / "legacy", tmp_path / "out", to="sparse-24-bitmask")


def test_verify_names_what_differs(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"armor_manifest.json is missing"):
        verify(checkpoint)
    out = tmp_path / "out"
    export_folder(checkpoint, out, to="dense")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    tensors["extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError) as told:
        verify(out)
    lines = str(told.value).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["extra", "lm_head.weight", "model.norm.weight"]
    manifest = json.loads((out / "armor_manifest.json").read_text())
    for change, says in (({"format_version": 5}, "format_version is 5"), ({"tensors": []}, "must map names")):
        (out / "armor_manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError, match=says):
            verify(out)


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder
