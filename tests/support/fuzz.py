"""Damaged and hostile checkpoints of a few small layers, one for each number, and what their bytes say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from armor_recipes.checkpoint.config import named_tensors, quantization_config
from armor_recipes.checkpoint.legacy import legacy_config, legacy_tensors
from armor_recipes.checkpoint.packing import PackedLinear
from tests.support.marlin import marlin_config, pack_marlin, sample
from tests.support.packed import made_up, quantized

Files = dict[str, bytes]
Q, K, DOWN = "model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.down_proj"
GATE, UP = "model.layers.0.gate_proj", "model.layers.0.up_proj"
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), "", "x", "re:.*", "evil.py:run",
    "../../etc/passwd", "/dev/zero", "model.safetensors", "a\0b", Q, K, DOWN, "F32", "U8", "I64", "F4", [], [0], [8, 8],
    [2**40, 2**40],
    [[[]]], {}, {"a": 1}, {Q: K, K: Q}, "y" * 5000, [1] * 500,
]  # fmt: skip


def layers() -> dict[str, PackedLinear]:
    """Three layers with float cores; the first two share their B."""
    generator = torch.Generator().manual_seed(7)
    q, k, down = (
        PackedLinear.from_factorization(made_up(8, 16, size, generator), torch.bfloat16)
        for size in ((4, 8), (4, 8), (8, 4))
    )
    return {Q: q, K: PackedLinear(k.values, k.bitmask, k.a, q.b), DOWN: down}


def integer_layers() -> dict[str, PackedLinear]:
    """Two layers with int8 and int4 cores."""
    generator = torch.Generator().manual_seed(8)
    gate = quantized(made_up(8, 32, (4, 8), generator), torch.bfloat16, bits=8)
    up = quantized(made_up(8, 32, (4, 8), generator), torch.bfloat16, bits=4, group=8)
    return {GATE: gate, UP: up}


def stored(made: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """The tensors of an ARMOR folder with these layers and one dense tensor."""
    tensors = {
        f"{name}.{part}": tensor for name, layer in made.items() for part, tensor in named_tensors(layer).items()
    }
    del tensors[f"{K}.armor_b"]
    return {**tensors, f"{Q}.bias": torch.zeros(8), "model.norm.weight": torch.arange(4.0)}


def healthy(folder: Path) -> dict[str, Files]:
    """The files of four folders: an ARMOR one, the same in two shards, and two legacy ones, of plain 2:4 and for Marlin."""
    plain = layers()
    made = {**plain, **integer_layers()}
    config = {"num_hidden_layers": 1, "hidden_size": 16, "quantization_config": quantization_config(made, [], {K: Q})}
    tensors = stored(made)
    names = sorted(tensors)
    shards = {"a.safetensors": names[:6], "b.safetensors": names[6:]}
    for file, part in {"model.safetensors": names, **shards}.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    old = {f"{n}.{part}": t.clone() for n, layer in plain.items() for part, t in legacy_tensors(layer).items()}
    save_file(old, folder / "legacy.safetensors")
    marlin = pack_marlin(*sample(4, (64, 32), grouped=False), 4)
    save_file({f"{Q}.{part}": t for part, t in marlin.items()}, folder / "marlin.safetensors")
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    read = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    as_json = json.dumps(config).encode()
    return {
        "armor": {"config.json": as_json, "model.safetensors": read["model.safetensors"]},
        "shards": {
            "config.json": as_json,
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{file: read[file] for file in shards},
        },
        "legacy": {
            "config.json": json.dumps({"quantization_config": legacy_config(["lm_head"])}).encode(),
            "model.safetensors": read["legacy.safetensors"],
        },
        "marlin": {
            "config.json": json.dumps({"quantization_config": marlin_config(4, grouped=False)}).encode(),
            "model.safetensors": read["marlin.safetensors"],
        },
    }


def damaged(files: Files, chance: random.Random) -> Files:
    """The same folder with one file damaged."""
    name = chance.choice(sorted(files))
    tools = _JSON if name.endswith(".json") else _TENSORS
    return {**files, name: chance.choice(tools)(files[name], chance)}


@dataclass(frozen=True)
class Said:
    """What the bytes of a folder say of one tensor, read in the plainest way."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensors_of(files: Files) -> dict[str, Said]:
    """Every tensor of a folder."""
    found = {}
    if "model.safetensors.index.json" in files:
        shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    for file in shards:
        content = files[file]
        end = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:end]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = Said(entry["dtype"], tuple(entry["shape"]), content[end + first : end + last])
    return found


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    header = int.from_bytes(content[:8], "little") + 8 if chance.random() < 0.6 else len(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(min(header, len(content)))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _extend(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.choice((1, 8, 100)))


def _overwrite(content: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(content)), chance.choice((1, 2, 16, 200))
    fill = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return (content[:at] + fill + content[at + size :])[: len(content)]


def _length(content: bytes, chance: random.Random) -> bytes:
    true = int.from_bytes(content[:8], "little")
    length = chance.choice((0, 1, true - 1, true + 1, len(content), 2**31, 2**32, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + content[8:]


def _header(content: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = edit_json(content[8:end], chance)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _swap_places(content: bytes, chance: random.Random) -> bytes:
    """Two tensors exchange their places: they overlap, or their sizes are wrong, unless they are alike."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    first, second = chance.sample(sorted(name for name in header if name != "__metadata__"), 2)
    key = chance.choice(("data_offsets", "shape", "dtype"))
    header[first][key], header[second][key] = header[second][key], header[first][key]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def edit_json(text: bytes, chance: random.Random) -> bytes:
    """Replace, remove, rename or repeat one node somewhere in the tree."""
    tree = json.loads(text)
    node = tree
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps(tree).encode()
        key = chance.choice(keys)
        if not isinstance(node[key], dict | list) or chance.random() < 0.25:
            break
        node = node[key]
    what = chance.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[str(chance.choice(_VALUES))] = node.pop(key)
    elif what == 2 and isinstance(node, dict):
        node["twice " + str(key)] = node[key]
        return json.dumps(tree).replace("twice ", "").encode()
    else:
        node[key] = chance.choice(_VALUES)
    return json.dumps(tree).encode()


def _nest(text: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"[", b'{"a":')) * 50_000 if chance.random() < 0.5 else b"[" * 400 + text + b"]" * 400


_Tool = Callable[[bytes, random.Random], bytes]
_JSON: list[_Tool] = [edit_json] * 12 + [_flip, _truncate, _extend, _overwrite, _nest]
_TENSORS: list[_Tool] = (
    [_flip] * 4 + [_header] * 4 + [_truncate, _extend, _overwrite, _overwrite, _length, _swap_places]
)


def every(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with so many sources of chance, as its argument `chance`."""

    def wrapped(test: Callable[..., None]) -> Callable[..., None]:
        slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
        chances = st.randoms(use_true_random=False, note_method_calls=False)
        return settings(max_examples=count, suppress_health_check=slow)(given(chance=chances)(test))

    return wrapped
