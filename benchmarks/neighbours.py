"""What other ways to make a model smaller leave of it, beside ours: one evaluator, the same windows, bytes as stored.

    python benchmarks/neighbours.py --llmcompressor .venv-llmcompressor/bin/python [--rows 'dense;Q8_0']
    python benchmarks/neighbours.py --model models/smollm2-135m-instruct --recipe ARMOR=recipes/smollm2-135m.yaml \\
        --text pydoc=builtin:pydoc-heldout --text handbook=handbook.txt --windows 24 --length 512 --passages 300

A row is one JSON file, `RESULTS/MODEL/ROW.json`; rows that exist are not run again. `RESULTS/MODEL.json` is the table of all rows,
with a reason in the place of figures where there is none yet. In the place of a recipe `--recipe` takes the folder that one wrote:
it is measured as it is, and rows with another core are made from the factors that it holds.

Every row changes the linear layers of the decoder layers, all of them; embeddings and output layer stay as they are, in bf16. What
calibrates does so by the `calibration` of the recipe `ARMOR` (Wanda and NoWag-P by that of its first step, if it has one of its
own: they need means alone). Each model is then computed in float32, with weights as its files say, side by side with the dense one:

- perplexity, KL(dense ‖ row) in nats a token and top-1 agreement on `--windows` windows of `--length` tokens, evenly spread
  over each text, by the functions of `armor eval`; intervals are of 1,000 resamples of the windows;
- accuracy on the first `--passages` of `builtin:continuations`, with Wilson's interval; its difference to the dense model's is of
  resampled passages.

Rows by llm-compressor are its own `oneshot`, in the Python that `--llmcompressor` names. Q8_0 and Q4_0 are rounded by the package
`gguf`, llama.cpp's own. 2:4 rows without factors are packed by `armor export --to armor`: no other tool here stores them smaller.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from losses import read_texts
from quantized import backend_of
from quantizing import quantise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor_recipes
from armor_recipes.calibration.tokens import build_inputs, build_tokens
from armor_recipes.checkpoint.files import read_config, read_header
from armor_recipes.evaluation import Reading, Room
from armor_recipes.evaluation.fidelity import likeness
from armor_recipes.evaluation.intervals import bootstrap, wilson
from armor_recipes.evaluation.multiple_choice import MultipleChoice
from armor_recipes.integrations.exporting import export_folder
from armor_recipes.integrations.models import open_model
from armor_recipes.integrations.oneshot import child
from armor_recipes.model.inputs import model_inputs
from armor_recipes.recipe.schema import ModelSpec, MultipleChoiceSpec
from armor_recipes.run.job import read_recipe

ALL = {"targets": "preset:all-linear"}
THEIRS = {"ignore": ["re:.*lm_head"]}
#: The row whose recipe gives the calibration of all that calibrate, and which rows with another core are made after.
BASE = "ARMOR"
OURS = "armor-recipes"


def core(bits: int, **weights: Any) -> dict[str, Any]:
    """Fields of `QuantizationModifier`: a core of integers, in the words of compressed-tensors."""
    return {"config_groups": {"core": {"weights": {"num_bits": bits, **weights}}}}


#: Fields of `QuantizationModifier`, and the columns that share a scale.
CORES: dict[str, tuple[dict[str, Any], int]] = {
    "ARMOR, int8 core": (core(8, strategy="channel"), 1),
    "ARMOR, W8A8": ({"scheme": "W8A8"}, 1),
    "ARMOR, int4 core of 64": (core(4, group_size=64), 64),
    "ARMOR, int4 core of 128": (core(4, group_size=128), 128),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What rows are made of: the model, recipes by row, and a Python with llm-compressor."""

    folder: Path
    recipes: Mapping[str, Path]
    python: str | None
    shapes: Mapping[str, tuple[int, int]]
    """Of all linear layers of the decoder layers, `(O, I)` by name."""

    def recipe(self, row: str) -> dict[str, Any]:
        """The row's recipe for this model, without what it evaluates; of a folder the one that wrote it."""
        given = self.recipes[row]
        text = (given / "recipe.yaml" if given.is_dir() else given).read_text(encoding="utf-8")
        found: dict[str, Any] = yaml.safe_load(text)
        found.pop("evaluation", None)
        return {**found, "model": str(self.folder)}

    def first_calibration(self) -> dict[str, Any]:
        """That of the first step of the recipe `ARMOR`."""
        recipe = self.recipe(BASE)
        (stage, *_) = (stage for key, stage in recipe.items() if key.endswith("_stage"))
        first = next(iter(next(iter(stage.values())).values()))
        return {**recipe["calibration"], **first.get("calibration", {})}


