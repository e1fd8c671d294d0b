"""Tokenizers both ways: a Hugging Face folder to GGUF metadata, and GGUF metadata to a folder.

Three kinds, each in a module of its own: byte-level BPE (GGUF model 'gpt2'), SentencePiece BPE with byte
fallback ('llama') and SentencePiece unigram without it ('t5').
"""

from __future__ import annotations

from edgeprune.tokenizer import byte_level
from edgeprune.tokenizer.base import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from edgeprune.tokenizer.to_gguf import kvs_from_hf
from edgeprune.tokenizer.to_hf import write_hf
from edgeprune.tokenizer.use import encode, load

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "encode",
    "kvs_from_hf",
    "load",
    "write_hf",
]

_LLAMA3, _QWEN2 = byte_level.LLAMA3, byte_level.QWEN2  # what tests train tokenizers with
