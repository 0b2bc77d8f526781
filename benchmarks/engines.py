"""One measurement of one engine in a process of its own: `python engines.py SPEC.json`, as `benchmarks/rivals.py` calls it.

SPEC names the engine, its model (`path`), `form` and `threads`, and `jobs`: prompts of token ids, all of one length, and how many
tokens follow each. The answer, JSON in the file `output`: for each job the tokens, the seconds to the first and from there to
the last; and the memory that the process had after its imports. `native/llama_cpp.mjs` does the same for llama.cpp.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from runtime import Contender, memory_of
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from armor_recipes.runtime import auto

Generated = dict[str, Any]
"""`tokens` by prompt, `first` and `rest` in seconds."""


class Engine(Protocol):
    """A model that is loaded. `info` is what a reader should know of how it ran."""

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> Generated:
        """The most likely next tokens, `new` of them, of each prompt."""

    def info(self) -> dict[str, Any]:
        """Versions and choices."""


def greedily(step: Callable[[Any], Any], ids: Any, new: int) -> Generated:
    """Times of a step that takes `(batch, n)` ids and returns the next tokens `(batch, 1)`."""
    marks, found = [time.perf_counter()], []
    for _ in range(new):
        ids = step(ids)
        found.append(ids)
        marks.append(time.perf_counter())
    tokens = [list(one) for one in zip(*(step.reshape(-1).tolist() for step in found), strict=True)]
    return {"tokens": tokens, "first": marks[1] - marks[0], "rest": marks[-1] - marks[1]}


class Torch:
    """Transformers' model, dense or with our layers, in the dtypes in which it is stored."""

    def __init__(self, path: Path, threads: int, *, backend: str | None) -> None:
        torch.set_num_threads(threads)
        self._model = Contender(path, backend).load()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> Generated:
        """See `Engine`."""
        cache = DynamicCache(config=self._model.config)

        def step(ids: Tensor) -> Tensor:
            # By position: transformers 5.24 has another name for the cache.
            logits: Tensor = self._model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1)

        return greedily(step, torch.tensor(prompts), new)

    def info(self) -> dict[str, Any]:
        """See `Engine`; what `auto` took by the most tokens of a class."""
        found: dict[int, set[str]] = {}
        for situation, choice in auto.choices().items():
            found.setdefault(situation.tokens, set()).add(choice)
        choices = "; ".join(f"{tokens}: {'/'.join(sorted(names))}" for tokens, names in sorted(found.items()))
        return {"version": f"torch {torch.__version__}", "auto": choices}


def write_ctranslate2(dense: Path, folder: Path, form: str) -> None:
    """Write the Llama folder `dense` into the existing empty folder `folder`, by CTranslate2's own loader of Llamas."""
    from ctranslate2.converters import transformers as converters  # an optional rival

    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    spec = converters._MODEL_LOADERS[type(model.config).__name__].get_model_spec(
        model
    )  # its converter wants a tokenizer
    spec.register_vocabulary([word(token) for token in range(model.config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = word(0)
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps
    spec.validate()
    spec.optimize(quantization=form)
    spec.save(str(folder))


def word(token: int) -> str:
    """What stands for an id in CTranslate2, whose prompts are words."""
    return f"t{token}"


class CTranslate2:
    """Its `Generator`; times come from its own callback, once a token."""

    def __init__(self, path: Path, form: str, threads: int) -> None:
        import ctranslate2  # an optional rival

        self._version = ctranslate2.__version__
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> Generated:
        """See `Engine`."""
        marks: dict[int, float] = {}

        def on_token(result: Any) -> bool:
            marks[result.step] = time.perf_counter()  # that of the step's last sequence stands
            return False  # goes on

        start = time.perf_counter()
        results = self._generator.generate_batch(
            [[word(token) for token in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            callback=on_token,
        )
        tokens = [result.sequences_ids[0] for result in results]
        return {"tokens": tokens, "first": marks[0] - start, "rest": marks[new - 1] - marks[0]}

    def info(self) -> dict[str, Any]:
        """See `Engine`."""
        return {"version": f"ctranslate2 {self._version}", "compute_type": self._generator.compute_type}


class OpenVINO:
    """The CPU plug-in with its defaults for latency."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino  # an optional rival
        from openvino_models import FILE

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._version = openvino.__version__
        self._compiled = openvino.Core().compile_model(path / FILE, "CPU", options)
        self._request = self._compiled.create_infer_request()

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> Generated:
        """See `Engine`."""
        self._request.reset_state()
        beams = np.arange(len(prompts))

        def step(ids: NDArray[Any]) -> NDArray[Any]:
            logits = self._request.infer({"ids": ids, "beams": beams}, share_outputs=True)[0]
            found: NDArray[Any] = np.argmax(logits, axis=-1, keepdims=True)
            return found

        return greedily(step, np.array(prompts), new)

    def info(self) -> dict[str, Any]:
        """See `Engine`; in which precision it computes, and whether its attention is one operation."""
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        nodes = self._compiled.get_runtime_model().get_ops()
        fused = not any(node.get_rt_info()["layerType"].astype(str) == "Softmax" for node in nodes)
        found = {name: self._compiled.get_property(name) for name in names}
        return {
            "version": f"openvino {self._version}",
            **{name: getattr(value, "to_string", value.__str__)() for name, value in found.items()},
            "attention": "fused" if fused else "in parts",
        }


def load(engine: str, path: Path, form: str, threads: int) -> Engine:
    """The engine with its model."""
    match engine:
        case "transformers":
            return Torch(path, threads, backend=None)
        case "ARMOR" | "plain 2:4" | "dense by our kernels":
            return Torch(path, threads, backend="auto")
        case "CTranslate2":
            return CTranslate2(path, form, threads)
        case "OpenVINO":
            return OpenVINO(path, threads)
    raise ValueError(f"no engine {engine!r}")


def main() -> None:
    """Do what the file named says."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    base = memory_of("self")
    engine = load(spec["engine"], Path(spec["path"]), spec["form"], spec["threads"])
    jobs = [engine.generate(job["prompts"], job["new"]) for job in spec["jobs"]]
    Path(spec["output"]).write_text(json.dumps({"base": base, "jobs": jobs, "info": engine.info()}), encoding="utf-8")


if __name__ == "__main__":
    main()
