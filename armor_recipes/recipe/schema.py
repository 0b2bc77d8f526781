"""What a recipe may say: frozen pydantic models, one for each section, every field with a title and a description.

The models are strict: `samples: "128"` or `seed: true` is an error and not a guess; a whole number is accepted where a
fraction may stand. Unknown keys are errors. A section that is required has no default, so that a missing section cannot
turn into a silent default run.
"""

from __future__ import annotations

import re
import warnings
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

DType = Literal["auto", "bfloat16", "float16", "float32"]
Unfit = Literal["error", "skip"]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Length = Annotated[int, Field(ge=2)]
Bos = Annotated[
    Literal["auto", "never"],
    Field(
        title="Beginning of text",
        description="`auto`: every window begins with the special tokens that the tokenizer by itself puts before a text (one or "
        "none, with most); `never`: windows are text alone.",
    ),
]


def _check_memory(value: str) -> str:
    memory_bytes(value)
    return value


def memory_bytes(text: str) -> int:
    """Bytes of `4GiB`. ValueError where it is no positive number with a unit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", text)
    size = 0 if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2])))
    if size <= 0:
        raise ValueError("is no amount of memory; write a number and a unit, as 4GiB or 800MB")
    return size


Memory = Annotated[str, AfterValidator(_check_memory)]

PRESET = "preset:"
"""What the name of a set of modules begins with, in `targets` and `ignore`."""
PRESETS = ("attention", "mlp", "all-linear")


def _check_target(target: str) -> str:
    """Return `target`; ValueError if it is a `re:` pattern that is not a regular expression, or a preset that is none."""
    if target.startswith(PRESET) and target.removeprefix(PRESET) not in PRESETS:
        raise ValueError(f"is no preset of targets; there are {', '.join(PRESET + name for name in PRESETS)}")
    if not target.startswith("re:"):
        return target
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(target.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({error}); correct the pattern after 're:'") from error
    return target


def _as_tuple(value: object) -> object:
    """Return a list as a tuple, so that Python users may write either; everything else untouched."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: object) -> object:
    """Return a single name as a tuple of one: `targets: Linear` means `targets: [Linear]`, as in llm-compressor."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


Target = Annotated[Name, AfterValidator(_check_target)]
Targets = Annotated[
    tuple[Target, ...], BeforeValidator(_one_or_many, json_schema_input_type=Target | tuple[Target, ...])
]
SomeTargets = Annotated[Targets, Field(min_length=1)]


class Strict(BaseModel):
    """Base of all models of the recipe: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSpec(Strict):
    """The model to compress; `model: NAME` is short for `model: {id: NAME}`."""

    id: Name = Field(
        title="Model",
        description="Hub id, local folder (relative to the working directory), or `builtin:NAME`.",
    )
    revision: Name | None = Field(
        default=None, title="Revision", description="Branch, tag or commit of a hub id; left out, the hub's default."
    )
    teacher: Name | None = Field(
        default=None,
        title="Teacher",
        description="Of a model that is compressed already, the dense one that it was made from: what refiners train against. Hub "
        "id, local folder or `builtin:NAME`.",
    )
    dtype: DType = Field(
        default="auto", title="Stored dtype", description="Dtype of the tensors written; `auto` is that of the input."
    )
    compute_dtype: DType = Field(
        default="auto",
        title="Compute dtype",
        description="Dtype of forward passes; `auto` is float32 on a CPU and the stored dtype on a GPU; with `memory` bfloat16 "
        "where the model is stored in it and the CPU multiplies it.",
    )
    memory: Memory | None = Field(
        default=None,
        title="Memory",
        description="Memory of its own that the run may take, as `4GiB` (KiB, MiB, GiB, TiB or KB, MB, GB, TB): weights, "
        "activations and results are then in mapped files beside the output, and what cannot fit is refused. Left out, there is "
        "no bound, and all is held in memory.",
    )
    trust_remote_code: bool = Field(
        default=False,
        title="Trust remote code",
        description="Only `false` is accepted: `true` would run Python code that comes with the model.",
    )

    @field_validator("trust_remote_code")
    @classmethod
    def _refuse_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "is refused: it would run Python code that comes with the model; "
                "remove the key and use a model whose architecture is part of transformers"
            )
        return value


class AtMost(Strict):
    """A number of samples that may turn out smaller: `samples: {at_most: 128}`."""

    at_most: Count = Field(
        title="At most",
        description="Take this many samples, or all there are if there are fewer (the report says how many).",
    )


