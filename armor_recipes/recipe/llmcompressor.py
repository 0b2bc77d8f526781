"""What llm-compressor's recipes hold that ours do not: its modifiers by name, its fields, and what to write here instead.

Names and fields are those of llm-compressor 0.14.0.1, and of recipes that older releases wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from armor_recipes.recipe.problems import show
from armor_recipes.recipe.tree import Node, Scalar, is_null, plain

EXTRA = "armor-recipes[llmcompressor]"
STEP_PYTHON = "ARMOR_LLMCOMPRESSOR_PYTHON"
"""The environment variable that names a Python which has llm-compressor, where this one has none."""

_QUANTISATION = (
    "targets",
    "ignore",
    "scheme",
    "config_groups",
    "kv_cache_scheme",
    "weight_observer",
    "input_observer",
    "output_observer",
    "observer",
    "bypass_divisibility_checks",
)
_ROTATION = ("rotations", "transform_type", "randomize", "learnable", "precision", "transform_block_size")
_PRUNING = ("sparsity", "mask_structure", "sequential_update", "targets", "ignore", "sparsity_profile")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A modifier of llm-compressor: its fields, and which of our modifiers come closest, the nearest first."""

    fields: tuple[str, ...]
    nearest: tuple[str, ...] = ()


MODIFIERS: Mapping[str, Neighbour] = {
    "AutoRoundModifier": Neighbour(
        (*_QUANTISATION, "iters", "lr", "batch_size", "enable_torch_compile", "device_ids", "disable_opt_rtn"),
        ("GPTQModifier", "QuantizationModifier"),
    ),
    "AWQModifier": Neighbour(
        ("mappings", "duo_scaling", "n_grid", "offload_device"), ("GPTQModifier", "QuantizationModifier")
    ),
    "ConstantPruningModifier": Neighbour(("targets",)),
    "GPTQModifier": Neighbour(
        (*_QUANTISATION, "block_size", "dampening_frac", "actorder", "batched_quantization"),
        ("QuantizationModifier",),
    ),
    "LogarithmicEqualizationModifier": Neighbour(
        ("smoothing_strength", "mappings", "ignore", "num_calibration_steps", "calibration_function", "algorithm"),
        ("SmoothQuantModifier",),
    ),
    "MagnitudePruningModifier": Neighbour(
        (
            "targets",
            "init_sparsity",
            "final_sparsity",
            "update_scheduler",
            "scheduler_args",
            "mask_structure",
            "apply_globally",
            "leave_enabled",
        ),
        ("MagnitudeModifier",),
    ),
    "QuantizationModifier": Neighbour(_QUANTISATION),
    "QuIPModifier": Neighbour((*_ROTATION, "targets", "ignore", "transform_config"), ("GPTQModifier",)),
    "REAPPruningModifier": Neighbour(("sparsity", "ignore", "report_path")),
    "SmoothQuantModifier": Neighbour(
        ("smoothing_strength", "mappings", "ignore", "num_calibration_steps", "calibration_function", "algorithm"),
        ("AWQModifier",),
    ),
    "SparseGPTModifier": Neighbour(
        (
            *_PRUNING,
            "owl_m",
            "owl_lmbda",
            "block_size",
            "dampening_frac",
            "preserve_sparsity_mask",
            "offload_hessians",
        ),
        ("ARMORModifier", "NoWagModifier"),
    ),
    "SpinQuantModifier": Neighbour((*_ROTATION, "mappings", "norm_mappings", "transform_config"), ("GPTQModifier",)),
    "WandaPruningModifier": Neighbour((*_PRUNING, "owl_m", "owl_lmbda"), ("ARMORModifier", "NoWagModifier")),
}
"""Every modifier of llm-compressor 0.14 by name."""

RENAMED: Mapping[str, str] = {"vLLMQuantizationModifier": "QuantizationModifier"}
"""Modifiers that llm-compressor itself has renamed since."""


_ONLINE, _ROTATES, _FUSED = "QuIPModifier", "SpinQuantModifier", ("R1", "R2")
_QUANTISES = "scheme"
_LEAVES: Mapping[str, str] = {"REAPPruningModifier": "takes experts away, which makes another model"}


def rotates_as_it_runs(kind: str, fields: object) -> bool:
    """Whether the model that a modifier with these fields leaves rotates activations as it runs, and not in its weights alone."""
    given = fields.get("rotations") if kind == _ROTATES and isinstance(fields, Mapping) else None
    asked = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return kind == _ONLINE or any(name not in _FUSED for name in asked)


