"""One cell of the matrix: a recipe through the whole tool, and everything that must be true of what comes out."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import armor_recipes
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config
from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.model.forms import linearise
from armor_recipes.modifiers import AnyModifier, Smoother, modifiers
from armor_recipes.modifiers.kinds.contract import entry_name
from armor_recipes.modifiers.kinds.smoother import SmoothingResult
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.run import Result, apply
from armor_recipes.solver.patterns import parse_pattern
from tests.conformance.cases import Case, Column, mapping, model_of
from tests.families.pipeline import memory
from tests.support.engine import inputs_of

IDS = (torch.arange(32) * 7 % 96).view(2, 16)
#: How far a sum of rounded numbers may be above the one that it claims not to exceed.
ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one cell.

    Attributes:
        outcome: `right`, `refused`, or `left` where the modifier found nothing to do and says so.
        reason: of what is not right, without names of modules and lines.
        stored: how the modules of the recipe are in the checkpoint: `packed`, `dense` or `quantized`.
        taken: modules that the modifier changes.
    """

    outcome: str
    reason: str = ""
    stored: tuple[str, ...] = ()
    taken: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is empty."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in plain.items() if value not in ("", [], 0)}


@dataclass(frozen=True)
class Dense:
    """A column's model before anything: its folder, its weights with all forms linear, and the inputs of its modules."""

    column: Column
    folder: Path

    @classmethod
    def write(cls, column: Column, folder: Path) -> Dense:
        """Make the model's folder."""
        model_of(column).save_pretrained(folder)
        return cls(column, folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """In float32, all forms linear."""
        model: Any = model_of(self.column).float()
        linearise(model)
        return model  # type: ignore[no-any-return]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """As stored."""
        return load_file(self.folder / "model.safetensors")

    def weight(self, name: str) -> Tensor:
        """Of a module, `(O, I)`."""
        return self.model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator, return-value]

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """`(N, I)` of each module on the calibration tokens."""
        spec = CalibrationSpec(**mapping({}, Path(), Path())["calibration"])
        tokens = build_tokens(spec, tokenizer=None, vocab_size=96)
        ids = torch.cat([tokens.sample(n)["input_ids"] for n in range(len(tokens))])
        return inputs_of(self.model, ids, list(self.column.modules))


@dataclass(eq=False)
class Ran:
    """A run of a recipe, and what it gave."""

    case: Case
    dense: Dense
    result: Result
    model: PreTrainedModel
    logits: Tensor

    @property
    def kind(self) -> type[AnyModifier[Any]]:
        """The row's modifier."""
        return modifiers()[self.case.modifier]

    @property
    def rows(self) -> list[Any]:
        """Its rows of the plan."""
        return [row for row in self.result.plan.rows if entry_name(row.modifier) == self.case.modifier]

    @property
    def own_results(self) -> list[Any]:
        """What was measured of it besides modules."""
        found = self.result.results
        return [one for one in found if entry_name(getattr(one, "modifier", "")) == self.case.modifier]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """As stored."""
        return load_file(self.result.output / "model.safetensors")

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """Modules that it touches whose weight is another one than before."""
        names = dict.fromkeys(name for row in self.rows for name in row.touches)
        if self.kind.kind.chooses:  # its rows name what it may find a use for, its results what it found
            done = [one for one in self.own_results if not getattr(one, "left", "")]
            names = dict.fromkeys(name for one in done for name in getattr(one, "readers", names))
        return tuple(name for name in names if not torch.equal(self.weight(name), self.dense.weight(name)))

    @property
    def left(self) -> tuple[str, ...]:
        """Why nothing was done, where results of the kind say that of every place it could have been done at."""
        reasons = [getattr(one, "left", "") for one in self.own_results]
        return tuple(dict.fromkeys(reasons)) if reasons and all(reasons) else ()

    def weight(self, name: str) -> Tensor:
        """Of a module in memory, `(O, I)`."""
        return self.model.get_submodule(name).weight.detach()  # type: ignore[union-attr, return-value]

    def error(self, measure: str) -> float:
        """Mean over modules of the error on the dense model's inputs, relative to that of Ŵ = 0."""
        names = self.dense.column.modules
        return sum(self._error(name, measure) for name in names) / len(names)

    def _error(self, name: str, measure: str) -> float:
        x, wanted = self.dense.inputs[name].double(), self.dense.weight(name).double()
        if measure == "diagonal":
            x = x.square().mean(0).sqrt().diag()
        lost = self.weight(name).double() - wanted
        return float((lost @ x.T).square().sum() / (wanted @ x.T).square().sum())


