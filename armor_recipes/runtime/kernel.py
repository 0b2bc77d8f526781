"""The compiled kernel: `y = A (S (B x)) + bias` for a few tokens, straight from the packed tensors, float or quantised.

`native/linear.c` is built as an optional extension and entered through ctypes, which lets go of the interpreter's lock. It
holds up to three paths: plain C (`scalar`), `avx2`, and `avx512` (VBMI2 and BF16). The best that the processor has is taken,
after a check: a path that disagrees with plain C on fixed problems of small integers, where every sum is exact, is
never used, and `capabilities` says so.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import INTEGER_DTYPES, PACKABLE_DTYPES, PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime import integer_problems

PATH_VARIABLE = "ARMOR_CPU_PATH"
PATHS = ("scalar", "avx2", "avx512")
"""In the order of the kernel's own numbers; the last one that a machine has is its best."""
FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The kernel's numbers for what factors, scales, bias and activations may be."""
_VALUE_FORMATS = {**FORMATS, torch.int8: 3, torch.int32: 4}
MOST_TOKENS = 16
"""Of one pass over the packed tensors; more take several."""
_BLOCK, _ROWS_AT_ONCE = 64, 64  # of native/linear.h and linear.c
#: Entries of S below which starting another thread costs more than it saves.
_WORTH_A_THREAD = 1 << 18
#: So that a thread that starts late, or is slowed by other work, takes fewer.
_PARTS_A_THREAD = 4
_MANY, _MANY_OF_INT4 = 13, 7
"""Tokens from which on `armor_many` is faster than `armor_run`."""
_MOST_AT_ONCE, _MANY_ROWS = 256, 256
"""Tokens that it takes at once, and rows of its parts: their sums stay in the second cache."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the runtime can do on this machine."""

    compiled: bool
    """Whether the extension was built. Without it the backend `cpu` is refused and `auto` never takes it."""
    paths: tuple[str, ...]
    """Paths of the kernel that the build holds, the processor has and the check passed, best last."""
    rejected: tuple[str, ...]
    """Paths that the processor has but that gave wrong numbers in the check; they are not used."""
    path: str | None
    """The path in use: the best one, or the one that ARMOR_CPU_PATH names."""
    threads: int
    """Threads that a call may use: torch's number."""

    def lines(self) -> list[str]:
        """Tell it, a line a fact."""
        if not self.compiled:
            return ["cpu kernel: not built (no C compiler when the package was installed); ARMOR layers run folded"]
        told = [
            f"cpu kernel: {self.path} (of {', '.join(self.paths)}), {self.threads} thread{'' if self.threads == 1 else 's'}"
        ]
        if self.rejected:
            told.append(f"cpu kernel: {', '.join(self.rejected)} gave wrong numbers in the self-check and is not used")
        return told


class _Job(ctypes.Structure):
    """`job_t` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "values", "scale", "bitmask", "a", "b", "bias", "y", "inner")),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "rows", "columns", "groups", "b_o", "b_i", "format", "floats", "activation", "path")
        ),
    )

    @classmethod
    def of(cls, packed: PackedLinear) -> _Job:
        """What a job says of the layer, whose tensors are contiguous and have to outlive it."""
        (rows, columns), (b_o, b_i), scale = packed.shape, packed.block_size, packed.scale
        job = cls(rows=rows, columns=columns, b_o=b_o, b_i=b_i)
        job.format, job.floats = _VALUE_FORMATS[packed.values.dtype], FORMATS[packed.dtype]
        job.values, job.bitmask = packed.values.data_ptr(), packed.bitmask.data_ptr()
        job.a, job.b = packed.a.data_ptr(), packed.b.data_ptr()
        if scale is not None:
            job.scale, job.groups = scale.data_ptr(), scale.shape[1]
        return job


class _Task(ctypes.Structure):
    """`task_t` of native/linear.h. Whoever makes one keeps what it points to."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("job", "work")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "work_size", "next", "done", "ready")),
    )


class _Many(ctypes.Structure):
    """`many_t` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("job", "inner", "units", "work")),
        *((name, ctypes.c_int64) for name in ("work_size", "inputs", "blocks", "threads", "next", "done")),
    )


class _Unpack(ctypes.Structure):
    """`unpack_t` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("job", "out")),
        *((name, ctypes.c_int64) for name in ("parts", "out_format", "next")),
    )


