"""Serve folders by vLLM, one after the other, in a process of its own: `python serve_tokens.py JOB`, JOB as JSON.

For each folder it prints `RESULT ` and JSON: the greedy tokens for each prompt and the quantisation that vLLM chose, or the error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

PROMPTS = [[(7 * i + j) % 96 for j in range(length)] for i, length in enumerate((3, 9, 20))]
NEW_TOKENS = 16


def main(job: dict[str, Any]) -> None:
    """Print the results of a job: `folders`, `tensor_parallel`, `dtype`, `eager`."""
    # The engine in this process, so that its errors arrive here; threads unbound, for machines of two cores.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
    for folder in job["folders"]:
        try:
            llm = LLM(
                folder,
                tensor_parallel_size=job["tensor_parallel"],
                dtype=job["dtype"],
                enforce_eager=job["eager"],
                skip_tokenizer_init=True,
                max_model_len=64,
                max_num_seqs=4,
                kv_cache_memory_bytes=1 << 27,
            )
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            result = {"tokens": tokens, "quantization": llm.llm_engine.model_config.quantization}
            del llm, outputs
        except Exception as error:  # whatever a server says of a folder that it cannot serve
            result = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
