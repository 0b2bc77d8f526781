"""One family through the whole tool: apply, load here and in a stock process, generate, save again, export."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import armor_recipes
from armor_recipes.errors import ArmorError
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.loading import lay_out
from armor_recipes.integrations.models import meta_model, open_model
from armor_recipes.integrations.names import fused_of, loaded_as
from armor_recipes.model.inputs import model_inputs
from armor_recipes.recipe.schema import ModelSpec, ModifierConfig
from armor_recipes.run import apply, job
from tests.families.stock import Stock
from tests.families.structures import Structure
from tests.support.families import main_class, tiny_config, tiny_model
from tests.support.family_inputs import Inputs, inputs_for, tensors_of

BLOCK_SIZE = 8
STORED = torch.bfloat16
#: How far outputs may be from those in memory where factors are multiplied one after the other instead of folded.
NEAR = 1e-4
#: The same where experts run one by one on their tokens here, and in one product in transformers.
ROUNDING = 1e-5


@dataclass(slots=True)
class Record:
    """What became of one model type.

    Attributes:
        outcome: `right`; `skip` (right with `unfit: skip`); `refused`; `failed`; `WRONG` (no error, and something lost or other);
            `unavailable` (transformers itself cannot make, run or read it).
        step: where it ended, where it did not end right.
        reason: the error's or difference's one line.
        parameters, taken: numbers in matrices of repeated blocks, and how many of them were packed.
        steps: what each step found.
    """

    model_type: str
    model_class: str = ""
    outcome: str = "failed"
    step: str = ""
    reason: str = ""
    parameters: int = 0
    taken: int = 0
    inputs: tuple[str, ...] = ()
    untaken: tuple[str, ...] = ()
    steps: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part of the matrices' numbers that was taken."""
        return self.taken / self.parameters if self.parameters else 0.0