class WeightedDataset(Strict):
    """One dataset of a weighted mix."""

    dataset: Name = Field(
        title="Dataset",
        description="Hub id, local text, JSON, JSONL, parquet or safetensors file, folder of images, or `builtin:NAME`.",
    )
    weight: float = Field(gt=0, title="Weight", description="Its share of the samples, relative to the other weights.")
    split: Name | None = Field(
        default=None, title="Split", description="Split of this dataset; left out, that of the calibration."
    )
    text_column: Name | None = Field(
        default=None, title="Text column", description="Column that holds its text; left out, that of the calibration."
    )
    messages_column: Name | None = Field(
        default=None,
        title="Messages column",
        description="Column that holds its chat messages; left out, that of the calibration.",
    )
    source_column: Name | None = Field(
        default=None,
        title="Source column",
        description="Column of what its encoder reads; left out, that of the calibration.",
    )
    target_column: Name | None = Field(
        default=None,
        title="Target column",
        description="Column of what its decoder writes; left out, that of the calibration.",
    )
    image_column: Name | None = Field(
        default=None, title="Image column", description="Column of its images; left out, that of the calibration."
    )
    stream: bool | None = Field(
        default=None, title="Stream", description="Whether it is read as a stream; left out, as the calibration says."
    )


Mix = Annotated[
    tuple[WeightedDataset, ...],
    Field(min_length=1),
    BeforeValidator(_as_tuple, json_schema_input_type=tuple[WeightedDataset, ...]),
]


class InputsSpec(Strict):
    """Samples of the model's inputs, chosen by a seed."""

    dataset: Name | Mix = Field(
        title="Dataset",
        description=(
            "Hub id, local text, JSON, JSONL, parquet or safetensors file, folder of images (relative to the file that names it), "
            "`builtin:NAME`, or a list of `{dataset, weight}` mixed by the seed."
        ),
    )
    split: Name = Field(default="train", title="Split", description="Split of a hub dataset.")
    text_column: Name = Field(default="text", title="Text column", description="Column that holds the text.")
    messages_column: Name | None = Field(
        default=None,
        title="Messages column",
        description="Column that holds chat messages, put through the chat template; wins over `text_column`.",
    )
    source_column: Name | None = Field(
        default=None,
        title="Source column",
        description="Column that holds what the encoder of an encoder and decoder reads; goes with `target_column`.",
    )
    target_column: Name | None = Field(
        default=None,
        title="Target column",
        description="Column that holds what the decoder of an encoder and decoder writes; goes with `source_column`.",
    )
    image_column: Name | None = Field(
        default=None,
        title="Image column",
        description="Column that holds images, put through the model's processor, with the text of `text_column` or "
        "`messages_column` where the model reads both.",
    )
    stream: bool | None = Field(
        default=None,
        title="Stream",
        description="Whether only as much of a dataset is read as the windows need, in an order drawn by the seed; left out, "
        "`true` for hub ids and `false` for all else, which is read whole.",
    )
    documents: Literal["packed", "truncated"] = Field(
        default="packed",
        title="Documents",
        description="`packed`: documents follow one another and are cut into windows; `truncated`: each window is the beginning "
        "of a document, and shorter documents are passed over and counted.",
    )
    samples: Count | AtMost = Field(
        default=128,
        title="Samples",
        description="Number of windows, or samples of other kinds; fewer in the data is an error unless written `{at_most: N}`.",
    )
    sequence_length: Length = Field(default=512, title="Sequence length", description="Tokens in a window or text.")
    bos: Bos = "auto"
    batch_size: Count = Field(default=8, title="Batch size", description="Windows in one forward pass.")
    seed: Seed = Field(default=0, title="Seed", description="Seed of the choice of windows.")

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets' names, in order."""
        return (self.dataset,) if isinstance(self.dataset, str) else tuple(part.dataset for part in self.dataset)


class CalibrationSpec(InputsSpec):
    """The text that modifiers are calibrated on; a modifier's own `calibration` takes the keys it lacks from here."""

    experts: Literal["routed", "all"] = Field(
        default="routed",
        title="Experts",
        description="What an expert of a mixture is calibrated on: `routed`, the tokens that the router gives it; `all`, all "
        "tokens, while outputs stay those of the routed ones.",
    )


