"""A first recipe for a model, from its configuration alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from armor_recipes.calibration.text import BUILTIN, CONTINUATIONS, check_there, local_path
from armor_recipes.checkpoint.files import write_whole
from armor_recipes.errors import InputError, RecipeError
from armor_recipes.evaluation.perplexity import why_none
from armor_recipes.model.inputs import model_inputs
from armor_recipes.model.ties import tied_output
from armor_recipes.paths import user_path
from armor_recipes.run.checks import check_writable
from armor_recipes.run.job import prepare, read_recipe
from armor_recipes.run.writing import writing

#: The texts of the package, four kinds.
MIX = ("builtin:pydoc", "builtin:jargon", "builtin:speeches", "builtin:rustbook")
RANDOM = "builtin:random-inputs"
_SIZES = (8, 16, 24, 32, 48, 64, 96, 128)
_SAMPLES, _LENGTH = 128, 512


@dataclass(frozen=True, slots=True)
class Size:
    """A block size: how many of the weights it divides both sides of, bytes after in percent of dense, and how many grow."""

    block: int
    fits: int
    percent: float
    grow: int


@dataclass(frozen=True, slots=True)
class Start:
    """What a recipe for a model has to know of it.

    `sides` are the weights' shapes `(O, I)`, in order and once each; `sizes` block sizes for the most weights that any divides.
    """

    model: str
    family: str
    blocks: int
    weights: int
    sides: tuple[tuple[int, int], ...]
    dtype: str
    tied: bool
    length: int
    generates: bool
    reads_text: bool
    predicts_text: bool
    sizes: tuple[Size, ...]

    @property
    def block_size(self) -> int:
        """What to take by default: the largest up to 64 with which no weight grows."""
        good = (size.block for size in self.sizes if size.block <= 64 and not size.grow)
        return max(good, default=self.sizes[0].block)

    @property
    def calibration(self) -> str:
        """What to calibrate on by default."""
        return "mix" if self.reads_text else RANDOM

    def lines(self) -> list[str]:
        """Tell it, a line a fact."""
        sides = ", ".join(f"{o}x{i}" for o, i in self.sides)
        tied = "tied to the embeddings, so left as it is" if self.tied else "not tied, and left as it is"
        return [
            f"{self.family} in {self.dtype}: {self.weights} linear weights in {self.blocks} blocks ({sides})",
            *([f"output layer: {tied}"] if self.generates else []),
            "block sizes and bytes after: " + ", ".join(f"{size.block} ({size.percent:.0f} %)" for size in self.sizes),
        ]


def look(model: str) -> Start:
    """Read a model's configuration. Raises InputError, or PlanError where no recipe can take it."""
    entry = {"targets": "preset:all-linear", "block_size": 1, "unfit": "skip"}
    job = prepare(read_recipe(_mapping(model, "builtin:random-tokens", 8, entry)))
    inputs, facts = model_inputs(job.shapes), job.source.facts
    shapes = [(row.d_out, row.d_in) for row in job.plan.modules]
    odd = [(one.shape[0], one.shape[-1]) for one in job.plan.skipped]
    return Start(
        model=model,
        family=type(job.shapes).__name__,
        blocks=len(job.plan.layers),
        weights=len(shapes + odd),
        sides=tuple(dict.fromkeys(shapes + odd)),
        dtype=str(job.source.stored_dtype).removeprefix("torch."),
        tied=tied_output(job.shapes) is not None,
        length=min(_LENGTH, facts.positions or _LENGTH),
        generates=job.shapes.can_generate(),
        reads_text=inputs.vocab_size is not None and "input_ids" in inputs.arguments and not inputs.encoder_decoder,
        predicts_text=not why_none(job.shapes),
        sizes=_sizes(shapes, job.source.stored_dtype.itemsize),
    )


def _mapping(model: str, dataset: str, length: int, entry: dict[str, object]) -> dict[str, object]:
    calibration = {"dataset": dataset, "samples": 1, "sequence_length": length}
    stage = {"armor_modifiers": {"ARMORModifier": entry}}
    return {"model": model, "calibration": calibration, "prune_stage": stage, "output": {"path": "out/model"}}


def _sizes(shapes: Sequence[tuple[int, int]], itemsize: int) -> tuple[Size, ...]:
    """Half of the values, a bit for each, and A and B."""
    found = []
    for block in _SIZES:
        fit = [(o, i) for o, i in shapes if o % block == i % block == 0]
        after = [o * i * (itemsize / 2 + 1 / 8) + itemsize * block * (o + i) for o, i in fit]
        before = [itemsize * o * i for o, i in fit]
        if fit and sum(after) < sum(before):
            grow = sum(a >= b for a, b in zip(after, before, strict=True))
            found.append(Size(block, len(fit), 100 * sum(after) / sum(before), grow))
    most = max((size.fits for size in found), default=0)
    if not most:
        raise RecipeError(
            f"no block size of {', '.join(map(str, _SIZES))} divides both sides of a weight and makes it smaller: the model's "
            "weights are too small or too odd for ARMOR; NoWagModifier takes them (docs/modifiers.md)"
        )
    return tuple(size for size in found if size.fits == most)