class EndedError(Exception):
    """A structure went no further: `outcome` is why."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


def run_family(model_type: str, folder: Path, stock: Stock, kind: type[PreTrainedModel] | None = None) -> Record:
    """Take one model type through the tool, in an empty folder; never raises but for what no family is to blame for."""
    record = Record(model_type)
    run = _Family(record, folder, stock, kind)
    for step in (
        run.make,
        run.read_back,
        run.apply,
        run.lost,
        run.load,
        run.stock_load,
        run.generate,
        run.again,
        run.export,
    ):
        record.step = step.__name__
        try:
            record.steps[step.__name__] = step() or "ok"
        except EndedError as ended:
            record.outcome, record.reason = ended.outcome, ended.reason
            return record
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            record.outcome = "unavailable" if step in (run.make, run.read_back) else "failed"
            record.reason = f"{_line(error)} ({Path(where.filename).name}:{where.lineno})"
            return record
    record.step = ""
    record.outcome = "skip" if run.skipping else "right"
    return record


class _Family:
    """The steps; each raises EndedError or what it meets, or returns a word for the record."""

    def __init__(self, record: Record, folder: Path, stock: Stock, kind: type[PreTrainedModel] | None) -> None:
        self.record, self.folder, self.stock, self.kind, self.asked = record, folder, stock, kind, kind
        self.source, self.out, self.dense = folder / "source", folder / "out", folder / "dense"
        self.skipping, self.can_generate, self.reads_windows = False, False, False
        self.in_memory: list[Tensor] = []
        self.rounded: list[Tensor] = []
        self.generated: Tensor | None = None

    def make(self) -> str | None:
        """The model, its inputs and its folder."""
        try:
            kind = self.kind or main_class(self.record.model_type)
        except ImportError as error:
            raise EndedError("unavailable", _line(error)) from error
        if kind is None:
            raise EndedError("unavailable", "no class of its own: a part of other models")
        self.kind, self.record.model_class = kind, kind.__name__
        head = {"pad_token_id": 0, "tie_word_embeddings": True} if "Classification" in str(self.asked) else {}
        model = tiny_model(kind, tiny_config(self.record.model_type, **head))
        self.blocks = matrices(model)
        self.record.parameters = sum(self.blocks.values())
        if not self.record.parameters:
            raise EndedError("unavailable", "no linear weights in repeated blocks")
        self.experts = any(map(stacked, model.modules()))
        self.ignore = outside(model)
        self.inputs: Inputs = inputs_for(model)
        self.ignore += uncalled(model, self.inputs, self.blocks)
        known = model_inputs(model)
        self.reads_windows = known.vocab_size is not None and not known.encoder_decoder
        self.record.inputs = tuple(self.inputs)
        cast: nn.Module = model
        cast.to(STORED)
        model.save_pretrained(self.folder / "cast")
        kind.from_pretrained(self.folder / "cast", dtype=STORED).save_pretrained(
            self.source
        )  # some tensors stay in float32
        return None

    def read_back(self) -> str | None:
        """Whether transformers reads its own folder."""
        assert self.kind is not None
        model, info = self.kind.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise EndedError(
                "unavailable", f"transformers does not read what it wrote: {sorted(info['missing_keys'])[:3]}"
            )
        self.before = outputs(model, self.inputs)
        self.can_generate = self._generates(model)
        if not all(bool(t.isfinite().all()) for t in self.before):
            return "outputs with numbers that are not finite"
        return None

    def _generates(self, model: PreTrainedModel) -> bool:
        if not (self.kind and self.kind.can_generate()):
            return False
        try:
            generated(model, self.inputs)
        except Exception:  # transformers' own; then it is no step here
            return False
        return True

    def apply(self) -> str | None:
        """The recipe, first as it is and then with `unfit: skip`."""
        for self.skipping in (False, True):
            try:
                with memory(self._remember):
                    result = apply(self.recipe(), overwrite=True)
                break
            except ArmorError as error:
                if self.skipping or "unfit" not in ModifierConfig.model_fields or type(error).__name__ != "PlanError":
                    kind = "refused" if type(error).__name__ in ("PlanError", "InputError", "RecipeError") else "failed"
                    raise EndedError(kind, f"{type(error).__name__}: {_line(error)}") from error
                first = error
        self.packed = tuple(dict.fromkeys(row.name for row in result.plan.modules if row.stored_as == "packed"))
        self.sizes = {
            row.name: row.shape.d_out * row.shape.d_in for row in result.plan.modules if row.stored_as == "packed"
        }
        self.uses = {row.name: row.uses for row in result.plan.modules}
        self.record.taken = sum(self.sizes.values())
        self.record.untaken = tuple(
            name for name in self.blocks if not any(p == name or p.startswith(name + ".") for p in self.packed)
        )
        return f"with unfit: skip, else: {_line(first)}" if self.skipping else None

    def _remember(self, model: PreTrainedModel) -> None:
        self.in_memory = outputs(model, self.inputs)
        self.generated = generated(model, self.inputs) if self.can_generate else None

    def recipe(self) -> dict[str, Any]:
        """ARMOR on every linear module of repeated blocks."""
        file = self.folder / "inputs.safetensors"
        save_file({name: value.contiguous() for name, value in sampled(self.inputs).items()}, file)
        armor = {"targets": ["Linear"], "ignore": self.ignore, "block_size": BLOCK_SIZE, "iterations": 1}
        return {
            "model": str(self.source),
            "calibration": self.calibration(file),
            "prune_stage": {
                "armor_modifiers": {"ARMORModifier": {**armor, **({"unfit": "skip"} if self.skipping else {})}}
            },
            "output": {"path": str(self.out)},
        }

    def calibration(self, file: Path) -> dict[str, Any]:
        """These inputs; windows of random tokens where they are token ids and nothing else."""
        if self.reads_windows and self.inputs.keys() == {"input_ids"} and self.inputs["input_ids"].dim() == 2:
            return {"dataset": "builtin:random-tokens", "samples": 8, "sequence_length": 24, "batch_size": 4}
        return {"dataset": str(file), "samples": 2, "batch_size": 2}

    def lost(self) -> str | None:
        """Every tensor of the source, under the name that transformers reads it to, is there as it was, or is packed."""
        assert self.kind is not None
        before, after = tensors(self.source), tensors(self.out)
        read = own_tensors(self.kind, self.source)
        model = meta_model(open_model(ModelSpec(id=str(self.source)), device=torch.device("cpu")))
        made_anew = set(model._keys_to_ignore_on_save or ()) - before.keys()
        read = {name: tensor for name, tensor in read.items() if name not in made_anew}
        carried = [name for name, targets in loaded_as(model, before).items() if not targets]
        read |= {name: before[name] for name in carried if name not in read}
        lay_out(model, self.packed)
        parts: dict[str, list[str]] = {}
        for part, fused in fused_of(model).items():
            parts.setdefault(fused, []).append(part)
        gone = [n for n in read.keys() - after.keys() if not all(map(partial(self._there, after), parts.get(n, [n])))]
        other = [n for n in read.keys() & after.keys() if not self._packs(n) and not same(read[n], after[n])]
        if gone or other:
            raise EndedError("WRONG", f"lost: {sorted(gone)[:4]}; changed: {sorted(other)[:4]}")
        return f"{len(after)} tensors, {len(self.packed)} packed modules"

    def _there(self, after: Mapping[str, Tensor], name: str) -> bool:
        return name in after or self._packs(name)

    def _packs(self, name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        return parameter == "weight" and module in {*self.sizes, *(use for uses in self.uses.values() for use in uses)}

    def load(self) -> str | None:
        """`armor_recipes.load` gives what was in memory, bit for bit."""
        model = armor_recipes.load(self.out, dtype=torch.float32, backend="folded")
        self.kind_is(model)
        equal(outputs(model, self.inputs), self.in_memory, "load")
        written = tensors(self.out)
        with torch.no_grad():
            for name in self.packed:
                places = (name, *self.uses[name])
                stored = next(written[f"{place}.weight"].dtype for place in places if f"{place}.weight" in written)
                for (
                    use
                ) in places:  # as the dense export stores them; gradients as in the stock process: see runtime/backends
                    weight = model.get_submodule(use).to_dense().weight
                    weight.copy_(weight.to(stored)).requires_grad_()
        self.rounded = outputs(model, self.inputs)
        return None

    def kind_is(self, model: nn.Module) -> None:
        """The class that config.json names is what is loaded."""
        if type(model).__name__ != self.record.model_class:
            raise EndedError("WRONG", f"{self.record.model_class} is loaded as {type(model).__name__}")

    def stock_load(self) -> str | None:
        """`from_pretrained` of the class in config.json, with the package imported."""
        assert self.kind is not None
        loaded, info = self.kind.from_pretrained(self.out, dtype=torch.float32, output_loading_info=True)
        problems = {
            key: sorted(map(str, value))[:3]
            for key, value in info.items()
            if value and key in ("missing_keys", "mismatched_keys")
        }
        if problems:
            raise EndedError("WRONG", f"from_pretrained: {problems}")
        far = distance(outputs(loaded, self.inputs), self.in_memory)
        if far > NEAR:
            raise EndedError("WRONG", f"from_pretrained differs by {far:.2g}")
        return f"{far:.1g}"

    def generate(self) -> str | None:
        """What is loaded generates what the model in memory does."""
        if self.generated is None:
            return "no generation"
        found = generated(armor_recipes.load(self.out, dtype=torch.float32, backend="folded"), self.inputs)
        if not torch.equal(found, self.generated):
            raise EndedError("WRONG", "other tokens are generated")
        return None

    def again(self) -> str | None:
        """Loaded in its own dtypes and saved again, it is the same tensors."""
        assert self.kind is not None
        self.kind.from_pretrained(self.out, dtype="auto").save_pretrained(self.folder / "again")
        before, after = tensors(self.out), tensors(self.folder / "again")
        lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        changed = [n for n in before.keys() & after.keys() if not same(widened(before[n], after[n]), after[n])]
        if lost or new or changed:
            raise EndedError("WRONG", f"saved again: lost {lost[:3]}, new {new[:3]}, changed {changed[:3]}")
        return None

    def export(self) -> str | None:
        """Exported dense, a process without this package gives the same."""
        export_folder(self.out, self.dense, to="dense")
        before, after = tensors(self.source), tensors(self.dense)
        lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        if sum(before[n].numel() for n in lost) != sum(after[n].numel() for n in new):
            raise EndedError("WRONG", f"exported: lost {lost[:3]}, new {new[:3]}")
        other = [
            n
            for n in before.keys() & after.keys()
            if before[n].shape != after[n].shape or widened(before[n], after[n]).dtype != after[n].dtype
        ]
        if other:
            raise EndedError("WRONG", f"exported in another shape or dtype: {sorted(other)[:3]}")
        found = self.stock.outputs(self.dense, self.record.model_class, self.inputs)
        if self.experts and distance(found, self.rounded) <= ROUNDING:
            return f"{distance(found, self.rounded):.1g}" + (
                f", under other names: {new[0]} for {lost[0]}" if lost else ""
            )
        equal(found, self.rounded, "exported and read by transformers alone")
        return None


# --- what is measured -----------------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> dict[str, int]:
    """Numbers in the matrices of repeated blocks, by module (of fused experts: the module that holds them)."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not in_block(model, name):
            continue
        for parameter in module.parameters(recurse=False):
            wanted = parameter.dim() == 2 if is_linear(module) else parameter.dim() == stacked(module)
            if wanted and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = found.get(name, 0) + parameter.numel()
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix: `nn.Linear`, or transformers' transposed `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def stacked(module: nn.Module) -> int:
    """Dimensions of the stacked matrices of experts that it holds; 0 for any other module."""
    kind = type(module).__name__.lower()
    if "expert" not in kind or "conv" in kind:
        return 0
    return 2 if kind == "dbrxexpertglu" else 3