def run(case: Case, dense: Dense, output: Path) -> Ran:
    """Apply the row's recipe to the column's model. Raises what that raises."""
    seen: list[tuple[PreTrainedModel, Tensor]] = []
    with memory(lambda model: seen.append((model, logits(model)))):
        result = apply(mapping(case.recipe(dense.column), dense.folder, output))
    ((model, found),) = seen
    linearise(model)  # what is stored dense is in the architecture's own form again
    return Ran(case, dense, result, model, found)


def record(case: Case, dense: Dense, output: Path) -> tuple[Record, Ran | None]:
    """Run a cell and check it. Raises AssertionError where what comes out is not right."""
    try:
        ran = run(case, dense, output)
    except (PlanError, RecipeError) as error:
        assert not output.exists(), "it was refused, and there is a folder"
        return Record("refused", plain(str(error))), None
    for check in (_nothing_left_out, _finite, _untouched, _dtypes, _bytes, _pattern, _losses, _same_function, _loads):
        check(ran)
    left = ran.left
    if left:
        return Record("left", "; ".join(left)), ran
    stored = sorted({row.stored_as for row in ran.result.plan.stored.values()}) or ["dense"]
    return Record("right", stored=tuple(stored), taken=len(ran.changed)), ran


def logits(model: nn.Module) -> Tensor:
    """Of two fixed rows of tokens, in float32."""
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found.float()


def digest(folder: Path) -> dict[str, str]:
    """The bytes of a checkpoint's weights and configuration, file by file."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.name == "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _nothing_left_out(ran: Ran) -> None:
    """Taken and skipped modules are those that the targets match, by the column's own list; every one has a result."""
    entry = ran.case.recipe(ran.dense.column)[ran.case.modifier]
    pattern = entry["targets"][0].removeprefix("re:")
    matched = {name for name in ran.dense.column.modules if re.match(pattern, name)}
    assert matched
    plan = ran.result.plan
    skipped = {one.name for one in plan.skipped}
    if not ran.kind.kind.chooses:  # else it takes of what `targets` matches what it finds a use for
        taken = {name for row in ran.rows for name in (row.takes or row.touches)}
        assert matched <= taken | skipped, f"neither taken nor skipped: {sorted(matched - taken - skipped)}"
        assert not taken & skipped
        same = [name for name in taken if name not in ran.changed]
        assert not same, f"as they were: {same}"
    assert ran.changed or ran.left, "nothing was done, and nobody says so"
    assert plan.stored.keys() == ran.result.modules.keys(), "planned and done differ"
    assert {entry_name(row.modifier) for row in plan.rows} == ran.case.recipe(ran.dense.column).keys()


def _finite(ran: Ran) -> None:
    results = ran.result.modules.values()
    assert all(map(math.isfinite, (n for r in results for n in (*r.losses, r.stored_loss, r.error))))
    assert bool(ran.logits.isfinite().all())


def _untouched(ran: Ran) -> None:
    """Biases are as they were (in another order where channels were reordered, divided as the outputs are by a smoother), and so is
    every other tensor but norms.
    """
    touched = {name for row in ran.result.plan.rows for name in row.touches}
    smoothed = {one.source: one for one in ran.own_results if isinstance(one, SmoothingResult) and not one.left}
    before, after = ran.dense.model.state_dict(), ran.model.state_dict()
    reordered = bool(ran.result.rearrangements)
    for name, old in before.items():
        module, _, part = name.rpartition(".")
        if "norm" in name or ".ln_" in name or (part == "weight" and module in touched):
            continue
        new, wanted = after[name].float(), old
        if reordered and part == "bias":
            new, wanted = new.sort().values, old.sort().values
        if part == "bias" and module in smoothed:
            scales, found = (old / new).aminmax(), smoothed[module]
            assert [*scales] == pytest.approx([found.least, found.largest], rel=torch.finfo(ran.dense.column.dtype).eps)
            continue
        assert torch.equal(new, wanted), f"{name} has changed"


def _dtypes(ran: Ran) -> None:
    """Floats are stored in the model's dtype, those of quantised layers apart, and tensors that stay have the names they had."""
    changed = ran.result.plan.stored
    for name, tensor in ran.tensors.items():
        row = changed.get(name.rpartition(".")[0])
        quantised = row is not None and row.stored_as == "quantized"
        if tensor.is_floating_point() and tensor.element_size() > 1 and not quantised:
            assert tensor.dtype == ran.dense.column.dtype, f"{name} is {tensor.dtype}"
    for name in ran.dense.tensors:
        assert name in ran.tensors or any(_of(name, module) for module in changed), f"{name} is missing"


