"""Makes batches of samples: padding and packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafocus.checks import whole
from metafocus.data.chat import Sample
from metafocus.errors import DataError

# The values at positions of padding.
_PADDING = {"turn_ids": -1, "document_ids": -1, "answer_mask": False, "needle_mask": False}


def collate(
    samples: Sequence[Sample],
    *,
    pad_token_id: int,
    side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Pad samples to one length and stack them to the batch for all losses and masks, `[B, S]`.

    `attention_mask` is 1 on tokens and 0 on padding. `turn_ids` and `document_ids` are -1 on
    padding. The batch has `needle_mask` and `document_ids` if any sample has them; the other
    samples then have no evidence and document 0.

    Args:
        samples: the samples that `encode_chat` or `pack` returned.
        pad_token_id: `tokenizer.pad_token_id`.
        side: the side of the padding, "right" or "left".
        pad_to_multiple_of: rounds S up to a multiple of this number.

    Raises:
        DataError: if there are no samples or no pad token, if the side is unknown, or if the
            multiple is below 1.

    Example:
        >>> import torch
        >>> from metafocus.data import collate
        >>> sample = {"input_ids": torch.tensor([5, 6]), "turn_ids": torch.tensor([0, 1]),
        ...           "answer_mask": torch.tensor([False, True])}
        >>> collate([sample], pad_token_id=0, side="left", pad_to_multiple_of=4)["input_ids"]
        tensor([[0, 0, 5, 6]])
    """
    if not samples:
        raise DataError("samples is empty: pass at least one sample to collate")
    if side not in ("right", "left"):
        raise DataError(f"side={side!r} is unknown: pad on the 'right' or on the 'left'")
    if pad_token_id is None:
        raise DataError(
            "pad_token_id=None: set tokenizer.pad_token (to tokenizer.eos_token, say) and pass "
            "tokenizer.pad_token_id"
        )
    whole("pad_token_id", pad_token_id, error=DataError)
    if pad_to_multiple_of is not None:
        whole("pad_to_multiple_of", pad_to_multiple_of, 1, note=" or None", error=DataError)
    _check_samples(samples)

    length = max(len(sample["input_ids"]) for sample in samples)
    length = -(-length // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)

    def stack(rows: list[Tensor], filler: int) -> Tensor:
        out = rows[0].new_full((len(rows), length), filler)
        for row, values in zip(out, rows, strict=True):
            first = length - len(values) if side == "left" else 0
            row[first : first + len(values)] = values
        return out

    ids = [sample["input_ids"] for sample in samples]
    batch = {
        "input_ids": stack(ids, pad_token_id),
        "attention_mask": stack([torch.ones_like(row) for row in ids], 0),
    }
    for name, filler in _PADDING.items():
        if name in ("turn_ids", "answer_mask") or any(name in sample for sample in samples):
            batch[name] = stack([_column(sample, name) for sample in samples], filler)
    return batch


def _check_samples(samples: Sequence[Sample]) -> None:
    """Raise for a sample whose entries are missing, not tensors, or of different lengths.

    A shorter tensor would be taken for padded, and an empty batch would fail inside the model.
    """
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise DataError(f"sample {i} is a {type(sample).__name__}: pass a list of dicts")
        for name in ("input_ids", "turn_ids", "answer_mask"):
            if name not in sample:
                raise DataError(
                    f"sample {i} has no {name}, only {', '.join(sample)}: encode_chat makes all"
                )
        size = None
        for name in ("input_ids", *_PADDING):
            value = sample.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.ndim != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise DataError(f"sample {i}: {name} is {shape}, not a tensor of one dimension")
            size = len(value) if size is None else size
            if len(value) != size or size == 0:
                raise DataError(
                    f"sample {i}: {name} has {len(value)} entries for {size} tokens: give one for "
                    "each of at least one token"
                )


def _column(sample: Sample, name: str) -> Tensor:
    if name in sample or name in ("turn_ids", "answer_mask"):
        return sample[name]
    dtype = torch.bool if name == "needle_mask" else torch.int64
    return torch.zeros(len(sample["input_ids"]), dtype=dtype)


@dataclass(frozen=True)
class Collator:
    """`collate` with fixed settings: a `collate_fn` for a data loader, which can be pickled.

    Args:
        pad_token_id: `tokenizer.pad_token_id`.
        side: the side of the padding, "right" or "left".
        pad_to_multiple_of: rounds S up to a multiple of this number.

    Example:
        >>> import torch
        >>> sample = {"input_ids": torch.tensor([5, 6]), "turn_ids": torch.tensor([0, 1]),
        ...           "answer_mask": torch.tensor([False, True])}
        >>> Collator(pad_token_id=0)([sample])["attention_mask"]
        tensor([[1, 1]])
    """

    pad_token_id: int
    side: str = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples into a batch."""
        return collate(
            samples,
            pad_token_id=self.pad_token_id,
            side=self.side,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


def pack(samples: Sequence[Sample], length: int) -> list[Sample]:
    """Join samples into rows of at most `length` tokens.

    Each sample goes into the first row with enough space. A row holds its samples one after
    another and unchanged. `document_ids` [S] counts them from 0, so that masks and losses keep
    them separate.

    Raises:
        DataError: if a sample is longer than `length`.

    Example:
        >>> import torch
        >>> from metafocus.data import pack
        >>> sample = {"input_ids": torch.tensor([5, 6]), "turn_ids": torch.tensor([0, 1]),
        ...           "answer_mask": torch.tensor([False, True])}
        >>> [row["document_ids"].tolist() for row in pack([sample] * 3, 5)]
        [[0, 0, 1, 1], [0, 0]]
    """
    return [_join([samples[i] for i in row]) for row in _rows(samples, length)]


class Packed(Sequence[Sample]):
    """The rows that `pack` makes, each of them joined when it is asked for.

    Args:
        samples: a sequence, which may lie on a disk.
        length: most tokens of a row.

    Raises:
        DataError: if a sample is longer than `length`.

    Example:
        >>> import torch
        >>> sample = {"input_ids": torch.tensor([5, 6]), "turn_ids": torch.tensor([0, 1]),
        ...           "answer_mask": torch.tensor([False, True])}
        >>> len(Packed([sample] * 3, 5)), Packed([sample] * 3, 5)[1]["document_ids"].tolist()
        (2, [0, 0])
    """

    def __init__(self, samples: Sequence[Sample], length: int):
        self._samples, self._length = samples, length
        self._rows = _rows(samples, length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or a list of rows."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return _join([self._samples[i] for i in self._rows[index]])

    def digest(self) -> str:
        """Return a hash of all rows, from that of samples which have one."""
        samples: Any = self._samples
        return f"{samples.digest()} in rows of {self._length}"


def _rows(samples: Sequence[Sample], length: int) -> list[list[int]]:
    """Return the places of the samples of each row."""
    whole("length", length, 1, error=DataError)
    _check_samples(samples)
    sizes = [len(sample["input_ids"]) for sample in samples]
    for i, size in enumerate(sizes):
        if size > length:
            raise DataError(
                f"sample {i} has {size} tokens, more than length={length}: raise length, or encode "
                "with max_length=length"
            )
    rows: dict[int, list[int]] = {}
    for i, row in enumerate(_first_fit(sizes, length)):
        rows.setdefault(row, []).append(i)
    return [rows[row] for row in sorted(rows)]


def _first_fit(sizes: Sequence[int], length: int) -> list[int]:
    """Return the row of each size, the first one with space; a heap finds it in O(log n)."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [length] * (2 * leaves)
    chosen = []
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < size)
        chosen.append(node - leaves)
        room[node] -= size
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return chosen


def _join(samples: list[Sample]) -> Sample:
    names = [n for n in ("input_ids", *_PADDING) if any(n in sample for sample in samples)]
    row = {name: torch.cat([_column(sample, name) for sample in samples]) for name in names}
    documents, first = [], 0
    for sample in samples:
        documents.append(_column(sample, "document_ids") + first)
        first = int(documents[-1].max()) + 1 if len(documents[-1]) else first
    row["document_ids"] = torch.cat(documents)
    return row