def in_block(model: nn.Module, name: str) -> bool:
    """Whether a module is inside of a list of at least two modules of one class that hold matrices."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit() and at:
            parent = model.get_submodule(".".join(parts[:at]))
            if isinstance(parent, nn.ModuleList) or (
                isinstance(parent, nn.Sequential) and 1 < len(parent) > len({type(m) for m in parent})
            ):
                return True
    return False


def outside(model: nn.Module) -> list[str]:
    """Linear modules that are no part of a block, for `ignore`."""
    return [name for name, m in model.named_modules() if is_linear(m) and not in_block(model, name)]


@torch.no_grad()
def uncalled(model: nn.Module, inputs: Inputs, blocks: dict[str, int]) -> list[str]:
    """Linear modules whose weights are those of blocks, and that these inputs never reach, or that are read without a call."""
    reached: set[int] = set()
    linears: dict[str, Any] = {name: m for name, m in model.named_modules() if is_linear(m)}
    own = {id(linears[name].weight) for name in blocks if name in linears}
    handles = [m.register_forward_pre_hook(lambda m, _: reached.add(id(m.weight))) for m in linears.values()]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [name for name, m in linears.items() if id(m.weight) in own - reached]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All float tensors of a forward pass."""
    model.eval()
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)  # some draw masks or noise
        return [tensor.detach().clone() for tensor in tensors_of(model(**inputs))]