ROTATING = (
    "activations are rotated as the model runs, which transformers by itself leaves out: it would load another model without a "
    "word. Load the folder with armor_recipes.load, or after `import armor_recipes` with from_pretrained, or serve it where "
    "`transform_config` is read"
)
"""What is said of a folder that rotates."""


def left_behind_by(kind: str, fields: object) -> str:
    """Why no modifier of ours goes on from what one of llm-compressor's with these fields leaves; empty where they do."""
    if rotates_as_it_runs(kind, fields):
        fused = f" ({' and '.join(_FUSED)} lie in the weights)" if kind == _ROTATES else ""
        return f"leaves rotations that are made as the model runs{fused}"
    return _LEAVES.get(kind, "leaves a quantised model" if _QUANTISES in MODIFIERS[kind].fields else "")


def cannot_be_mixed(kind: str, reason: str) -> str:
    """What is said of a modifier that leaves what no modifier of ours goes on from, in a recipe with one of ours."""
    return (
        f"llm-compressor has {kind}, which {reason}, and no modifier here goes on from that: run it by itself with "
        "llm-compressor (a recipe of its modifiers alone does), or remove it"
    )


def not_here(kind: str, known: Collection[str], fields: object = None, kinds: Collection[str] = ()) -> str | None:
    """What is said of a modifier of llm-compressor that is not among the `known` ones; None for any other name.

    `kinds` are those of the recipe's other modifiers.
    """
    if kind in RENAMED:
        return f"llm-compressor has renamed {kind}: write {RENAMED[kind]}"
    neighbour = MODIFIERS.get(kind)
    if neighbour is None:
        return None
    reason = left_behind_by(kind, fields)
    if reason and any(name not in MODIFIERS for name in kinds):
        return cannot_be_mixed(kind, reason)
    here = [name for name in neighbour.nearest if name in known]
    other = f"take {here[0]}, which comes closest here" if here else "remove it"
    return f"llm-compressor has {kind}, which is not here: install `{EXTRA}` to run it as a step, or {other}"


Says = Callable[[Node, Collection[str]], str]


@dataclass(frozen=True, slots=True)
class Field:
    """A field that a modifier of ours does not have, though recipes of llm-compressor do.

    Values for which `empty` holds, and null, ask for nothing that is not done anyway, and are left out; of any other `says` tells
    what it was and what to write, given the value and the modifier's fields here. `renamed` are the names that it may have here,
    with the same meaning and value.
    """

    empty: Callable[[object], bool]
    says: Says
    renamed: tuple[str, ...] = ()

    def is_empty(self, node: Node) -> bool:
        """Whether a value asks for nothing that is not done anyway."""
        return is_null(node) or self.empty(plain(node))