class PerplexitySpec(Strict):
    """The text on which perplexity is measured before and after."""

    dataset: Name = Field(
        title="Dataset",
        description="Hub id, local text, JSON, JSONL or parquet file (relative to this file), or `builtin:NAME`.",
    )
    split: Name = Field(default="test", title="Split", description="Split of a hub dataset.")
    text_column: Name = Field(default="text", title="Text column", description="Column that holds the text.")
    rows: Count | None = Field(
        default=None,
        title="Rows",
        description="Rows of the dataset that are read, from the start, at most; left out, all.",
    )
    documents: Literal["joined", "rolling"] = Field(
        default="joined",
        title="Documents",
        description="`joined`: all rows are one text, which is cut into windows; `rolling`: each row is a text, and each of its "
        "tokens is predicted once, as lm-eval does.",
    )
    separator: str = Field(default="\n\n", title="Separator", description="What `joined` puts between two rows.")
    sequence_length: Length = Field(
        default=512,
        title="Sequence length",
        description="Tokens L in a window; each window has L−1 targets, with `rolling` L.",
    )
    stride: Count | None = Field(
        default=None,
        title="Stride",
        description="Tokens from one window's start to that of the next, of which each then predicts what no earlier one has, to "
        "the end of the text; left out, windows do not overlap, and the tail is dropped.",
    )
    bos: Literal["auto", "once", "never"] = Field(
        default="auto",
        title="Beginning of text",
        description="`auto`: every window begins with the special tokens that the tokenizer by itself puts before a text (one or "
        "none, with most); `once`: the whole text does, and ends with those after it; `never`: windows are text alone.",
    )
    windows: Count | AtMost | None = Field(
        default=None,
        title="Windows",
        description="Number of windows, from the start of the text; fewer is an error unless written `{at_most: N}`; left out, "
        "all.",
    )

    @model_validator(mode="after")
    def _rolls_by_itself(self) -> PerplexitySpec:
        if self.documents == "rolling" and (self.stride is not None or self.bos == "once"):
            raise ValueError("`documents: rolling` has windows of its own: leave out `stride` and `bos: once`")
        return self


class FidelitySpec(InputsSpec):
    """The inputs on which outputs are compared with the dense model's: keys of `calibration`, but for `experts`, and `output`."""

    split: Name = Field(default="test", title="Split", description="Split of a hub dataset.")
    samples: Count | AtMost = Field(
        default=16,
        title="Samples",
        description="Number of samples; fewer in the data is an error unless written `{at_most: N}`. The dense model's outputs for "
        "them lie on the disk meanwhile.",
    )
    output: Name | None = Field(
        default=None,
        title="Output",
        description="Which of the model's outputs is compared; left out, `logits`, else `last_hidden_state`, else embeddings, else "
        "the first.",
    )


class ClassificationSpec(Strict):
    """The labelled samples on which a classifier's accuracy is measured before and after."""

    dataset: Name = Field(
        title="Dataset",
        description="JSON, JSONL or parquet file (relative to this file) or hub id, with a text or an image and a label in each "
        "row; folder of images with a sub-folder for each class; or safetensors files with the model's inputs and the labels, a "
        "row for each sample.",
    )
    split: Name = Field(default="test", title="Split", description="Split of a hub dataset.")
    text_column: Name = Field(default="text", title="Text column", description="Column that holds the text.")
    image_column: Name | None = Field(
        default=None,
        title="Image column",
        description="Column that holds images, put through the model's processor; needed for a folder of images, too.",
    )
    label_column: Name | None = Field(
        default=None,
        title="Label column",
        description="Column that holds the class: its number, or its name in the model's config; left out, `label`, and of tensors "
        "`labels`.",
    )
    samples: Count | None = Field(
        default=None, title="Samples", description="Number of samples, from the start; left out, all."
    )
    sequence_length: Length = Field(
        default=512, title="Sequence length", description="Longer texts are cut to so many tokens, and counted."
    )
    batch_size: Count = Field(default=8, title="Batch size", description="Samples in one forward pass, at most.")


class MultipleChoiceSpec(Strict):
    """The questions on which accuracy by log-likelihood is measured before and after."""

    dataset: Name = Field(
        title="Dataset",
        description="JSON, JSONL or parquet file (relative to this file) or hub id, with a context, a list of choices and the "
        "number of the right one, from 0, in each row; or `builtin:continuations`.",
    )
    split: Name = Field(default="test", title="Split", description="Split of a hub dataset.")
    context_column: Name = Field(
        default="context", title="Context column", description="Column that holds the text before the choice."
    )
    choices_column: Name = Field(
        default="choices", title="Choices column", description="Column that holds the list of texts that may follow."
    )
    answer_column: Name = Field(
        default="answer", title="Answer column", description="Column that holds the number of the right choice, from 0."
    )
    samples: Count | None = Field(
        default=None, title="Samples", description="Number of questions, from the start; left out, all."
    )
    sequence_length: Length = Field(
        default=512,
        title="Sequence length",
        description="Contexts lose their start where they and a choice are more than so many tokens, and are counted.",
    )
    batch_size: Count = Field(default=8, title="Batch size", description="Choices in one forward pass, at most.")


