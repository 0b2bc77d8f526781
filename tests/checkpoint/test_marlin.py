"""2:4 with integers, packed for the Marlin kernel, is read as compressed-tensors 0.14.0.1 packed it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.marlin import MARLIN_NAMES, unpack_marlin
from tests.support.marlin import CASES, GOLDEN, dense, pack_marlin, sample

LEGACY_PYTHON = os.environ.get("ARMOR_LEGACY_PYTHON", "")


def golden(case: str) -> dict[str, torch.Tensor]:
    stored = load_file(GOLDEN)
    return {part: stored[f"{case}.{part}"] for part in MARLIN_NAMES}


@pytest.mark.parametrize("case", CASES)
def test_what_compressed_tensors_packed_is_read_exactly(case: str) -> None:
    bits, shape, grouped = CASES[case]
    integers, mask, scale = sample(bits, shape, grouped=grouped)
    packed = unpack_marlin(*golden(case).values(), spec=LayerSpec((1, 1), f"int{bits}", None, 64 if grouped else None))
    packed.validate()
    core, kept = packed.unpack()
    assert torch.equal(kept, mask)
    assert torch.equal(core, dense(integers, scale))
    assert (packed.core, packed.shape, packed.group_size) == (f"int{bits}", shape, 64 if grouped else None)
    assert packed.scale is not None
    assert torch.equal(packed.scale, scale)
    assert torch.equal(packed.fold(torch.float32), core)


@pytest.mark.parametrize("case", CASES)
def test_the_samples_are_packed_as_compressed_tensors_packs_them(case: str) -> None:
    bits, shape, grouped = CASES[case]
    packed = pack_marlin(*sample(bits, shape, grouped=grouped), bits)
    for part, tensor in golden(case).items():
        assert packed[part].dtype == tensor.dtype
        assert torch.equal(packed[part], tensor), part


THEY_PACK = """
import sys, torch, compressed_tensors
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
assert compressed_tensors.__version__ == "0.14.0.1", compressed_tensors.__version__
made = {}
for case, (weight, scale, bits, size) in torch.load(sys.argv[1]).items():
    strategy = "channel" if size is None else "group"
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {"p.weight": weight, "p.weight_scale": scale}
    for name, tensor in Marlin24Compressor().compress(state, names_to_scheme={"p": scheme}).items():
        made[name.replace("p.", case + ".")] = tensor.clone()
torch.save(made, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not LEGACY_PYTHON,
    reason="set ARMOR_LEGACY_PYTHON to a Python with compressed-tensors 0.14.0.1 and transformers 4.57",
)
def test_compressed_tensors_0_14_packs_the_golden_file(tmp_path: Path) -> None:
    asked = {}
    for case, (bits, shape, grouped) in CASES.items():
        integers, _, scale = sample(bits, shape, grouped=grouped)
        asked[case] = dense(integers, scale), scale.float(), bits, 128 if grouped else None
    torch.save(asked, tmp_path / "asked.pt")
    command = [LEGACY_PYTHON, "-c", THEY_PACK, str(tmp_path / "asked.pt"), str(tmp_path / "made.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    made = torch.load(tmp_path / "made.pt")
    save_file(made, tmp_path / "made.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == GOLDEN.read_bytes()