class _Dense(ctypes.Structure):
    """`dense_t` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "scale", "bias", "y", "words")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "groups", "flip", "parts", "next")),
    )


class _Attention(ctypes.Structure):
    """`attention_t` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y", "work")),
        *((name, ctypes.c_int64) for name in ("parts", "heads", "kv_heads", "length", "size")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("k", "v") for axis in ("sequence", "head", "row")),
        ("scale", ctypes.c_float),
        ("next", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class _Library:
    paths: int
    run: Callable[..., None]
    many: Callable[..., None]
    unpack: Callable[..., None]
    dense: Callable[..., None]
    words: Callable[..., None]
    attend: Callable[..., None]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernel_available() -> bool:
    """Whether the compiled kernel was built."""
    return _library() is not None


def capabilities() -> Capabilities:
    """Tell what the kernel can do here; runs the self-check once in a process.

    Raises:
        RecipeError: if ARMOR_CPU_PATH names a path that cannot be used.
    """
    if not kernel_available():
        return Capabilities(compiled=False, paths=(), rejected=(), path=None, threads=torch.get_num_threads())
    good, bad = _checked_paths()
    return Capabilities(compiled=True, paths=good, rejected=bad, path=_chosen_path(), threads=torch.get_num_threads())


def run_kernel(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, *, path: str | None = None) -> Tensor:
    """Compute `A (S (B x)) + bias`, summed in float32, rounded once to x's dtype.

    Args:
        x: `(..., I)` in bfloat16, float16 or float32, on the CPU.
        packed: with floats in one of these dtypes, which need not be x's; its core of any type.
        bias: `(O,)` in the dtype of the packed floats.
        path: `scalar`, `avx2` or `avx512`; None takes the best. With x and floats in bfloat16, avx512 rounds `B x`: to bfloat16,
            for int8 cores to 16-bit integers, for int4 cores to 8 bits with a scale for each 64 columns.

    Raises:
        RecipeError: if the kernel was not built or `path` cannot run here.
        TypeError: if dtypes are not those above, or the scales do not fit the core.
    """
    return KernelCall(packed, bias)(x, path)


class KernelCall:
    """A layer as the kernel takes it, checked and laid out once for many calls. It keeps the tensors that it was made from.

    Args:
        packed: see `run_kernel`.
        bias: see `run_kernel`.

    Raises:
        TypeError: as `run_kernel`, but for what has to do with x.
    """

    __slots__ = ("_job", "_kept", "_many", "_sizes", "_work")

    def __init__(self, packed: PackedLinear, bias: Tensor | None = None) -> None:
        _check_layer(packed, bias)
        packed = _contiguous(packed)
        (rows, columns), (b_o, b_i) = packed.shape, packed.block_size
        self._kept = packed, bias
        self._job = _Job.of(packed)
        self._job.bias = None if bias is None else bias.data_ptr()
        self._sizes = rows, columns, 2 * -(-columns // _BLOCK) * _BLOCK, 2 * max(b_o, b_i, _ROWS_AT_ONCE)
        self._work = (columns // b_i, columns * b_i), (rows // b_o, rows * (columns // 2 + b_o))
        self._many = _many_sizes(packed) if packed.dtype == torch.bfloat16 else None

    def __call__(self, x: Tensor, path: str | None = None) -> Tensor:
        """Compute what `run_kernel` does. Threads may call it at once."""
        rows, columns, inner, work = self._sizes
        if x.dtype not in FORMATS or x.shape[-1] != columns or not x.is_cpu:
            raise TypeError(
                f"the cpu kernel takes x (..., {columns}) on the CPU in {PACKABLE_DTYPES}, got {tuple(x.shape)} {x.dtype} "
                f"on {x.device}"
            )
        library, number, most = _loaded(), PATHS.index(path or _chosen_path()), torch.get_num_threads()
        x, y = (
            x.contiguous(),
            x.new_empty(*x.shape[:-1], rows),
        )  # no view: what torch's operators return must not be one
        inputs, outputs = (_parts(blocks, _threads(blocks, entries, most)) for blocks, entries in self._work)
        threads = _threads(*self._work[1], most)
        size, left, begin = x.element_size(), x.numel() // columns, 0
        job = _Job.from_buffer_copy(self._job)
        job.activation, job.path = FORMATS[x.dtype], number
        x_start, y_start = x.data_ptr(), y.data_ptr()
        fits = self._many is not None and x.dtype == torch.bfloat16 and PATHS[number] == "avx512"
        many = _MANY_OF_INT4 if self._kept[0].core == "int4" else _MANY
        while self._many is not None and fits and left - begin >= many:
            job.tokens = tokens = min(left - begin, _MOST_AT_ONCE)
            job.x, job.y = x_start + begin * columns * size, y_start + begin * rows * size
            _run_many(job, self._many, most)
            begin += tokens
        held = _scratch(min(left - begin, MOST_TOKENS) * (inner + work * (inputs + outputs)))
        job.inner = held.data_ptr()
        while begin < left:
            job.tokens = tokens = min(left - begin, MOST_TOKENS)
            job.x, job.y = x_start + begin * columns * size, y_start + begin * rows * size
            place = job.inner + 4 * tokens * inner
            _run(library.run, _Task(ctypes.addressof(job), place, inputs, outputs, tokens * work), threads)
            begin += tokens
        return y


@dataclass(frozen=True, slots=True)
class _ManySizes:
    """What a layer needs for many tokens, in numbers of `many_t`."""

    unit: int
    """Columns that are whole blocks of B and chunks."""
    blocks: int
    """Of A in a part."""
    rows: int
    """Of a part."""


def _many_sizes(packed: PackedLinear) -> _ManySizes | None:
    """See `many_t`; None where the layer is none of those that it takes."""
    (rows, columns), (b_o, b_i) = packed.shape, packed.block_size
    groups = 1 if packed.scale is None else packed.scale.shape[1]
    unit, blocks = max(b_i, _BLOCK), min(rows // b_o, max(1, _MANY_ROWS // b_o))
    if (
        columns % unit
        or unit % min(b_i, _BLOCK)
        or (b_o > 1 and b_o % 2)
        or (groups > 1 and columns % (_BLOCK * groups))
    ):
        return None
    return _ManySizes(unit, blocks, blocks * b_o)


def _run_many(job: _Job, sizes: _ManySizes, most: int) -> None:
    tiles, chunks, rows = -(-job.tokens // _BLOCK), job.columns // _BLOCK, sizes.rows
    threads = _threads(-(-job.rows // rows), job.rows * job.columns, most)
    inputs = min(job.columns // sizes.unit, -(-threads * _PARTS_A_THREAD // tiles))
    inner, units = tiles * chunks * _BLOCK * _BLOCK // 2, tiles * chunks * _BLOCK
    work = max(160 * sizes.unit, rows * (64 * tiles + 64 + 24) + 64 * -(-rows // 2) + 96 * _BLOCK)
    work = -(-work // 16) * 16  # whole lines of the cache
    place = _scratch(inner + units + threads * work).data_ptr()
    places = (place, place + 4 * inner, place + 4 * (inner + units))
    _run(_loaded().many, _Many(ctypes.addressof(job), *places, work, inputs, sizes.blocks), threads)


def unpack_into(packed: PackedLinear, out: Tensor) -> None:
    """Write the core into `out` `(O, I)`, contiguous, in the dtype of the packed floats or float32, zero where nothing is kept.

    Integers come times their scales, rounded once. The bitmask is taken as it is (`check_packed` checks it once); a damaged
    one stays within `out`. Raises `TypeError` for another dtype or shape.
    """
    _check_core(packed)
    if not (
        out.is_cpu and packed.values.is_cpu and packed.bitmask.is_cpu and (packed.scale is None or packed.scale.is_cpu)
    ):
        raise TypeError(
            f"the cpu kernel unpacks CPU tensors, got values on {packed.values.device} and out on {out.device}"
        )
    if out.shape != packed.shape or not out.is_contiguous() or out.dtype not in (packed.dtype, torch.float32):
        raise TypeError(f"cannot unpack {packed.shape} {packed.dtype} into {tuple(out.shape)} {out.dtype}")
    rows, columns = packed.shape
    packed = _contiguous(packed)
    job, threads = _Job.of(packed), _threads(rows, rows * columns, torch.get_num_threads())
    task = _Unpack(ctypes.addressof(job), out.data_ptr(), _parts(rows, threads), FORMATS[out.dtype])
    _run(_loaded().unpack, task, threads)


def has_dense() -> bool:
    """Whether `run_dense_kernel` can run: on the path `avx512` alone."""
    return kernel_available() and _chosen_path() == "avx512"


def run_dense_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Compute `W x + bias` `(..., O)`, summed in float32 and rounded once; twice as fast as torch for one token.

    Integers are multiplied exactly with x in 16-bit fixed point, a power of two for each token.

    Args:
        x: `(..., I)`, bfloat16, on the CPU.
        weight: `(O, I)`, contiguous, bfloat16, or integers for which there is a scale: int8, or as int32 `(O, I/4)`, in whose
            bytes, lowest first, the integers are plus 128 (compressed-tensors' `pack-quantized`).
        bias: `(O,)`, bfloat16, or None.
        scale: `(O, groups)`, bfloat16: what the integers of a group are times; several groups are of a multiple of 32 columns.

    Raises:
        TypeError: for anything else.
    """
    bytes_each = {torch.bfloat16: 2, torch.int8: 1, torch.int32: 1}.get(weight.dtype, 2)
    rows, columns = len(weight), weight.nbytes // bytes_each // max(1, len(weight))
    if not _dense_runs(x, weight, bias, scale, columns):
        tensors = [None if t is None else (tuple(t.shape), t.dtype, t.device.type) for t in (x, weight, bias, scale)]
        raise TypeError(
            f"the dense kernel takes x (..., {columns}), a contiguous weight, a bias ({rows},) or None, all bfloat16 on the "
            f"CPU; or an integer weight with a scale ({rows}, groups); got {tensors}"
        )
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
    tokens, threads = x.numel() // columns, _threads(rows, rows * columns, torch.get_num_threads())
    held = [x, weight, *(None if t is None else t.contiguous() for t in (scale, bias)), y]
    places = [None if tensor is None else tensor.data_ptr() for tensor in held]
    words = None if scale is None else _scratch(tokens * (-(-columns // 32) * 16 + 17))
    groups, flip = 0 if scale is None else scale.shape[1], 128 if weight.dtype == torch.int32 else 0
    sizes = (tokens, rows, columns, groups, flip, _parts(rows, threads))
    task = _Dense(*places, None if words is None else words.data_ptr(), *sizes)
    if words is not None:
        _loaded().words(ctypes.byref(task))
    _run(_loaded().dense, task, threads)
    return y


HEAD_SIZES = (64, 96, 128, 256)
"""Numbers of a head that `run_attention_kernel` takes."""


def attention_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `run_attention_kernel` takes these, on a path that is there."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return False
    sequences, heads, queries, size = q.shape
    return (
        queries == 1
        and size in HEAD_SIZES
        and k.shape == v.shape
        and len(k) == sequences
        and k.shape[3] == size
        and k.numel() > 0
        and heads % k.shape[1] == 0
        and all(x.dtype == torch.bfloat16 and x.is_cpu and x.stride(3) == 1 for x in (q, k, v))
        and has_dense()
    )


def run_attention_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax(scale · q Kᵀ) V` of one query a head, `(sequences, 1, heads, size)`, in float32 and rounded once.

    Args:
        q: `(sequences, heads, 1, size)`, bfloat16, on the CPU; size one of `HEAD_SIZES`.
        k: `(sequences, heads / n, length, size)`, bfloat16; n heads of q that follow each other share one.
        v: as `k`.
        scale: of the products.

    Raises:
        TypeError: for anything else.
    """
    if not attention_runs(q, k, v):
        told = [(tuple(x.shape), x.dtype, x.device.type) for x in (q, k, v)]
        raise TypeError(
            "the attention kernel takes q (sequences, heads, 1, size), and k and v (sequences, heads / n, length, size), bfloat16 "
            f"on the CPU, size one of {HEAD_SIZES}; got {told}"
        )
    (sequences, heads, _, size), length = q.shape, k.shape[2]
    q, y = q.contiguous(), q.new_empty(sequences, 1, heads, size)
    parts = sequences * heads
    work = _scratch(parts * length)
    sizes = parts, heads, k.shape[1], length, size, *k.stride()[:3], *v.stride()[:3]
    places = [tensor.data_ptr() for tensor in (q, k, v, y, work)]
    _run(_loaded().attend, _Attention(*places, *sizes, scale), _threads(parts, 2 * k.numel(), torch.get_num_threads()))
    return y


def _dense_runs(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, columns: int) -> bool:
    rows, floats = len(weight), [x] if bias is None else [x, bias]
    if scale is None:
        floats.append(weight)
        scaled = True
    else:
        floats.append(scale)
        groups = scale.shape[1] if scale.dim() == 2 and len(scale) == rows else 0
        scaled = weight.dtype != torch.bfloat16 and (groups == 1 or (groups > 1 and columns % (32 * groups) == 0))
    return (
        scaled
        and weight.dim() == 2
        and weight.dtype in (torch.bfloat16, torch.int8, torch.int32)
        and weight.is_contiguous()
        and weight.is_cpu
        and all(tensor.dtype == torch.bfloat16 and tensor.is_cpu for tensor in floats)
        and x.shape[-1] == columns > 0
        and (bias is None or bias.shape == (rows,))
    )


def _contiguous(packed: PackedLinear) -> PackedLinear:
    values, bitmask, a, b = (t.contiguous() for t in (packed.values, packed.bitmask, packed.a, packed.b))
    return PackedLinear(values, bitmask, a, b, None if packed.scale is None else packed.scale.contiguous())


def _check_layer(packed: PackedLinear, bias: Tensor | None) -> None:
    tensors = (packed.values, packed.bitmask, packed.a, packed.b, *(t for t in (packed.scale, bias) if t is not None))
    if not all(tensor.is_cpu for tensor in tensors):
        raise TypeError(f"the cpu kernel takes CPU tensors, got values on {packed.values.device}")
    _check_core(packed)
    if packed.b.dtype != packed.dtype or (
        bias is not None and (bias.dtype != packed.dtype or not bias.is_contiguous())
    ):
        raise TypeError(
            "the cpu kernel takes factors and a contiguous bias in one dtype, got "
            f"{packed.a.dtype}, {packed.b.dtype} and {None if bias is None else bias.dtype}"
        )
    (rows, columns), (b_o, b_i) = packed.shape, packed.block_size
    factors = (rows // b_o, b_o, b_o), (columns // b_i, b_i, b_i)
    found = packed.a.shape, packed.b.shape, (rows,) if bias is None else bias.shape
    if found != (*factors, (rows,)) or rows % b_o or columns % b_i:
        raise TypeError(f"the cpu kernel takes factors {factors} and a bias ({rows},), got {[tuple(s) for s in found]}")


def _check_core(packed: PackedLinear) -> None:
    """Refuse dtypes that the kernel has not, and scales that it would read past; contents are checked once, by `check_packed`."""
    (rows, columns), stored, scale = packed.shape, packed.values.dtype, packed.scale
    if packed.bitmask.shape != (rows, columns // 8) or packed.bitmask.dtype != torch.uint8 or columns % 8:
        raise TypeError(
            f"the cpu kernel takes a bitmask ({rows}, {columns}/8) torch.uint8, got {tuple(packed.bitmask.shape)} "
            f"{packed.bitmask.dtype}"
        )
    scales = packed.values if scale is None else scale
    known = stored in (FORMATS if scale is None else INTEGER_DTYPES)
    if not known or packed.dtype not in FORMATS or scales.dtype != packed.dtype:
        raise TypeError(
            "the cpu kernel takes values in the factors' dtype, or int8 or int4 (in int32) with scales in that dtype, got "
            f"{stored}, scales {None if scale is None else scale.dtype} and factors {packed.dtype}"
        )
    shape = None if scale is None else tuple(scale.shape)
    if shape not in (None, (rows, 1)) and (
        len(shape) != 2 or shape[0] != rows or not shape[1] or columns % (16 * shape[1])
    ):
        raise TypeError(
            f"the cpu kernel takes scales ({rows}, groups) of whole rows or of a multiple of 8 values, got {shape} for "
            f"{columns // 2} values a row"
        )


def _scratch(count: int) -> Tensor:
    """A buffer of at least so many float32, of the calling thread, which its next call may use again."""
    held: Tensor | None = getattr(_buffers, "floats", None)
    if held is None or held.numel() < count:
        _buffers.floats = held = torch.empty(count, dtype=torch.float32, device="cpu")
    return held


_buffers = threading.local()


def _threads(blocks: int, entries: int, most: int) -> int:
    """Threads, `most` at most, that work is worth which touches so many `entries` of S and the factors."""
    return max(1, min(most, blocks, entries // _WORTH_A_THREAD))


def _parts(blocks: int, threads: int) -> int:
    return 1 if threads == 1 else min(blocks, threads * _PARTS_A_THREAD)


def _run(function: Callable[..., None], task: ctypes.Structure, threads: int) -> None:
    """Run a task's parts on `threads` threads, of the team that torch's own loops use where that can be had."""
    reference = ctypes.byref(task)
    if threads == 1:
        function(reference)
    elif os.getpid() == _HOME and (team := _team()) is not None:
        team(function, reference, threads, 0)
    else:
        others = [_pool(threads - 1).submit(function, reference) for _ in range(threads - 1)]
        function(reference)
        for other in others:
            other.result()


@functools.cache
def _team() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP that torch runs on, or None where torch has none or another.

    A team of our own would find torch's on the processors, still spinning for its next loop. A copy that was preloaded comes
    first, as it does for torch.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for name, mode in ((None, ctypes.DEFAULT_MODE), ("libgomp.so.1", os.RTLD_NOLOAD)):
        try:
            parallel = ctypes.CDLL(name, mode=mode).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.restype = None
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return parallel
    return None


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="armor-kernel")


if hasattr(os, "register_at_fork"):
    # A forked child has the pool's queue and none of its threads: it would wait for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)
_HOME = os.getpid()
"""The process that imported this. In a forked child OpenMP waits for threads that are not there; a pool of its own takes over."""


@functools.cache
def _library() -> _Library | None:
    """The extension's entry points, or None where it was not built. Raises RecipeError for one of another version."""
    spec = importlib.util.find_spec("armor_recipes.runtime._native")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    names = [f"armor_{name}" for name in ("run", "many", "unpack", "dense", "words", "attend")]
    if not all(hasattr(library, name) for name in ("armor_paths", *names)):
        raise RecipeError(
            f"the compiled kernel ({spec.origin}) is of another version than this package: install armor-recipes again"
        )
    library.armor_paths.restype = ctypes.c_int64
    library.armor_paths.argtypes = []
    functions = [getattr(library, name) for name in names]
    for function in functions:
        function.restype = None
        function.argtypes = [ctypes.c_void_p]
    return _Library(int(library.armor_paths()), *functions)


def _loaded() -> _Library:
    library = _library()
    if library is None:
        raise RecipeError(
            "the cpu kernel was not built, for lack of a C compiler when the package was installed: install one and "
            "install armor-recipes again, or choose the backend `folded`"
        )
    return library


def _chosen_path() -> str:
    named = os.environ.get(PATH_VARIABLE)
    good, bad = _checked_paths()
    if not named:
        return good[-1]
    if named not in good:
        why = "gave wrong numbers in the self-check" if named in bad else "is not there"
        raise RecipeError(
            f"environment variable {PATH_VARIABLE} {named!r}: this path {why}; choose one of {', '.join(good)}"
        )
    return named


@functools.cache
def _checked_paths() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths that agree with plain C to the bit, and those that do not."""
    library = _loaded()
    found = [name for number, name in enumerate(PATHS) if library.paths >> number & 1]
    good = tuple(name for name in found if name == "scalar" or path_agrees(name))
    return good, tuple(name for name in found if name not in good)


def path_agrees(path: str) -> bool:
    """Whether a path gives the numbers of plain C on small integers, for every dtype, core type and number of tokens.

    All sums are exact in any order of additions: products and sums of integers below 2²⁴ are, and `B x` stays below 2⁸, so it
    is exact in bfloat16, too; and in 8 bits for int4, as the largest of any 16 columns is 127. Rows and columns end in parts of a
    strip, of a block of 64, of 8 and of 4. For many tokens A moves rows, since sums are rounded before it.
    """
    for core, groups in integer_problems.CORES if path == "avx512" else ():
        packed = integer_problems.problem_of_many(core, groups)
        x = integer_problems.integers((70, packed.shape[1]), 2).bfloat16()
        if not torch.equal(run_kernel(x, packed, None, path=path), run_kernel(x, packed, None, path="scalar")):
            return False
    for dtype, (core, groups) in itertools.product(FORMATS, integer_problems.CORES):
        packed, bias = integer_problems.problem(dtype, core, groups)
        for x_dtype in {dtype, torch.float32} if core == "float" else {dtype}:
            for tokens in (1, 2, 13):
                x = integer_problems.input_of(core, tokens, packed.shape[1]).to(x_dtype)
                expected = run_kernel(x, packed, bias, path="scalar")
                if not torch.equal(run_kernel(x, packed, bias, path=path), expected):
                    return False
    return True