class RetrievalSpec(Strict):
    """The pairs of a query and its document on which embeddings are measured before and after."""

    dataset: Name = Field(
        title="Dataset",
        description="JSON, JSONL or parquet file (relative to this file) or hub id, with a query and its document in each row.",
    )
    split: Name = Field(default="test", title="Split", description="Split of a hub dataset.")
    query_column: Name = Field(default="query", title="Query column", description="Column that holds the query.")
    document_column: Name = Field(
        default="document", title="Document column", description="Column that holds the query's document."
    )
    query_prompt: str = Field(default="", title="Query prompt", description="Text put before every query.")
    document_prompt: str = Field(default="", title="Document prompt", description="Text put before every document.")
    pooling: Literal["mean", "cls", "last"] = Field(
        default="mean",
        title="Pooling",
        description="What of the last hidden states is the embedding: their mean, that of the first token, or of the last.",
    )
    samples: Count | None = Field(
        default=None, title="Samples", description="Number of pairs, from the start; left out, all."
    )
    sequence_length: Length = Field(
        default=512, title="Sequence length", description="Longer texts are cut to so many tokens, and counted."
    )
    batch_size: Count = Field(default=8, title="Batch size", description="Texts in one forward pass, at most.")


class EvaluationSpec(Strict):
    """What is measured before and after, one or more of these; without this section nothing is, and the summary says so."""

    perplexity: PerplexitySpec | None = Field(
        default=None, title="Perplexity", description="Token-level perplexity on held-out text."
    )
    fidelity: FidelitySpec | None = Field(
        default=None,
        title="Fidelity",
        description="How near outputs are to those of the dense model, of any kind of model.",
    )
    classification: ClassificationSpec | None = Field(
        default=None, title="Classification", description="Accuracy of a classifier on labelled samples."
    )
    retrieval: RetrievalSpec | None = Field(
        default=None,
        title="Retrieval",
        description="Whether embeddings of queries are nearest to those of their documents.",
    )

    multiple_choice: MultipleChoiceSpec | None = Field(
        default=None,
        title="Multiple choice",
        description="How often the right one of several continuations is the likeliest.",
    )
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        title="Highest ratio of perplexities",
        description="A run whose perplexity after is more than so many times the one before fails with exit code 8; its output is "
        "kept beside its place. Needs `perplexity`; left out, any is taken.",
    )
    max_kl_divergence: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        title="Highest KL divergence",
        description="A run whose mean KL divergence to the dense model, in nats a token, is more fails likewise. Needs `fidelity`; "
        "left out, any is taken.",
    )

    @model_validator(mode="after")
    def _measure_something(self) -> EvaluationSpec:
        if self.max_perplexity_ratio is not None and self.perplexity is None:
            raise ValueError("max_perplexity_ratio compares perplexity after with that before: give `perplexity`, too")
        if self.max_kl_divergence is not None and (
            self.fidelity is None or self.fidelity.output not in (None, "logits")
        ):
            raise ValueError("max_kl_divergence is a bound on what `fidelity` measures of logits: give that, too")
        if not self.measures:
            measures = [name for name in type(self).model_fields if not name.startswith("max_")]
            raise ValueError(f"names nothing to measure; give one or more of {', '.join(measures)}")
        return self

    @property
    def measures(self) -> dict[str, Strict]:
        """The sections that are there, by their keys."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: spec for name, spec in found.items() if isinstance(spec, Strict)}

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that are named, each once."""
        return tuple(dict.fromkeys(name for spec in self.measures.values() for name in datasets_of(spec)))


def datasets_of(spec: Strict) -> tuple[str, ...]:
    """The datasets that a section names."""
    if isinstance(spec, InputsSpec):
        return spec.datasets
    dataset = getattr(spec, "dataset", None)
    return (dataset,) if isinstance(dataset, str) else ()


class OutputSpec(Strict):
    """Where the result goes, and in which format."""

    path: Name = Field(title="Path", description="Folder to write, relative to the working directory.")
    format: Literal["compressed-tensors", "dense"] = Field(
        default="compressed-tensors",
        title="Format",
        description="`compressed-tensors` keeps the 2:4 core and the factors packed; `dense` folds them into weights.",
    )


Ways = Annotated[
    tuple[Count, ...], Field(min_length=1), BeforeValidator(_as_tuple, json_schema_input_type=tuple[Count, ...])
]


class ServeSpec(Strict):
    """Who is to serve the result: what such a server needs is checked when the recipe is planned."""

    tensor_parallel: Ways = Field(
        title="Tensor parallelism",
        description="Numbers of processes that a server may split each layer over, such as `[1, 2]`; fused layers (query, key and "
        "value; gate and up) and blocks must allow each of them.",
    )


