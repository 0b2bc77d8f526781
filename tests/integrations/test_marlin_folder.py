"""A folder in marlin-24 is inspected, run and converted with its integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import armor_recipes
from armor_recipes.checkpoint.reader import check_folder, inspect, read_layers
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import CheckpointError, PlanError
from armor_recipes.integrations.exporting import export_folder
from tests.support.marlin import dense, marlin_config, pack_marlin, sample
from tests.support.packed import logits

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    logging.disable_progress_bar()


def write_both(folder: Path, *, bits: int, grouped: bool) -> None:
    """A model whose linear layers, but lm_head, are 2:4 and quantised: `dense` in float32, and `marlin`."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).bfloat16().float().eval()
    stored: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            shape = (module.out_features, module.in_features)
            integers, mask, scale = sample(bits, shape, grouped=grouped, seed=seed)
            scale = scale / 2**bits  # outputs of a usual size
            module.weight.data = dense(integers, scale)
            module.bias = None if module.bias is None else nn.Parameter(torch.arange(shape[0]) % 7 / 8)
            stored.update({f"{name}.{part}": t for part, t in pack_marlin(integers, mask, scale, bits).items()})
    model.save_pretrained(folder / "dense")
    model.bfloat16().save_pretrained(folder / "marlin")
    file = folder / "marlin" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if f"{name}_packed" not in stored}
    save_file({**kept, **stored}, file, metadata={"format": "pt"})
    edit_config(
        folder / "marlin", lambda config: config.update(quantization_config=marlin_config(bits, grouped=grouped))
    )


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=[(4, True), (8, False)], ids=["int4-groups", "int8-channel"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    bits, grouped = request.param
    write_both(tmp_path, bits=bits, grouped=grouped)
    return tmp_path


def test_it_runs_as_the_dense_model(both: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(both / "dense"))
    model = armor_recipes.load(both / "marlin", backend="reference", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    ran = logits(armor_recipes.load(both / "marlin")).float()
    assert float((ran - expected).norm() / expected.norm()) < 0.02  # bfloat16, as config.json says


def test_it_becomes_an_armor_checkpoint_with_the_same_integers(both: Path) -> None:
    done = export_folder(both / "marlin", both / "armor", to="armor")
    assert done.layers == 7
    verify(both / "armor")
    before, after = read_layers(both / "marlin"), read_layers(both / "armor")
    for name, layer in before.items():
        for part in ("values", "bitmask", "a", "b", "scale"):
            assert torch.equal(getattr(layer, part), getattr(after[name], part))
    assert json.loads((both / "armor" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert torch.equal(logits(armor_recipes.load(both / "armor")), logits(armor_recipes.load(both / "marlin")))
    armor_recipes.load(both / "marlin").save_pretrained(both / "saved")
    assert torch.equal(logits(armor_recipes.load(both / "saved")), logits(armor_recipes.load(both / "marlin")))
    with pytest.raises(PlanError, match="is an ARMOR checkpoint already"):
        export_folder(both / "armor", both / "again", to="armor")


def test_it_becomes_a_dense_checkpoint(both: Path) -> None:
    export_folder(both / "marlin", both / "out", to="dense")
    written = load_file(both / "out" / "model.safetensors")
    for name, weight in load_file(both / "dense" / "model.safetensors").items():
        assert torch.equal(written[name].float(), weight.to(written[name].dtype).float()), name
    with pytest.raises(PlanError, match="a quantised core"):
        export_folder(both / "marlin", both / "sparse", to="dense-2of4")


def test_its_bytes_are_counted(both: Path) -> None:
    found = inspect(both / "marlin")
    stored = load_file(both / "marlin" / "model.safetensors")
    assert (found.format, len(found.layers)) == ("marlin-24", 7)
    up = next(layer for layer in found.layers if layer.name == UP)
    parts = ("weight_packed", "scale_packed", "meta")
    assert (up.shape, up.core) == ((384, 128), read_layers(both / "marlin")[UP].core)
    assert up.nbytes == sum(stored[f"{UP}.{part}"].nbytes for part in parts)
    assert found.nbytes == sum(tensor.nbytes for tensor in stored.values())


def group(change: dict[str, Any], part: str | None = "weights") -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        found = config["quantization_config"]["config_groups"]["group_0"]
        (found if part is None else found[part]).update(change)

    return edit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (group({"symmetric": False}), "symmetric integers of 4 or 8 bits"),
        (group({"group_size": 64}), "a group of 128"),
        (group({"strategy": "tensor"}), "one scale a channel or a group"),
        (group({"actorder": "group"}), "without actorder: group"),
        (group({"num_bits": 8}), "promises .8. bits, but model.layers.0.mlp.down_proj is stored with int4"),
        (group({"num_bits": []}), "of 4 or 8 bits"),
        (group({"format": "pack-quantized"}, None), "all of them in this format"),
        (group({"input_activations": {"num_bits": 8}}, None), "only weights are quantised"),
        (lambda c: c["quantization_config"].update(config_groups={}), "it must name a group"),
        (lambda c: c["quantization_config"].update(config_groups=[3]), "it must name a group"),
        (lambda c: c["quantization_config"].update(config_groups={"x": 3}), "must describe weights"),
        (lambda c: c["quantization_config"].update(quant_method="x"), "marlin-24 with quant_method 'x'"),
        (lambda c: c["quantization_config"].update(transform_config={"a": 1}), "transforms are not read"),
    ],
)
def test_configs_that_no_release_wrote_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    write_both(tmp_path, bits=4, grouped=True)
    edit_config(tmp_path / "marlin", change)
    for read in (read_layers, inspect, check_folder, armor_recipes.load):
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / "marlin")  # type: ignore[operator]


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"]).contiguous()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(f"{UP}.meta"), f"no file holds the tensor {UP}.meta"),
        (lambda tensors: tensors.pop(f"{UP}.weight_packed"), f"{UP}.(scale_packed|meta)'? has no weight_packed beside"),
        (lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(3)}), f"{UP} is stored both"),
        (replaced("meta", lambda t: t[:, :32]), r"it must be \(I/32, 2 O\) I16, O a multiple of 64"),
        (replaced("meta", lambda t: t.int()), r"up_proj.meta is \(4, 768\) I32"),
        (replaced("weight_packed", lambda t: t[:2]), r"it must be \(4, 768\) I32, or with int8 \(4, 1536\)"),
        (replaced("weight_packed", lambda t: t.float()), r"weight_packed is \(4, 768\) F32"),
        (replaced("scale_packed", lambda t: t.expand(3, -1)), r"for a weight \(384, 128\) it must be \(1, 384\) F16"),
        (replaced("scale_packed", lambda t: -t), "384 of 384 scales are not positive"),
        (replaced("scale_packed", lambda t: t * torch.inf), "384 of 384 numbers are not finite"),
        (replaced("meta", torch.zeros_like), "meta: row 0, columns 0 to 3 keep entries 0 and 0"),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str) -> None:
    write_both(tmp_path, bits=4, grouped=True)
    file = tmp_path / "marlin" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    for read in (read_layers, armor_recipes.load):
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / "marlin")  # type: ignore[operator]
