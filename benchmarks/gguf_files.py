"""GGUF files of Llama models for llama.cpp, written with the package `gguf`.

Matrices are converted as llama.cpp's own converter does: rows of q and k are put in the order of its rotary embedding. The
tokenizer is a made-up one: benchmarks feed token ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

FORMS = ("BF16", "Q8_0", "Q4_0")
BYTE_TOKENS = 256


def write_gguf(dense: Path, file: Path, form: str) -> None:
    """Write the Llama folder `dense` as one GGUF file; vectors are float32.

    Args:
        dense: a folder that transformers loads as `LlamaForCausalLM`.
        file: is put in place once it is whole.
        form: of FORMS, of all matrices. In a Q4_0 file the head is Q8_0, the nearest that the package writes to what
            `llama-quantize` takes there (Q6_K).

    Raises:
        ValueError: for another class of model, or scaled rotary embeddings.
    """
    import gguf  # an optional rival's

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    config = model.config
    rope = config.rope_parameters
    if config.model_type != "llama" or rope["rope_type"] != "default":
        raise ValueError(
            f"{dense} is no plain Llama: model_type {config.model_type!r}, rope_type {rope['rope_type']!r}"
        )
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        whole = Path(place) / file.name
        writer = gguf.GGUFWriter(whole, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
        _add_tokenizer(writer, config.vocab_size)
        for name, weight, kind in _tensors(model, gguf.GGMLQuantizationType[form]):
            data = gguf.quants.quantize(weight.float().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        whole.replace(file)


def rotary_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k `(heads · d, d_in)`: of each head the halves that transformers rotates together become neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tensors(model: Any, form: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """Names in GGUF, weights and types; of tied embeddings there is one, which serves as head."""
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight",))
        if stored is None:
            raise ValueError(f"GGUF has no name for {name!r} of a Llama")
        rotated = next((count for ending, count in heads.items() if name.endswith(ending)), None)
        if weight.dim() == 1:
            kind = kinds.F32
        else:
            kind = kinds.Q8_0 if stored == head and form == kinds.Q4_0 else form
        yield stored, rotary_rows(weight, rotated) if rotated else weight, kind


def _add_tokenizer(writer: Any, vocabulary: int) -> None:
    """A word for each id: three that are special, the bytes as far as they fit, and made-up ones."""
    from gguf import TokenType

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS))]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * BYTE_TOKENS]
    more = max(0, vocabulary - len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*words, *(f"word{i}" for i in range(more))][:vocabulary])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * more][:vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
