"""Whatever a folder holds, reading it raises an error of ours, or gives exactly the tensors that its bytes say."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from armor_recipes.checkpoint.legacy import LEGACY_NAMES
from armor_recipes.checkpoint.marlin import is_marlin
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import check_folder, inspect, read_layers
from armor_recipes.errors import ArmorError, CheckpointError
from armor_recipes.solver.quantize import spread
from tests.support.fuzz import Files, Said, damaged, healthy, integer_layers, layers, tensors_of
from tests.support.marlin import pack_marlin

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
}
_FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
)
_SECONDS_A_CASE, _GROWTH_IN_KB = 5.0, 300_000
_watched: list[Path] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    """Fails a case that executes or imports anything, or opens a file outside its folder. It cannot be removed again."""
    if not _watched:
        return
    if event in _FORBIDDEN:
        raise AssertionError(f"reading a checkpoint did {event} {arguments}")
    if event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).parent != _watched[0]:
        raise AssertionError(f"reading a checkpoint opened {arguments[0]}")


@contextmanager
def audited(folder: Path) -> Iterator[None]:
    _watched.append(folder)
    try:
        yield
    finally:
        _watched.clear()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    sys.addaudithook(_audit)
    return healthy(tmp_path_factory.mktemp("healthy"))


def put(files: Files, folder: Path) -> None:
    for name in {path.name for path in folder.iterdir()} - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def is_what_the_bytes_say(read: dict[str, PackedLinear], files: Files) -> None:
    said = tensors_of(files)
    config = json.loads(files["config.json"])["quantization_config"]
    if is_marlin(config):
        marlin_layers_are_what_the_bytes_say(read, said)
        return
    legacy = bool(config.get("sparsity_config"))
    kwargs = [group["weights"].get("observer_kwargs") or {} for group in config.get("config_groups", {}).values()]
    owners = {sharer: owner for group in kwargs for sharer, owner in (group.get("armor_input_factor") or {}).items()}
    assert read
    for name, layer in read.items():
        stored = LEGACY_NAMES[:2] if legacy else ("weight", "bitmask", "armor_a")
        wanted = [f"{name}.{part}" for part in stored] + ([] if legacy else [f"{owners.get(name, name)}.armor_b"])
        tensors = [layer.values, layer.bitmask, layer.a, layer.b][: len(wanted)]
        if layer.scale is not None:
            tensors, wanted = [*tensors, layer.scale], [*wanted, f"{name}.weight_scale"]
        for tensor, key in zip(tensors, wanted, strict=True):
            bytes_read = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert (_DTYPES[tensor.dtype], tuple(tensor.shape)) == (said[key].dtype, said[key].shape)
            assert bytes_read == said[key].data
        if legacy:
            assert layer.is_plain
        layer.validate()


def marlin_layers_are_what_the_bytes_say(read: dict[str, PackedLinear], said: dict[str, Said]) -> None:
    assert read
    for name, layer in read.items():
        factors = layer.factors(name=name)
        assert factors.quantized is not None
        integers = spread(factors.quantized.integers, factors.mask)
        packed = pack_marlin(integers, factors.mask, factors.quantized.scale, factors.quantized.num_bits)
        for part, tensor in packed.items():
            assert tensor.numpy().tobytes() == said[f"{name}.{part}"].data


def run(cases: range, samples: dict[str, Files], folder: Path) -> dict[str, int]:
    """Read each case in all three ways; returns how many were refused and how many were read."""
    kinds = sorted(samples)
    counts = {"refused": 0, "read": 0}
    for number in cases:
        chance = random.Random(number)
        files = damaged(samples[kinds[number % len(kinds)]], chance)
        put(files, folder)
        begin = time.perf_counter()
        read = None
        try:
            with audited(folder):
                for measure in (check_folder, inspect):
                    with suppress(ArmorError):
                        measure(folder)
                read = read_layers(folder)
        except CheckpointError:
            counts["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        if read is not None:
            is_what_the_bytes_say(read, files)
            counts["read"] += 1
        assert time.perf_counter() - begin < _SECONDS_A_CASE, f"case {number} took too long"
    return counts


def fuzz(cases: range, samples: dict[str, Files], folder: Path) -> None:
    for files in samples.values():
        put(files, folder)
        is_what_the_bytes_say(read_layers(folder), files)
        inspect(folder)
        check_folder(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = run(cases, samples, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _GROWTH_IN_KB
    assert counts["refused"] + counts["read"] == len(cases)
    assert min(counts.values()) > len(cases) // 20, f"one-sided: {counts}"


def test_a_few_hundred_damaged_folders(samples: dict[str, Files], tmp_path: Path) -> None:
    fuzz(range(600), samples, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_damaged_folders(samples: dict[str, Files], tmp_path: Path) -> None:
    fuzz(range(600, 11_600), samples, tmp_path)


def test_the_watch_sees(samples: dict[str, Files], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="opened"), audited(tmp_path):
        Path(__file__).read_text()
    with pytest.raises(AssertionError, match=r"did (compile|exec)"), audited(tmp_path):
        exec("1")


# --- single attacks ---------------------------------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def packed(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def refused(files: Files, folder: Path, says: str) -> None:
    put(files, folder)
    for read in (check_folder, inspect, read_layers):
        with pytest.raises(CheckpointError, match=says):
            read(folder)


def with_weights(samples: dict[str, Files], content: bytes) -> Files:
    return {**samples["armor"], "model.safetensors": content}


@pytest.mark.parametrize("length", [2**20, 2**33, 2**63, 2**64 - 1])
def test_huge_header_length(samples: dict[str, Files], tmp_path: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + samples["armor"]["model.safetensors"][8:]
    refused(
        with_weights(samples, content), tmp_path, rf"model.safetensors cannot be read: a header of {length} bytes in a"
    )


def test_a_long_header_in_a_sparse_file_is_not_read(samples: dict[str, Files], tmp_path: Path) -> None:
    put(samples["armor"], tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    with pytest.raises(CheckpointError, match="at most 33554432 are read"):
        read_layers(tmp_path)


def test_a_name_that_stands_there_twice(samples: dict[str, Files], tmp_path: Path) -> None:
    header, data = header_of(samples["armor"]["model.safetensors"])
    text = json.dumps(header)
    twice = text[:-1] + ", " + json.dumps({"model.norm.weight": header["model.norm.weight"]})[1:]
    refused(with_weights(samples, packed(twice, data)), tmp_path, "names 'model.norm.weight' twice")
    config = samples["armor"]["config.json"].decode()
    doubled = config[:-1] + ', "quantization_config": {}}'
    put({**samples["armor"], "config.json": doubled.encode()}, tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json names 'quantization_config' twice"):
        check_folder(tmp_path)


def test_overlapping_places(samples: dict[str, Files], tmp_path: Path) -> None:
    header, data = header_of(samples["armor"]["model.safetensors"])
    first, second = (f"model.layers.0.{name}.weight" for name in ("q_proj", "k_proj"))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    refused(with_weights(samples, packed(json.dumps(header), data)), tmp_path, "overlap or leave a gap")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": [2**40, 2**40]}, "q_proj.weight' is .* shape and place disagree"),
        ({"shape": [2**63]}, "q_proj.weight' has shape .* no sizes"),
        ({"shape": [1] * 9}, "no sizes"),
        ({"shape": [-8, -8]}, "no sizes"),
        ({"shape": [8.0, 8]}, "no sizes"),
        ({"data_offsets": [0]}, "no sizes"),
        ({"data_offsets": [128, 0]}, "shape and place disagree"),
        ({"dtype": "Q4"}, "unknown dtype 'Q4'"),
        ({"more": 1}, "needs dtype, shape and data_offsets"),
    ],
)
def test_absurd_entries(samples: dict[str, Files], tmp_path: Path, change: dict, says: str) -> None:
    header, data = header_of(samples["armor"]["model.safetensors"])
    header["model.layers.0.q_proj.weight"].update(change)
    refused(with_weights(samples, packed(json.dumps(header), data)), tmp_path, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"text_config": {"head_dim": float("inf")}}, "text_config.head_dim is inf"),
    ],
)
def test_models_far_larger_than_their_files(samples: dict[str, Files], tmp_path: Path, change: dict, says: str) -> None:
    config = {**json.loads(samples["armor"]["config.json"]), **change}
    put({**samples["armor"], "config.json": json.dumps(config).encode()}, tmp_path)
    with pytest.raises(CheckpointError, match=says):
        check_folder(tmp_path)


def test_pipes_and_folders_are_not_read(samples: dict[str, Files], tmp_path: Path) -> None:
    import os

    put(samples["armor"], tmp_path)
    for name in ("config.json", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is (missing|no regular file)"):
            read_layers(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)
    assert read_layers(tmp_path).keys() == {**layers(), **integer_layers()}.keys()