def _bytes(ran: Ran) -> None:
    """The folder has the bytes that were planned, and nothing of the source beside its modules' tensors."""
    manifest = json.loads((ran.result.output / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["carried_over"] == []
    totals = ran.result.plan.totals
    assert sum(tensor.nbytes for tensor in ran.tensors.values()) == totals.bytes_after + totals.untouched_bytes


def _of(tensor: str, module: str) -> bool:
    """Whether a tensor of the source is the module's: its own, or that of fused experts."""
    return tensor.rpartition(".")[0] == module or (".experts." in tensor and ".experts." in module)


def _pattern(ran: Ran) -> None:
    """Where a pattern was brought in, what is stored has it: zeros of a dense weight, the mask of a packed one."""
    for name, row in ran.result.plan.stored.items():
        patterns = [one.pattern for one in ran.result.plan.modules if one.name == name and one.pattern]
        if not patterns:
            continue
        pattern = parse_pattern(patterns[-1])
        packed = ran.result.modules[name].packed
        kept = _mask(packed) if packed is not None else ran.weight(name) != 0
        counts = kept.unflatten(1, (-1, pattern.group)).sum(-1)
        assert int(counts.max()) <= pattern.keep, f"{name} keeps {int(counts.max())} of {pattern.group}"
        assert packed is None or bool((counts == pattern.keep).all())
        assert (row.stored_as == "packed") == (packed is not None)


def _mask(packed: Any) -> Tensor:
    """The bits of a packed core's bitmask, `(O, I)`."""
    bits = torch.arange(8, dtype=torch.uint8)
    found: Tensor = (packed.bitmask[..., None] >> bits) & 1
    return found.flatten(1).bool()


def _losses(ran: Ran) -> None:
    """No method ends above its own start, factors are not made worse, channels not reordered for less."""
    for result in ran.result.modules.values():
        assert result.losses[-1] <= result.losses[0]
        assert 0 <= result.stored_loss < 1
        for change in result.changes:
            assert change.losses[-1] <= change.losses[0]
    for refined in ran.result.refinements:
        assert min(refined.losses) <= refined.losses[0]
    for moved in ran.result.rearrangements:
        assert moved.kept_after >= moved.kept_before


def _same_function(ran: Ran) -> None:
    """What only moves scales between weights leaves the model's outputs, within the rounding of its dtype."""
    if not issubclass(ran.kind, Smoother) or ran.case.after:
        return
    wanted = logits(ran.dense.model)
    bound = 16 * torch.finfo(ran.dense.column.dtype).eps
    assert float((ran.logits - wanted).norm() / wanted.norm()) <= bound


def _loads(ran: Ran) -> None:
    """The folder gives, in our loader and in transformers', the logits of the model in memory, bit for bit."""
    dtype = next(ran.model.parameters()).dtype
    ours = armor_recipes.load(ran.result.output, dtype=dtype)
    assert torch.equal(logits(ours), ran.logits), "loaded logits differ"
    stock = AutoModelForCausalLM.from_pretrained(ran.result.output, dtype=dtype)
    assert torch.equal(logits(stock), ran.logits), "logits of from_pretrained differ"


def loads_when_saved_again(ran: Ran, folder: Path) -> None:
    """What our loader gives is saved as the same tensors, and the export to dense holds the weights that it stands for."""
    armor_recipes.load(ran.result.output).save_pretrained(folder / "again")
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == ran.tensors.keys()
    assert all(torch.equal(again[name].view(torch.uint8), ran.tensors[name].view(torch.uint8)) for name in again)
    if "quantization_config" not in read_config(ran.result.output):
        return
    export_folder(ran.result.output, folder / "dense", to="dense")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    linearise(model)
    for name in ran.dense.column.modules:
        found, wanted = model.get_submodule(name).weight, ran.weight(name).to(ran.dense.column.dtype).float()
        assert torch.equal(found, wanted), f"{name} differs in the export"


def plain(reason: str) -> str:
    """A refusal's first line, without places in the recipe and names of modules."""
    text = reason.split("\n")[0].removeprefix("the recipe mapping: ").replace(" (the recipe mapping)", "")
    text = re.sub(r" \(and \d+ more like it: [^)]*\)", "", text)
    return re.sub(r"\b(model|transformer)(\.\w+)+", "…", text).replace("conformance_stage", "its stage")