@dataclass(frozen=True, slots=True)
class Made:
    """A row's model in float32, the bytes of its linear layers and of all its tensors, and by what and how it was made."""

    model: Any
    weight_bytes: int
    model_bytes: int
    by: str
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make a model smaller. `make` gets an empty folder to work in.

    `group` are the columns that share a scale, `needs` the package it takes, and `llmcompressor` says that it takes that.
    """

    make: Callable[[Setting, Path], Made]
    group: int = 1
    needs: str | None = None
    llmcompressor: bool = False

    def reason(self, setting: Setting) -> str | None:
        """Why it cannot be run, if so."""
        cut = sorted({columns for _, columns in setting.shapes.values() if columns % self.group})
        if cut:
            return f"groups of {self.group} do not divide rows of {', '.join(map(str, cut))}"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"the package {self.needs} is not installed"
        return "no --llmcompressor was given" if self.llmcompressor and setting.python is None else None


def dense(setting: Setting, work: Path) -> Made:  # noqa: ARG001 - nothing is made
    """The model as it is."""
    return read(setting, setting.folder, by="", recipe=None)


def ours(fields: Callable[[Setting], dict[str, Any]], *, pack: bool = False) -> Callable[[Setting, Path], Made]:
    """A recipe of ours, all of it but model and output; `pack` for 2:4 weights, which it writes dense."""

    def make(setting: Setting, work: Path) -> Made:
        recipe = {**fields(setting), "model": str(setting.folder), "output": {"path": str(work / "made")}}
        armor_recipes.apply(recipe)
        gc.collect()
        return read(setting, packed(work) if pack else work / "made", by=OURS, recipe=recipe)

    return make


def one(kind: str, **options: Any) -> Callable[[Setting], dict[str, Any]]:
    """One modifier, calibrated as the recipe `ARMOR` is; `means` if means of its first step will do."""
    means = options.pop("means", False)

    def fields(setting: Setting) -> dict[str, Any]:
        calibration = setting.first_calibration() if means else setting.recipe(BASE)["calibration"]
        return {"calibration": calibration, "one_stage": {"one_modifiers": {kind: {**ALL, **options}}}}

    return fields


def armor(row: str) -> Callable[[Setting, Path], Made]:
    """The row's own recipe, or the recipe `ARMOR` and then a core of integers; what a folder holds is not made again."""

    def make(setting: Setting, work: Path) -> Made:
        own = setting.recipes.get(row)
        base, recipe = own or setting.recipes[BASE], setting.recipe(BASE if own is None else row)
        if own is None:
            fields = {**ALL, **CORES[row][0], "calibration": setting.first_calibration()}
            recipe["core_stage"] = {"core_modifiers": {"QuantizationModifier": fields}}
        if not base.is_dir():
            return ours(lambda _: recipe)(setting, work)
        if own is None:
            quantise(base, work / "made", CORES[row][0], setting.first_calibration())
        return read(setting, work / "made" if own is None else base, by=OURS, recipe=recipe)

    return make


