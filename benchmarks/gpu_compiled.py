"""The Triton kernels of the backend `cuda`, compiled without a card: registers, spills and shared memory, as a Markdown table.

    python benchmarks/gpu_compiled.py [--capability 80 86 89 90 100] [--json FILE]

Each kernel is compiled by Triton for bfloat16 layers of block 128, as its default plan launches it, and assembled by the `ptxas`
that comes with Triton, which says what a thread takes. `loads` are loads of 16 bytes from global memory, `shared` instructions that
write to shared memory, `shuffles` those that pass numbers between lanes; each is counted once, however often it runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from losses import Row, show
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from armor_recipes.runtime import triton_kernel

CAPABILITIES = (80, 86, 89, 90, 100)
_TYPES = {
    "x": "*bf16",
    "factor": "*bf16",
    "bias": "*bf16",
    "scale": "*bf16",
    "a": "*bf16",
    "y": "*bf16",
    "core": "*bf16",
    "words": "*i32",
    "bitmask": "*u8",
    "values": "*bf16",
}
"""Of arguments that are no 32-bit integers; contenders may differ."""
_WHOLE = ("rows", "columns", "size")
"""Numbers that are multiples of 16, as pointers are."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A kernel as it is launched."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    warps: int
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a kernel takes on cards of one compute capability."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: int
    shared_stores: int
    shuffles: int


def contenders(capability: int) -> list[Contender]:
    """All kernels, with the forms of each that a card of this compute capability has."""
    found: list[Contender] = []
    for core, scale, parts in (("float", "", 0), ("int8", "rows", 0), ("int4", "groups", 4)):
        for tokens in (8, 16):
            constants: dict[str, Any] = {
                "CORE": core,
                "SCALE": scale,
                "PARTS": parts,
                "FUSED": False,
                "TILES": 1,
                "TOKENS": tokens,
            }
            name = f"core {core}, {tokens} tokens"
            found.append(Contender(name, triton_kernel.core_kernel, constants, {"y": "*fp32"}, warps=1, stages=1))
        fused = {**constants, "FUSED": True, "TILES": 2, "TOKENS": 8}
        found.append(
            Contender(f"core {core}, A fused, block 32", triton_kernel.core_kernel, fused, {}, warps=1, stages=1)
        )
        values = {"values": {"float": "*bf16", "int8": "*i8", "int4": "*i32"}[core]}
        tile: dict[str, Any] = {"CORE": core, "ROWS": 16, "FOURS": 64}
        found.append(Contender(f"unpack {core}", triton_kernel.unpack_kernel, tile, values, warps=4))
    plain: dict[str, Any] = {"SPLITS": 1, "NUMBERS": "", "BIAS": False, "OUT": 32, "INNER": 64, "TOKENS": 16}
    many = {**plain, "OUT": 128, "TOKENS": 64}
    found += [
        Contender("B, 16 tokens", triton_kernel.factor_kernel, plain, {"scale": "*bf16"}, warps=2),
        Contender("A, 16 tokens, 8 parts", triton_kernel.factor_kernel, {**plain, "SPLITS": 8}, {"x": "*fp32"}, 2, 2),
        Contender("A or B, more tokens", triton_kernel.factor_kernel, many, {}, warps=4),
    ]
    for numbers, kind in (("int8", "*i8"), ("fp8", "*fp8e4nv")):
        if numbers == "int8" or capability >= 89:
            constants = {**many, "NUMBERS": numbers, "TOKENS": 16}
            types = {"y": kind, "scale": "*fp32"}
            found.append(Contender(f"B in {numbers}", triton_kernel.factor_kernel, constants, types, warps=4))
    return found


def compile_kernel(contender: Contender, capability: int) -> Compiled:
    """Compile and assemble. Raises `subprocess.CalledProcessError` where ptxas refuses."""
    names, types = contender.kernel.arg_names, {**_TYPES, **contender.types}
    signature = {name: "constexpr" if name in contender.constants else types.get(name, "i32") for name in names}
    whole = [place for place, name in enumerate(names) if signature[name][0] == "*" or name in _WHOLE]
    source = ASTSource(
        contender.kernel, signature, dict(contender.constants), {(place,): [["tt.divisibility", 16]] for place in whole}
    )
    options = {"num_warps": contender.warps, "num_stages": contender.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    said = _assembled(ptx, capability)
    counts = {
        word: len(re.findall(rf"^\s*(?:@%p\d+ )?{word}", ptx, re.MULTILINE)) for word in ("st.shared", "shfl.sync")
    }
    wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg", ptx))
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert registers, said
    return Compiled(
        int(registers[1]), sum(map(int, spills)), made.metadata.shared, wide, counts["st.shared"], counts["shfl.sync"]
    )


def _assembled(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, ptx
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [
            get_ptxas(capability).path,
            "-v",
            "--gpu-name",
            target[1],
            str(file),
            "-o",
            str(Path(folder) / "cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def table(capabilities: Sequence[int]) -> list[Row]:
    """A row for each kernel, a column for each capability."""
    found: dict[str, dict[int, Compiled]] = {}
    for capability in capabilities:
        for contender in contenders(capability):
            found.setdefault(contender.name, {})[capability] = compile_kernel(contender, capability)
    return [
        {"kernel": name, **{f"sm_{capability}": _cell(row.get(capability)) for capability in capabilities}}
        for name, row in found.items()
    ]


def _cell(found: Compiled | None) -> str | None:
    if found is None:
        return None
    parts = (
        found.registers,
        found.spilled_bytes,
        found.shared_bytes,
        found.loads,
        found.shared_stores,
        found.shuffles,
    )
    return ", ".join(map(str, parts))


def main() -> None:
    """Print the table, and keep it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}; registers, spilled bytes, shared bytes, loads, shared, shuffles:\n")
    show(table(options.capability), {}, options.json)


if __name__ == "__main__":
    main()
