"""Perplexity as the usual scripts of pruning and quantisation papers measure it, to the digit.

One text, tokenised once with the special tokens that the tokenizer puts around it; windows of 2,048 tokens without overlap; exp of
the mean of their mean losses. What differs between the two is the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_USUAL: Mapping[str, Any] = {"sequence_length": 2048, "bos": "once"}

#: Keys of `evaluation.perplexity` by the name of the preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "wikitext2": {**_USUAL, "dataset": "Salesforce/wikitext:wikitext-2-raw-v1", "split": "test", "separator": "\n\n"},
    "c4": {
        **_USUAL,
        "dataset": "allenai/c4:en",
        "split": "validation[:1100]",
        "rows": 1100,
        "separator": " ",
        "windows": {"at_most": 256},
    },
}