def theirs(kind: str, *, pack: bool = False, **options: Any) -> Callable[[Setting, Path], Made]:
    """A modifier of llm-compressor, run by its own `oneshot`, on the windows that ours would have."""

    def make(setting: Setting, work: Path) -> Made:
        recipe = {"one_stage": {"one_modifiers": {kind: {**THEIRS, **options}}}}
        spec = read_recipe({**one("NoWagModifier")(setting), "model": str(setting.folder), "output": {"path": "x"}})
        (windows,) = {entry.config.calibration for entry in spec.modifiers}
        assert windows is not None
        tokenizer = AutoTokenizer.from_pretrained(setting.folder)
        ids = build_tokens(windows, tokenizer=tokenizer, vocab_size=len(tokenizer)).ids
        save_file({f"{n}.input_ids": row[None].clone() for n, row in enumerate(ids)}, work / "samples.safetensors")
        (work / "dense").symlink_to(setting.folder.resolve())
        (work / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        assert setting.python is not None
        done = subprocess.run(
            [setting.python, "-P", str(child.__file__), str(work)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"llm-compressor failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
        (work / "result").rename(work / "made")
        ask = "from importlib.metadata import version; print(version('llmcompressor'))"
        release = subprocess.run([setting.python, "-P", "-c", ask], capture_output=True, text=True, check=True).stdout
        recipe["calibration"] = windows.model_dump(mode="json")
        return read(
            setting, packed(work) if pack else work / "made", by=f"llm-compressor {release.strip()}", recipe=recipe
        )

    return make


def llama_cpp(form: str) -> Callable[[Setting, Path], Made]:
    """Weights rounded to a type of GGUF. The order of rows that a GGUF file has changes nothing: blocks lie in a row."""

    @torch.no_grad()
    def make(setting: Setting, work: Path) -> Made:  # noqa: ARG001 - nothing is written
        import gguf  # an optional neighbour's

        kind = gguf.GGMLQuantizationType[form]
        base = dense(setting, setting.folder)
        size = 0
        for name in setting.shapes:
            weight = base.model.get_submodule(name).weight
            stored = gguf.quants.quantize(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
            size += stored.nbytes
        rest = base.model_bytes - base.weight_bytes
        return Made(base.model, size, rest + size, f"gguf {version('gguf')}")

    return make


#: Symmetric integers, in the words of compressed-tensors: of 8 bits with a scale a row, of 4 bits with one for 64 columns.
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


ROWS: dict[str, Row] = {
    "dense": Row(dense),
    "SparseGPT 2:4": Row(
        theirs("SparseGPTModifier", pack=True, targets=["Linear"], sparsity=0.5, mask_structure="2:4"),
        llmcompressor=True,
    ),
    "Wanda 2:4": Row(ours(one("WandaPruningModifier", pattern="2:4", means=True), pack=True)),
    "NoWag-P 2:4": Row(ours(one("NoWagModifier", means=True), pack=True)),
    "int8 by channel": Row(ours(one("QuantizationModifier", config_groups={"linear": {"weights": INT8}}))),
    "int4 of 64, RTN": Row(ours(one("QuantizationModifier", config_groups={"linear": {"weights": INT4}})), group=64),
    "int4 of 64, GPTQ": Row(
        theirs("GPTQModifier", config_groups={"linear": {"targets": ["Linear"], "weights": INT4}}),
        group=64,
        llmcompressor=True,
    ),
    "int4 of 128, RTN": Row(ours(one("QuantizationModifier", scheme="W4A16")), group=128),
    "int4 of 128, GPTQ": Row(theirs("GPTQModifier", targets=["Linear"], scheme="W4A16"), group=128, llmcompressor=True),
    "Q8_0": Row(llama_cpp("Q8_0"), group=32, needs="gguf"),
    "Q4_0": Row(llama_cpp("Q4_0"), group=32, needs="gguf"),
    BASE: Row(armor(BASE)),
    **{name: Row(armor(name), group=group) for name, (_, group) in CORES.items()},
}


def packed(work: Path) -> Path:
    """`work/made`, whose weights are 2:4, with these as values and masks."""
    export_folder(work / "made", work / "packed", to="armor")
    return work / "packed"


def read(setting: Setting, folder: Path, *, by: str, recipe: Mapping[str, Any] | None) -> Made:
    """A folder in float32, by any loader that reads it, and its bytes."""
    sizes = {name: info.nbytes for name, info in read_header(folder).items()}
    own = sum(size for name, size in sizes.items() if name.startswith(tuple(f"{each}." for each in setting.shapes)))
    if "quantization_config" in read_config(folder):
        model: Any = armor_recipes.load(folder, backend=backend_of(folder), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = None if recipe is None else {key: value for key, value in recipe.items() if key not in ("model", "output")}
    return Made(model.eval(), own, sum(sizes.values()), by, kept)


def logits_of(model: nn.Module, window: Tensor) -> Tensor:
    """Of one window `(L,)`: `(L, V)`."""
    found: Tensor = model(input_ids=window[None], use_cache=False).logits[0]
    return found


@dataclass(frozen=True, slots=True)
class Kept:
    """The dense model's logits of windows, computed once and kept in files in `folder` for the rows after."""

    model: nn.Module
    folder: Path

    def __call__(self, window: Tensor) -> Tensor:
        """Of one window `(L,)`: `(L, V)` in float32."""
        file = self.folder / hashlib.sha256(window.numpy().tobytes()).hexdigest()
        if not file.exists():
            save_file({"logits": logits_of(self.model, window).contiguous()}, file)
        return load_file(file)["logits"]


@torch.inference_mode()
def side_by_side(model: nn.Module, dense_logits: Callable[[Tensor], Tensor], ids: Tensor) -> dict[str, list[float]]:
    """Of each window of `ids` `(N, L)` the loss in nats a token, the mean divergence from the dense model, and the agreement."""
    found: dict[str, list[float]] = {"loss": [], "kl_divergence": [], "top1_agreement": []}
    for window in ids:
        y, x = dense_logits(window), logits_of(model, window)
        losses = functional.cross_entropy(x[:-1].float(), window[1:], reduction="none").double()
        near = likeness(y, x, logits=True)
        for figures, value in zip(found.values(), (losses.mean(), near.divergence, near.agreement), strict=True):
            assert value is not None
            figures.append(float(value))
    return found


@dataclass(frozen=True, slots=True)
class Data:
    """What rows are measured on: windows `(N, L)` by text, and passages. `identity` is the same for rows that compare."""

    texts: Mapping[str, Tensor]
    passages: MultipleChoice
    identity: Mapping[str, Any]


def run_row(name: str, setting: Setting, base: Kept, data: Data) -> dict[str, Any]:
    """Make the row's model, measure it, and throw it away."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        made = ROWS[name].make(setting, Path(place))
        ready = time.perf_counter()
        texts = {text: side_by_side(made.model, base, ids) for text, ids in data.texts.items()}
        choice = data.passages.after(made.model, Room(Path(place)))
    return {
        "row": name,
        "by": made.by,
        "recipe": made.recipe,
        "data": data.identity,
        "weight_bytes": made.weight_bytes,
        "model_bytes": made.model_bytes,
        "texts": {text: {key: rounded(values) for key, values in found.items()} for text, found in texts.items()},
        "hits": "".join(str(int(hit)) for hit in choice.rows["accuracy"]),
        "seconds": {"made": round(ready - began), "measured": round(time.perf_counter() - ready)},
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }


def rounded(values: Sequence[float]) -> list[float]:
    """To seven digits, which is what float32 has."""
    return [float(f"{value:.7g}") for value in values]


def table(rows: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    """Figures of all rows with their intervals as text; null for what was not run, and `note` why."""
    texts = list(rows["dense"]["texts"])
    return [figures(name, rows[name], rows["dense"]) if name in rows else absent(name, setting, texts) for name in ROWS]


def absent(name: str, setting: Setting, texts: Sequence[str]) -> dict[str, Any]:
    """A row that has not been run, with nulls for figures."""
    empty = dict.fromkeys(("perplexity", "ratio", "kl_divergence", "top1_agreement"))
    note = ROWS[name].reason(setting) or "not run yet"
    keys = ("weight_bytes", "weight_share", "model_bytes", "accuracy", "accuracy_lost")
    return {"name": name, "by": None, "note": note, **dict.fromkeys(keys), **dict.fromkeys(texts, empty)}


def figures(name: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """A row's figures."""
    own, other = (np.array([float(hit) for hit in each["hits"]]) for each in (row, base))
    is_base = name == "dense"
    return {
        "name": name,
        "by": row["by"],
        "note": None,
        "weight_bytes": row["weight_bytes"],
        "weight_share": row["weight_bytes"] / base["weight_bytes"],
        "model_bytes": row["model_bytes"],
        "accuracy": told(own.mean(), wilson(int(own.sum()), len(own)), ".3f"),
        "accuracy_lost": None if is_base else told((other - own).mean(), bootstrap(other - own), ".3f"),
        **{text: of_text(found, None if is_base else base["texts"][text]) for text, found in row["texts"].items()},
    }


def of_text(found: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]] | None) -> dict[str, str | None]:
    """What a row does on one text; compared with the dense row's windows unless it is that."""
    loss, *likenesses = (np.array(found[key]) for key in ("loss", "kl_divergence", "top1_agreement"))
    cells: dict[str, str | None] = {"perplexity": exp_told(loss)}
    if base is None:
        return {**cells, **dict.fromkeys(("ratio", "kl_divergence", "top1_agreement"))}
    kl, agreement = likenesses
    return {
        **cells,
        "ratio": exp_told(loss - np.array(base["loss"]), ".3f"),
        "kl_divergence": told(kl.mean(), bootstrap(kl), ".5f"),
        "top1_agreement": told(agreement.mean(), bootstrap(agreement), ".3f"),
    }


def exp_told(values: Any, form: str = ".2f") -> str:
    """The mean's exponential, with its interval."""
    spread = bootstrap(values)
    return told(np.exp(values.mean()), None if spread is None else tuple(np.exp(spread)), form)


def told(value: float, spread: tuple[float, float] | None, form: str) -> str:
    """`39.39 [38.10, 40.70]`."""
    return format(value, form) + ("" if spread is None else f" [{spread[0]:{form}}, {spread[1]:{form}}]")


def given(model: str, recipes: Sequence[str], python: str | None) -> tuple[Setting, nn.Module]:
    """The model's folder with what makes rows of it, and the dense model in float32. Raises ValueError for an unknown row."""
    split = (each.rsplit("=", 1) for each in recipes)
    named = {BASE: Path("recipes/quickstart.yaml")} | {row: Path(path) for row, path in split}
    if not named.keys() <= {BASE, *CORES}:
        raise ValueError(f"--recipe is of {', '.join((BASE, *CORES))}; got {', '.join(named)}")
    folder = Path(str(open_model(ModelSpec(id=model), device=torch.device("cpu")).folder or model))
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items() if m is not base.get_output_embeddings()}
    return Setting(folder, named, python, shapes), base


def data_of(setting: Setting, base: nn.Module, texts: Sequence[str], windows: int, length: int, passages: int) -> Data:
    """Windows and passages."""
    read_windows = read_texts(texts, setting.folder, windows=windows, length=length)
    inputs = model_inputs(base)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    reading = Reading(tokenizer, inputs, lambda spec: build_inputs(spec, inputs, tokenizer=tokenizer))
    choice = MultipleChoice.read(MultipleChoiceSpec(dataset="builtin:continuations", samples=passages), reading)
    hashes = {name: hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16] for name, ids in read_windows.items()}
    shape = {name: list(ids.shape) for name, ids in read_windows.items()}
    return Data(read_windows, choice, {"windows": shape, "sha256": {**hashes, "continuations": choice.sha256[:16]}})


def main() -> None:
    """Run the rows that are missing, then write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:stdlib-llama")
    parser.add_argument("--recipe", action="append", default=[], metavar="ROW=FILE", help="that a row of ours runs")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="a Python that has llm-compressor")
    parser.add_argument("--text", action="append", metavar="NAME=PATH", help="left out, builtin:pydoc-heldout")
    parser.add_argument("--windows", type=int, default=200, help="of each text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--rows", help="names, separated by semicolons; left out, all")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/neighbours"))
    options = parser.parse_args()
    wanted = list(ROWS) if options.rows is None else options.rows.split(";")
    if not ROWS.keys() >= set(wanted):
        parser.error(f"unknown rows in {options.rows!r}; rows are: {'; '.join(ROWS)}")
    setting, base = given(options.model, options.recipe, options.llmcompressor)
    texts = options.text or ["pydoc=builtin:pydoc-heldout"]
    data = data_of(setting, base, texts, options.windows, options.length, options.passages)
    folder = options.results / Path(options.model.replace(":", "-")).name
    folder.mkdir(parents=True, exist_ok=True)
    rows = {r["row"]: r for r in (json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json"))}
    others = sorted(name for name, row in rows.items() if row["data"] != data.identity)
    if others:
        parser.error(f"{folder} has rows of other windows or passages, which do not compare: {'; '.join(others)}")
    with tempfile.TemporaryDirectory() as place:
        for name in wanted:
            reason = ROWS[name].reason(setting)
            if name not in rows and reason is not None:
                print(f"{name}: not run, {reason}", flush=True)
            elif name not in rows:
                print(f"{name} …", flush=True)
                rows[name] = run_row(name, setting, Kept(base, Path(place)), data)
                file = folder / f"{name.replace(',', '').replace(':', '-').replace(' ', '-')}.json"
                file.write_text(json.dumps(rows[name]) + "\n", encoding="utf-8")
            if "dense" in rows:
                found = {"model": options.model, "data": data.identity, "rows": table(rows, setting)}
                folder.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
