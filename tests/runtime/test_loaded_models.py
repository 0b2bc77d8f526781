"""A checkpoint through `from_pretrained` and `load` on the CPU backends."""

from __future__ import annotations

import copy
import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import armor_recipes
from armor_recipes.runtime import ArmorLinear, pages, set_backend
from armor_recipes.runtime.auto import DenseCores, choices
from armor_recipes.runtime.backends import choose_backend
from armor_recipes.runtime.kernel import kernel_available
from tests.support.packed import logits, write

pytestmark = [
    pytest.mark.skipif(not kernel_available(), reason="the kernel was not built"),
    pytest.mark.usefixtures("default_backend"),
]
PROMPT = torch.tensor([[1, 5, 9]])


def layers(model: PreTrainedModel) -> list[ArmorLinear]:
    return [module for module in model.modules() if isinstance(module, ArmorLinear)]


def test_auto_is_the_default_and_folds_nothing(checkpoint: Path) -> None:
    assert choose_backend().name == "auto"
    for model in (armor_recipes.load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)):
        expected = logits(armor_recipes.load(checkpoint, backend="folded"))
        assert (logits(model) - expected).norm() < 0.02 * expected.norm()
        prepared = [layer._prepared for layer in layers(model)]
        assert all(made is not None and isinstance(made[1], DenseCores) and not made[1].kept for made in prepared)
    assert choices()


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_large_weights_lie_in_memory_of_large_pages(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a token reads: packed values and masks, and the layers that stay dense. Its bits and the folder stay as they are."""
    mapped = armor_recipes.load(checkpoint, dtype="auto")
    monkeypatch.setattr(pages, "LARGE_PAGE", 1 << 9)
    moved: list[int] = []

    def copied(tensor: Tensor, advice: int) -> Tensor:
        made = _copied(tensor, advice)
        assert made.data_ptr() % mmap.PAGESIZE == 0
        moved.append(made.data_ptr())
        return made

    _copied = pages._copied
    monkeypatch.setattr(pages, "_copied", copied)
    model = armor_recipes.load(checkpoint)
    held = {parameter.data_ptr() for parameter in model.parameters() if parameter.nbytes >= 1 << 9}
    assert {layer.weight.data_ptr() for layer in layers(model)} <= set(moved) <= held
    assert torch.equal(logits(model), logits(mapped))
    model.save_pretrained(tmp_path)
    stored, again = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    moved.clear()
    armor_recipes.load(checkpoint, backend="folded")
    assert not moved


@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
def test_float32_agrees_with_the_folded_model(checkpoint: Path, backend: str) -> None:
    model = armor_recipes.load(checkpoint, backend=backend, dtype=torch.float32)
    expected = logits(armor_recipes.load(checkpoint, backend="folded", dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert set_backend(model, "folded") == len(layers(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 8), (4, None), (4, 8)])
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_quantized_cores_agree_with_the_folded_model(
    tmp_path: Path, backend: str, bits: int, group: int | None
) -> None:
    write("llama-attention-bias-gqa", tmp_path / "model", bits=bits, group=group)
    model = armor_recipes.load(tmp_path / "model", backend=backend, dtype=torch.float32)
    expected = logits(armor_recipes.load(tmp_path / "model", backend="folded", dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer._prepared[1], torch.Tensor) for layer in layers(model) if layer._prepared)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_generate_copies_and_saving(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    model = armor_recipes.load(checkpoint, backend=backend, dtype=torch.float32)
    folded = armor_recipes.load(checkpoint, backend="folded", dtype=torch.float32)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(PROMPT, **options)
    assert torch.equal(tokens, folded.generate(PROMPT, **options))
    assert torch.equal(copy.deepcopy(model).generate(PROMPT, **options), tokens)
    stored = armor_recipes.load(checkpoint, backend=backend)
    logits(stored)
    stored.save_pretrained(tmp_path)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_compiled_model(checkpoint: Path) -> None:
    model = armor_recipes.load(checkpoint, backend="cpu", dtype=torch.float32)
    expected = logits(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_packed_tensors_stay_in_the_file_wherever_it_has_them(tmp_path: Path, bits: int | None) -> None:
    """Values and masks are the most of a model, and are only unpacked: no copy of them is made; the logits stay to the bit."""
    found = []
    for place in (0, 24):
        folder = tmp_path / str(place)
        write("llama-attention-bias-gqa", folder, bits=bits, group=None)
        file = folder / "model.safetensors"
        content = file.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip(b" ")
        header += b" " * ((place - 8 - len(header)) % 64)
        file.write_bytes(
            len(header).to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]
        )
        model = armor_recipes.load(folder, backend="reference")
        packed = [tensor for layer in layers(model) for tensor in (layer.weight, layer.bitmask)]
        others = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        if place:
            assert sum(tensor.data_ptr() % 64 != 0 for tensor in packed) > len(packed) / 2
            inside = {tensor.data_ptr() for tensor in packed}
            assert not any(tensor.data_ptr() % 64 for tensor in others if tensor.data_ptr() not in inside)
        found.append(logits(model))
    assert torch.equal(*found)
