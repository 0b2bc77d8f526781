"""A byte-level tokenizer made in memory: one id a byte, in the order of the byte alphabet, and an end-of-text token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

END = "<end>"


def byte_tokenizer(*, end: bool = True) -> PreTrainedTokenizerFast:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = {"eos_token": END} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=16, **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_without_end() -> PreTrainedTokenizerFast:
    return byte_tokenizer(end=False)


@pytest.fixture
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that puts `<bos>` before every text by itself, as Llama's and Gemma's do."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
    )
    return made