class MoeSpec(Strict):
    """What becomes of experts that too few calibration tokens reach."""

    minimum_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        title="Fewest tokens",
        description="Calibration tokens that each targeted module of an expert is to see; 0 asks for none. `auto`: 128, or as many "
        "as the module has input channels where products of channels are asked for (`hessian`, SparseGPT).",
    )
    below: Literal["error", "layer-moment", "skip"] = Field(
        default="layer-moment",
        title="Below it",
        description="What is done with an expert that sees fewer: `layer-moment`, it is calibrated on what all targeted experts of "
        "its layer see; `skip`, it is left as it is; `error`, the run ends. The summary and the report count them.",
    )


class MetadataSpec(Strict):
    """What a recipe says of itself. It changes nothing of a run, and the recipe's hash leaves it out."""

    title: Name | None = Field(default=None, title="Title", description="What it does, in a line.")
    description: Name | None = Field(default=None, title="Description", description="Whatever a reader should know.")
    tested_on: Annotated[
        tuple[Name, ...], BeforeValidator(_one_or_many, json_schema_input_type=Name | tuple[Name, ...])
    ] = Field(default=(), title="Tested on", description="Models and machines on which it was run.")
    expected: Name | None = Field(
        default=None, title="Expected", description="The figure that it gave there, and on what text."
    )


class Sections(Strict):
    """The sections of a recipe beside its stages."""

    metadata: MetadataSpec | None = Field(
        default=None, title="Metadata", description="Title, what it was tested on, and the figure to expect."
    )
    model: ModelSpec = Field(
        title="Model", description="The model to compress; a plain string is its `id`. Required, here or by argument."
    )
    calibration: CalibrationSpec | None = Field(
        default=None, title="Calibration", description="Default for every modifier that needs data."
    )
    output: OutputSpec = Field(title="Output", description="Where the result goes. Required, here or by `--output`.")
    evaluation: EvaluationSpec | None = Field(
        default=None, title="Evaluation", description="What is measured before and after; left out, nothing is."
    )
    serve: ServeSpec | None = Field(
        default=None, title="Serve", description="What the plan checks for a server; left out, nothing."
    )
    moe: MoeSpec | None = Field(
        default=None,
        title="Mixtures of experts",
        description="What becomes of experts that too few calibration tokens reach; left out, the defaults of its keys.",
    )


class SkippedLayers(Strict):
    """How many of the first and last layers of each list of layers are left alone."""

    first: Annotated[int, Field(ge=0)] = Field(default=0, title="First", description="So many layers from the start.")
    last: Annotated[int, Field(ge=0)] = Field(default=0, title="Last", description="So many layers from the end.")


class ModifierConfig(Strict):
    """Base of every modifier's configuration: the keys that all modifiers share.

    A subclass whose modifier cannot work without data sets `needs_calibration = True`; a recipe that gives it none is
    refused. Where `takes_containers` is set, a target that matches a module with linear ones inside means all of these.
    """

    needs_calibration: ClassVar[bool] = False
    takes_containers: ClassVar[bool] = False

    targets: SomeTargets = Field(
        title="Targets",
        description="Modules to change: exact names, `re:` patterns on the full name, class names such as `Linear`, or sets: "
        "`preset:attention` and `preset:mlp` (linear modules of the repeated layers in and outside of attention, routers "
        "of experts apart), `preset:all-linear` (all of them).",
    )
    ignore: Targets = Field(
        default=(), title="Ignore", description="Modules to leave alone although `targets` matches them; same notation."
    )
    skip_layers: SkippedLayers | None = Field(
        default=None,
        title="Skipped layers",
        description="First and last layers to leave alone, such as `{first: 1, last: 2}`, of each list of layers in the model.",
    )
    optional: bool = Field(
        default=False, title="Optional", description="Whether `targets` may match no module at all without an error."
    )
    unfit: Unfit = Field(
        default="error",
        title="Unfit modules",
        description="What becomes of a matched module that the modifier cannot change (sides that blocks or pattern do not divide, "
        "a tied weight, a place outside of the layers, no linear weight): `error`, or `skip`, which leaves it as it is and lists "
        "it with the reason.",
    )
    calibration: CalibrationSpec | None = Field(
        default=None,
        title="Calibration",
        description="Data of this modifier; the keys it does not give come from the top-level `calibration`.",
    )
    seed: Seed = Field(
        default=0, title="Seed", description="Seed of every random choice; each module derives its own from it."
    )
