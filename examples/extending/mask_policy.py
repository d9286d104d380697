"""A mask policy of your own: context sees a window to both sides, answers see everything before.

A mask policy is any function `batch -> Spans`. It gives each token one interval of keys,
`start <= k < stop`. Begin with a policy of the library, which handles padding and packed documents,
and narrow it with `&`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import metafocus as mf


@dataclass(frozen=True)
class LocalContext:
    """`context_bidirectional`, but context tokens see at most `width` tokens to each side."""

    width: int

    def __call__(self, batch):
        answer = batch["answer_mask"].bool()
        length = answer.shape[-1]
        token = torch.arange(length, device=answer.device).expand(answer.shape)
        start = torch.where(answer, 0, (token - self.width).clamp(min=0))
        stop = torch.where(answer, length, (token + self.width + 1).clamp(max=length))
        return mf.masks.context_bidirectional(batch) & mf.Spans(start, stop)


def main() -> torch.Tensor:
    batch = {
        "input_ids": torch.zeros(1, 10, dtype=torch.long),
        "answer_mask": torch.tensor([[False] * 7 + [True] * 3]),
        "turn_ids": torch.tensor([[0] * 7 + [1] * 3]),
    }
    seen = LocalContext(2)(batch).dense()[0, 0]
    for row in seen:
        print(" ".join("x" if key else "." for key in row))
    return seen


if __name__ == "__main__":
    main()
