"""Tokenizers of bytes."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.support.tokenizers import byte_tokenizer


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