def _one_of(*values: object) -> Callable[[object], bool]:
    """Whether a value is one of these; `0` and `False` are told apart."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _text(text: str) -> Says:
    return lambda _node, _fields: text


def _renamed(*names: str, by: str = "llm-compressor has renamed it") -> Field:
    def says(node: Node, fields: Collection[str]) -> str:
        name = next((name for name in names if name in fields), names[0])
        return f"{by}: write `{name}: {_written(node)}`"

    return Field(_one_of(), says, names)


def _mask_structure(node: Node, _fields: Collection[str]) -> str:
    value = node.value if isinstance(node, Scalar) else None
    pruned, colon, group = value.partition(":") if isinstance(value, str) else ("", "", "")
    text = "llm-compressor's N:M prunes N of every M values"
    if colon and pruned.isdigit() and group.isdigit() and 0 < int(pruned) < int(group):
        return f"{text}, `pattern` here counts what is kept: write `pattern: {int(group) - int(pruned)}:{int(group)}`"
    return f"{text}, and 0:0 prunes without a pattern; this modifier keeps N of every M: write `pattern: N:M`"


def _written(node: Node) -> str:
    return node.text or str(node.value) if isinstance(node, Scalar) else show(plain(node))


def _anything(_value: object) -> bool:
    return True


_STATE = Field(_anything, _text(""))
"""What a modifier of a finished run was in: it asks for nothing."""
_STEPS = "a step of a training run; every modifier here acts once: remove it"
_TRAINING = "it belongs to quantisation-aware training, which is not here; remove it"
_CALIBRATION = "calibration is a section of its own here: write `calibration: {dataset: NAME, samples: N}`"
_OWL = "sparsity that differs from layer to layer is not here: remove it, and give layers modifiers of their own"
_SPARSITY = "sparsity is a pattern here, N kept of every M values: write `pattern: 2:4` for half of them"

FIELDS: Mapping[str, Field] = {
    "requires_calibration_data": _STATE,
    "index": _STATE,
    "group": _STATE,
    "start": Field(_one_of(0, 0.0, -1, -1.0), _text(_STEPS)),
    "end": Field(_one_of(0, 0.0, -1, -1.0), _text(_STEPS)),
    "update": Field(_one_of(-1, -1.0), _text(_STEPS)),
    "percdamp": _renamed("dampening_frac", "damping"),
    "dampening_frac": _renamed("damping", by="it is `damping` here"),
    "quantize": Field(
        _one_of(False),
        _text(
            "it quantised the weights, too: put a QuantizationModifier or GPTQModifier with a `scheme` after this one"
        ),
    ),
    "sequential_update": Field(
        _one_of(True, False),
        _text("whether layers are compressed one after the other, as they always are here: remove it"),
    ),
    "offload_hessians": Field(
        _one_of(False), _text("it moved Hessians to the CPU's memory, which changes no number: remove it")
    ),
    "batched_quantization": Field(
        _one_of("auto"), _text("how many weights are quantised at once, which changes no number: remove it")
    ),
    "bypass_divisibility_checks": Field(
        _one_of(False),
        _text("it lets groups pass that do not divide the columns; this modifier has no groups: remove it"),
    ),
    "algorithm": Field(
        _one_of("smoothquant"),
        _text("only llm-compressor's `smoothquant` is done here, not its `log_equalization`: remove it"),
    ),
    "calibration_function": Field(_one_of(), _text(_CALIBRATION)),
    "num_calibration_steps": Field(_one_of(), _text(_CALIBRATION)),
    "offload_device": Field(_one_of(), _text("where activations wait, which changes no number: remove it")),
    "mask_structure": Field(_one_of(), _mask_structure),
    "sparsity": Field(_one_of(), _text(_SPARSITY)),
    "sequential_targets": Field(
        _one_of(), _text("which layers are calibrated one after the other, as all blocks are here: remove it")
    ),
    "prunen": Field(_one_of(), _text("it is `mask_structure: N:M` in llm-compressor now, and `pattern` here")),
    "prunem": Field(_one_of(), _text("it is `mask_structure: N:M` in llm-compressor now, and `pattern` here")),
    "sparsity_profile": Field(_one_of(), _text(_OWL)),
    "owl_m": Field(_one_of(), _text(_OWL)),
    "owl_lmbda": Field(_one_of(), _text(_OWL)),
    "preserve_sparsity_mask": Field(
        _one_of(False), _text("this modifier makes a mask of its own and keeps none that was there: remove it")
    ),
    "scheme_overrides": Field(_one_of(), _text("write `config_groups`, a group for each kind of module")),
    "freeze_bn_stats": Field(_one_of(False), _text(_TRAINING)),
    "disable_quantization_observer_epoch": Field(_one_of(), _text(_TRAINING)),
}
"""Fields of llm-compressor, of today and of older releases, by name. They count where a modifier here has no such field."""


STATES = (
    "initialized_",
    "finalized_",
    "started_",
    "ended_",
    "enabled_",
    "parameterized_layers_",
    "resolved_mappings_",
    "scales_",
    "current_sparsity_",
    "scheduler_function_",
    "mask_creator_function_",
)
"""Fields in which llm-compressor's modifiers keep where they are in a run."""


AWQ = "AWQModifier"
SCHEMES = ("scheme", "config_groups")
MOVED_FROM_AWQ = _QUANTISATION
"""Fields that AWQModifier had before llm-compressor 0.14: they belong to a quantisation modifier after it."""
_MOVED = Field(
    _one_of(),
    _text(
        "llm-compressor's AWQModifier only scales since 0.14: put a QuantizationModifier with this field after it, as "
        "`armor convert` does"
    ),
)


def field_of(kind: str, name: str) -> Field | None:
    """What is known of a field that a modifier of ours does not have; None where llm-compressor has none of this name."""
    if kind == AWQ and name in MOVED_FROM_AWQ:
        return _MOVED
    known = _STATE if name in STATES else FIELDS.get(name)
    neighbour = MODIFIERS.get(kind)
    if known is None and neighbour is not None and name in neighbour.fields:
        return Field(_one_of(), _text(f"a field of llm-compressor's {kind} that is not here: remove it"))
    return known


def name_here(kind: str, name: str, known: Collection[str]) -> str:
    """The name that a field has here, with the same meaning and value: its own where nothing else is `known`."""
    field = None if name in known else field_of(kind, name)
    return next((other for other in (field.renamed if field is not None else ()) if other in known), name)