def recipe_text(start: Start, *, calibration: str, block_size: int) -> str:
    """A commented recipe, which is well formed and can be planned. Raises ArmorError where that is not so."""
    chosen = next((size for size in start.sizes if size.block == block_size), None)
    if chosen is None:
        raise RecipeError(
            f"--block-size {block_size} is none of those for this model: {', '.join(str(size.block) for size in start.sizes)}"
        )
    text = "\n".join((*_lines(start, calibration, chosen), ""))
    prepare(read_recipe(yaml.safe_load(text)))
    return text


def _lines(start: Start, calibration: str, size: Size) -> list[str]:
    name = Path(start.model.removeprefix(BUILTIN)).name
    others = ", ".join(f"{other.block} ({other.percent:.0f} %)" for other in start.sizes if other != size)
    skipped = start.weights - size.fits
    return [
        f"# ARMOR for {name}, as `armor init` wrote it.",
        "#",
        *(f"# {line}." for line in start.lines()[:-1]),
        "# All keys: docs/recipe.md. What it will do and take: armor-apply FILE --plan. To run it: armor-apply FILE.",
        f"model: {_quoted(start.model)}",
        "calibration:",
        *_dataset_lines(calibration),
        f"  samples: {_SAMPLES}  # more cost time and memory, and help a little",
        f"  sequence_length: {start.length}",
        "prune_stage:",
        "  armor_modifiers:",
        "    ARMORModifier:",
        "      targets: preset:all-linear  # all linear weights of the repeated layers",
        f"      block_size: {size.block}  # {size.percent:.0f} % of the dense bytes"
        + (f"; {size.grow} weights take more than dense with it" if size.grow else "")
        + (f"; others: {others}" if others else ""),
        *(
            [f"      unfit: skip  # {skipped} weights whose sides {size.block} does not divide stay dense"]
            if skipped
            else []
        ),
        "    # DistillationModifier: {}  # trains A and B against the dense model afterwards: better, and several times as long",
        f"output: {{path: {_quoted(f'out/{name}-armor')}}}",
        *_evaluation_lines(start),
    ]


def _dataset_lines(calibration: str) -> list[str]:
    if calibration == "mix":
        told = "  dataset:  # texts of the package, four kinds; text like yours is better: a file, JSONL, a hub id"
        return [told, *(f"    - {{dataset: {_quoted(one)}, weight: 1}}" for one in MIX)]
    note = "  # drawn by a seed: inputs like yours are better" if calibration == RANDOM else ""
    return [f"  dataset: {_quoted(calibration)}{note}"]


def _quoted(text: str) -> str:
    """As YAML on one line, whatever characters it has."""
    dumped: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf)
    return dumped.strip()


def _evaluation_lines(start: Start) -> list[str]:
    if not start.predicts_text:
        return ["# evaluation: what is measured before and after, see docs/evaluation.md"]
    spec = f"{{dataset: builtin:pydoc-heldout, sequence_length: {start.length}, windows: 32}}"
    return [f"evaluation: {{perplexity: {spec}}}  # before and after"]


def dataset_for(file: Path, named: str) -> str:
    """A dataset as the recipe `file` has to name it: a local path is relative to the file there, and to the working directory here.

    Raises InputError where nothing is there, or `named` can be no dataset.
    """
    if named == "mix":
        return named
    check_there(named)
    if named == CONTINUATIONS:
        raise InputError(
            f"{named} is questions for an evaluation: calibrate on a text, such as builtin:pydoc, or on mix"
        )
    path = None if named.startswith(BUILTIN) else local_path(named)
    if path is None or path.is_absolute():
        return named
    found = os.path.relpath(path.resolve(), file.parent)
    return found if path.is_file() or found.startswith(".") else f"./{found}"  # a folder is known by that


def check_recipe_file(path: Path, *, overwrite: bool) -> Path:
    """The file to write. Raises RecipeError where it cannot be, or is there already without `overwrite`."""
    file = user_path(path)
    check_writable(file, "recipe")
    if file.is_dir():
        raise RecipeError(f"recipe {path} is a folder: name a file")
    if file.exists() and not file.is_file():
        raise RecipeError(f"recipe {path} exists and is no regular file: it is not replaced; name another file")
    if file.exists() and not overwrite:
        raise RecipeError(f"recipe {path} exists: pass --overwrite to replace it, or name another file")
    return file.resolve()  # the file itself, where a link leads to it


def write_recipe(file: Path, text: str) -> None:
    """Write it whole, or leave what is there. Raises RecipeError where it cannot be written, ResourceError for a full disk."""
    with writing(f"recipe {file}", ": name another file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text.encode())
