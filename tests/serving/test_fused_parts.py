"""What each process of a server holds of fused and split layers, against the whole layers; without vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.checkpoint.config import LayerSpec, PackedShapes, named_tensors
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.serving import group_problem, split_problem
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.vllm.parts import FusedLinear, InputFactors, Piece, Share, lay_out
from tests.support.forks import Forks
from tests.support.packed import made_up, quantized

Q, K, V, O_ = "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"
BLOCK = (4, 8)
CORES = [(None, None), (8, None), (8, 8), (4, None), (4, 8)]
"""Bits and group size."""


def layers(rows: Mapping[str, int], columns: int, bits: int | None, group: int | None) -> dict[str, PackedLinear]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, count in rows.items():
        factors = made_up(count, columns, BLOCK, generator)
        if bits is None:
            found[name] = PackedLinear.from_factorization(factors, torch.float32)
        else:
            found[name] = quantized(factors, torch.float32, bits=bits, group=group)
    return found


def spec_of(packed: PackedLinear, owner: str | None = None) -> LayerSpec:
    return LayerSpec(packed.block_size, packed.core, owner, packed.group_size)


def sharing(whole: dict[str, PackedLinear], owners: Mapping[str, str]) -> dict[str, PackedLinear]:
    return {n: replace(p, b=whole[owners[n]].b) if n in owners else p for n, p in whole.items()}


def fill(fused: Sequence[FusedLinear], whole: Mapping[str, PackedLinear], owners: Mapping[str, str], seed: int) -> None:
    """Give all layers all tensors of the checkpoint, in any order, as a server does."""
    tensors = [
        (layer, shard if len(layer.parts) > 1 else None, tensor, value)
        for layer in fused
        for shard, part in enumerate(layer.parts)
        for tensor, value in named_tensors(whole[part.name]).items()
        if tensor != "armor_b" or part.name not in owners
    ]
    random.Random(seed).shuffle(tensors)
    for layer, shard, tensor, value in tensors:
        layer.load(tensor, value, shard)


def run(pieces: Sequence[Piece]) -> Tensor:
    """The weight of a layer, `(O, I)` of this process."""
    end = 0
    for piece in pieces:
        assert piece.rows.start == end
        end = piece.rows.stop
    return torch.cat([piece.packed.fold(torch.float32, name=piece.name) for piece in pieces])


def rank_layers(
    whole: Mapping[str, PackedLinear], owners: Mapping[str, str], ways: int, rank: int
) -> tuple[FusedLinear, FusedLinear]:
    """What the process `rank` holds of q, k and v (two key-value heads), split by rows, and of o, split by columns."""
    specs = {name: spec_of(packed, owners.get(name)) for name, packed in whole.items()}
    columns, factors, replicas = whole[Q].shape[1], InputFactors(), max(1, ways // 2)
    key_value = Share(8, ways // replicas, rank // replicas)
    members = {name: specs[name] for name in (Q, K, V)}
    qkv = lay_out(members, [Share(32, ways, rank), key_value, key_value], Share(columns))
    out = lay_out({O_: specs[O_]}, [Share(12)], Share(columns, ways, rank))
    return FusedLinear(qkv, factors, torch.float32), FusedLinear(out, factors, torch.float32)


SIZES = {Q: 32, K: 8, V: 8, O_: 12}
OWNERS = [{}, {K: Q, V: Q}, {V: K}, {V: Q}, {Q: O_, K: O_, V: O_}, {K: Q, V: Q, O_: Q}]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_whole(
    core: tuple[int | None, int | None], owners: Mapping[str, str], ways: int
) -> None:
    whole = sharing(layers(SIZES, 64 * ways, *core), owners)
    dense = {name: packed.fold(torch.float32) for name, packed in whole.items()}
    for rank in range(ways):
        qkv, out = rank_layers(whole, owners, ways, rank)
        fill([qkv, out], whole, owners, seed=rank)
        held = [dense[part.name].narrow(0, part.rows.start, part.rows.count) for part in qkv.parts]
        torch.testing.assert_close(run(qkv.pieces()), torch.cat(held), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(run(out.pieces()), dense[O_].chunk(ways, 1)[rank], rtol=1e-5, atol=1e-6)
    assert {
        part.rows.start for rank in range(ways) for part in rank_layers(whole, owners, ways, rank)[0].parts[1:]
    } == {*range(0, 8, 8 // min(ways, 2))}


@pytest.mark.parametrize(
    ("owners", "names"),
    [
        ({}, [Q, K, V]),
        ({K: Q, V: Q}, [f"{Q}, {K}, {V}"]),
        ({V: K}, [Q, f"{K}, {V}"]),
        ({V: Q}, [Q, K, V]),
        ({Q: O_, K: O_, V: O_}, [f"{Q}, {K}, {V}"]),
    ],
)
def test_modules_beside_each_other_that_share_run_as_one(owners: Mapping[str, str], names: list[str]) -> None:
    whole = sharing(layers(SIZES, 64, None, None), owners)
    qkv, out = rank_layers(whole, owners, 1, 0)
    fill([qkv, out], whole, owners, seed=0)
    assert [piece.name for piece in qkv.pieces()] == names
    stored = len({owners.get(name, name) for name in (Q, K, V)})
    assert qkv.tensors["armor_b"].shape == (stored, 8, 8, 8)
    for piece in qkv.pieces():
        assert piece.packed.values.data_ptr() == qkv.tensors["weight"][piece.rows].data_ptr()  # not copied


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("core", CORES)
def test_one_module_that_is_stored_fused(core: tuple[int | None, int | None], ways: int) -> None:
    """As Phi-3 stores gate_up_proj: each process holds rows of both halves."""
    whole = layers({"mlp.gate_up_proj": 32}, 16, *core)["mlp.gate_up_proj"]
    dense = whole.fold(torch.float32)
    for rank in range(ways):
        parts = lay_out({"mlp.gate_up_proj": spec_of(whole)}, [Share(16, ways, rank)] * 2, Share(16))
        layer = FusedLinear(parts, InputFactors(), torch.float32)
        for name, tensor in named_tensors(whole).items():
            layer.load(name, tensor)
        held = [half.chunk(ways)[rank] for half in dense.chunk(2)]
        torch.testing.assert_close(run(layer.pieces()), torch.cat(held), rtol=1e-5, atol=1e-6)
        assert len(layer.pieces()) == 1


def test_floats_are_cast_and_integers_are_not() -> None:
    whole = layers({O_: 8}, 16, 8, None)[O_]
    layer = FusedLinear(lay_out({O_: spec_of(whole)}, [Share(8)], Share(16)), InputFactors(), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in layer.tensors.items()}
    assert dtypes == {
        "weight": torch.int8,
        "bitmask": torch.uint8,
        "armor_a": torch.bfloat16,
        "armor_b": torch.bfloat16,
        "weight_scale": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("weight", "attn.k_proj.weight"),
        ("bitmask", "attn.k_proj.bitmask"),
        ("armor_a", "attn.k_proj.armor_a"),
        ("armor_b", "attn.k_proj.armor_b"),
    ],
)
def test_a_tensor_that_no_file_has_is_named(tensor: str, says: str) -> None:
    whole = layers(SIZES, 64, None, None)
    qkv, _ = rank_layers(whole, {}, 1, 0)
    for shard, part in zip("qkv", qkv.parts, strict=True):
        for name, value in named_tensors(whole[part.name]).items():
            if (name, shard) != (tensor, "k"):
                qkv.load(name, value, shard)
    with pytest.raises(CheckpointError, match=f"the checkpoint holds no {says}: it is damaged"):
        qkv.pieces()


def test_an_owner_that_is_missing_is_named() -> None:
    owners = {K: Q, V: Q, O_: Q}
    whole = sharing(layers(SIZES, 64, None, None), owners)
    qkv, out = rank_layers(whole, owners, 1, 0)
    for name in ("weight", "bitmask", "armor_a"):
        out.load(name, named_tensors(whole[O_])[name])
    with pytest.raises(CheckpointError, match=f"holds no {Q}.armor_b"):
        out.pieces()
    qkv.load("armor_b", whole[Q].b, "q")
    assert torch.equal(out.pieces()[0].packed.b, whole[Q].b)


def test_a_sharer_with_a_factor_of_its_own_is_refused() -> None:
    owners = {K: Q}
    whole = layers(SIZES, 64, None, None)
    qkv, _ = rank_layers(whole, owners, 1, 0)
    with pytest.raises(CheckpointError, match=rf"{K}.armor_b is no tensor of this layer, which uses the B of {Q}"):
        qkv.load("armor_b", whole[K].b, "k")


@pytest.mark.parametrize("shard", [None, 3, "index_q", (0, 1)])
def test_ways_of_loading_that_are_not_known_are_refused(shard: object) -> None:
    whole = layers(SIZES, 64, None, None)
    qkv, _ = rank_layers(whole, {}, 1, 0)
    with pytest.raises(CheckpointError, match=r"attn.q_proj.weight: the server loads it as part .* is not known here"):
        qkv.load("weight", whole[Q].values, shard)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t.to(torch.int8)),
        ("bitmask", lambda t: t.float()),
        ("bitmask", lambda t: t[:, :-1]),
        ("armor_a", lambda t: t[:-1]),
        ("armor_b", lambda t: t.long()),
        ("armor_b", lambda t: t[:, :4]),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensor: str, change: Callable[[Tensor], Tensor]) -> None:
    whole = layers(SIZES, 64, None, None)
    qkv, _ = rank_layers(whole, {}, 1, 0)
    with pytest.raises(CheckpointError, match=rf"{V}.{tensor} is \(.*\) torch.*; by config.json it is"):
        qkv.load(tensor, change(named_tensors(whole[V])[tensor]), "v")


@given(
    st.sampled_from([1, 2, 4, 8, 16, 24]),
    st.sampled_from([1, 4, 8, 12]),
    st.sampled_from([*CORES[:1], (8, None), (8, 8), (8, 24), (4, 16)]),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_the_conditions_say_when_a_split_layer_is_whole(
    b_i: int, b_o: int, core: tuple[int | None, int | None], units: int, ways: int
) -> None:
    """A layer is split exactly where each process's part is a layer of the format."""
    bits, group = core
    spec = LayerSpec((b_o, b_i), f"int{bits}" if bits else "float", None, group)
    rows, columns = 4 * units, 16 * units
    for side, size, shape in (("rows", rows, (0, 8)), ("columns", columns, (8, 0))):
        held = tuple(size // ways if length == 0 else length * 96 for length in shape)
        problem = split_problem("m", size, spec, side=side, ways=ways)
        whole = size % ways == 0
        try:
            PackedShapes.of(held, spec)
        except CheckpointError:
            whole = False
        assert (problem is None) == whole
        assert problem is None or problem.startswith(f"m: {size} {side} over {ways} processes are not whole blocks")


def test_a_part_that_cuts_a_block_is_refused() -> None:
    spec = LayerSpec((8, 16))
    for rows, columns in ((Share(24, 2, 1), Share(32)), (Share(16), Share(48, 2)), (Share(8, offset=4), Share(32))):
        with pytest.raises(CheckpointError, match=r"m: .* are not whole blocks .*serve: \{tensor_parallel"):
            FusedLinear(lay_out({"m": spec}, [rows], columns), InputFactors(), torch.float32)


def test_groups_need_one_kind() -> None:
    plain = LayerSpec((8, 8))
    assert group_problem({"q": plain, "k": replace(plain, input_factor="q"), "v": plain}) is None
    assert group_problem({"q": None, "k": None}) is None
    for other in (None, LayerSpec((8, 16)), LayerSpec((8, 8), "int8"), LayerSpec((8, 8), "int8", None, 16)):
        problem = group_problem({"q": plain, "k": plain, "v": other})
        assert problem is not None
        assert problem.startswith("v (")
        assert "runs as one layer with q (block size [8, 8], float core)" in problem


def test_neither_the_package_nor_the_parts_import_vllm(forks: Forks, tmp_path: Path) -> None:
    code = "import sys, armor_recipes, armor_recipes.integrations.vllm.parts; assert 'vllm' not in sys.modules"
    forks.run(code, folder=tmp_path, path=Path(__file__).parents[2])
