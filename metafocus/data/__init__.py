"""From a file of chats to samples and batches: read, encode, collate, pack.

A file holds one record per line or row: `messages`, in the form for chat models, and optionally
`tools`. A sample is a dict of 1-D tensors, and a batch has the same names with tensors `[B, S]`.
"""

from __future__ import annotations

from metafocus.data.batches import Collator, collate, pack
from metafocus.data.chat import Sample, encode_chat
from metafocus.data.encoding import Encoded, encode_chats
from metafocus.data.reading import read_chats
from metafocus.data.tokenizer import train_tokenizer

__all__ = [
    "Collator",
    "Encoded",
    "Sample",
    "collate",
    "encode_chat",
    "encode_chats",
    "pack",
    "read_chats",
    "train_tokenizer",
]