@torch.no_grad()
def generated(model: Any, inputs: Inputs) -> Tensor:
    """Ids of three more tokens, chosen greedily."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        found = model.generate(**given, max_new_tokens=3, do_sample=False)
    tokens: Tensor = found if isinstance(found, Tensor) else found.sequences
    return tokens


def equal(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    """Raise EndedError where outputs are not the same bits; numbers that are NaN in both are equal."""
    if len(found) != len(wanted) or not all(map(same, found, wanted)):
        raise EndedError("WRONG", f"{what}: outputs differ by {distance(found, wanted):.2g}")


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same shape, dtype and numbers."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one, other) or ((one == other) | (one.isnan() & other.isnan())).all())


def widened(one: Tensor, other: Tensor) -> Tensor:
    """The tensor in the float dtype of the other where that is the wider one: `dtype="auto"` takes all in config.json's."""
    wider = one.is_floating_point() and other.dtype.itemsize > one.dtype.itemsize
    return one.to(other.dtype) if wider else one


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor; infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    pairs = zip(found, wanted, strict=True)
    return max(
        (
            float((a - b).abs().nan_to_num().max() / b.abs().nan_to_num().max().clamp(min=1e-9))
            for a, b in pairs
            if a.numel()
        ),
        default=0.0,
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def own_tensors(kind: type[PreTrainedModel], folder: Path) -> dict[str, Tensor]:
    """What transformers makes of a folder's tensors, under the model's own names; a tied tensor under the name that is saved."""
    model: Any = kind.from_pretrained(folder, dtype=STORED)
    state: dict[str, Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def sampled(inputs: Inputs) -> dict[str, Tensor]:
    """The same with the sample as the first dimension of all: patches of images are counted by their grids."""
    grids = next((inputs[n] for n in ("image_grid_thw", "grid_thw") if n in inputs), None)
    if grids is None:
        return dict(inputs)
    rows = int(grids[0].prod())
    return {
        name: v.unflatten(0, (len(grids), rows)) if len(v) == rows * len(grids) else v for name, v in inputs.items()
    }


@contextmanager
def memory(look: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Show the compressed model in memory to `look`, before the checkpoint is verified."""
    verify = job.verify_reloaded

    def watched(folder: Path, model: PreTrainedModel, **options: Any) -> None:
        look(model)
        verify(folder, model, **options)

    with patch.object(job, "verify_reloaded", watched):
        yield


def _once(rows: Any) -> list[Any]:
    return list({row.name: row for row in rows}.values())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def write_record(structure: Structure, record: Record, folder: Path) -> None:
    """One JSON a structure."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**asdict(record), "transformers": transformers.__version__}, indent=1)
    (folder / f"{structure}.json").write_text(text + "\n", encoding="utf-8")


def read_record(structure: Structure, folder: Path) -> Record | None:
    """What was written, of the same transformers; None where nothing was."""
    file = folder / f"{structure}.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.pop("transformers") != transformers.__version__:
        return None
    return Record(**{**found, "inputs": tuple(found["inputs"]), "untaken": tuple(found["untaken"])})
