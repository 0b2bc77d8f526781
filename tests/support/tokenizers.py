"""A byte-level tokenizer made in memory: one id a byte, in the order of the byte alphabet, and an end-of-text token."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def byte_tokenizer(*, end: bool = True) -> PreTrainedTokenizerFast:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = {"eos_token": END} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=16, **special)
