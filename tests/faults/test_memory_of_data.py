"""Data beyond memory: what is read and encoded lies in a file, and memory does not grow with it."""

from __future__ import annotations

import gc
import pickle

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import chat, settings, write, written
from trainer_script import SAMPLES

from metafocus.cli.train import main
from metafocus.data import encode_chats, pack, read_chats, spool
from metafocus.data.batches import Packed
from metafocus.data.spool import Spool, View
from metafocus.data.tokenizer import train_tokenizer
from metafocus.trainer.fingerprint import digest

MIB = 2**20


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / MIB


def long(i: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(i, i + 512) % 1000
    return {"input_ids": ids, "turn_ids": ids // 500, "answer_mask": ids > 900}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """8,000 samples are 66 MiB as tensors; the slack is that of the allocator."""
    before = resident()
    made = spool.samples(tmp_path).extend(map(long, range(8000)))
    assert made._ends[-1] > 30 * MIB
    loader = torch.utils.data.DataLoader(made, batch_size=None, shuffle=True)
    assert sum(1 for _ in loader) == 8000
    assert resident() - before < 12
    assert same(made[4321], long(4321)) and same(made[-1], long(7999))
    assert not list(tmp_path.iterdir())


def test_chats_come_back_as_they_were(tmp_path):
    path = write(tmp_path / "chats.jsonl", *[chat(i, 1 + i % 3) for i in range(30)])
    kept = read_chats(path, gather=lambda rows: spool.records(tmp_path).extend(rows))
    assert list(kept) == list(read_chats(path)) and isinstance(kept, Spool)
    assert list(kept[5:9]) == list(kept)[5:9]
    assert list(View(kept, [3, 1])[:1]) == [kept[3]]
    pq.write_table(pa.Table.from_pylist(list(kept)), tmp_path / "chats.parquet", row_group_size=7)
    assert read_chats(tmp_path / "chats.parquet") == list(kept)


def test_samples_come_back_as_they_were():
    chats = [chat(i, 1 + i % 3) for i in range(30)]
    tokenizer = train_tokenizer(str(chat(i)) for i in range(9))
    expected = encode_chats(chats, tokenizer, max_length=64)
    found = encode_chats(chats, tokenizer, max_length=64, into=spool.samples())
    assert found.summary() == expected.summary()
    assert all(map(same, found.samples, expected.samples))
    rows, packed = pack(expected.samples, 128), Packed(found.samples, 128)
    assert len(rows) == len(packed) < 30 and all(map(same, rows, packed))
    assert digest(found.samples)["hash"] != digest(View(found.samples, range(29)))["hash"]
    assert digest(packed)["hash"] != digest(Packed(found.samples, 256))["hash"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_file(method):
    kept = spool.samples().extend(SAMPLES)
    if method == "fork":
        loader = torch.utils.data.DataLoader(kept, batch_size=None, num_workers=2)
        assert all(map(same, loader, SAMPLES))
        return
    # What a process that is not forked receives.
    copy = pickle.loads(pickle.dumps(kept))
    assert all(map(same, copy, SAMPLES)) and len(copy) == len(SAMPLES)


def test_the_command_keeps_nothing_in_memory(tmp_path):
    run = main([written(tmp_path, settings(tmp_path, max_steps=1))])
    assert isinstance(run.train_dataset, Spool) and isinstance(run.eval_dataset, Spool)
    packed = main([written(tmp_path, settings(tmp_path, max_steps=1, packing=True,
                                              overwrite_output_dir=True))])  # fmt: skip
    assert isinstance(packed.train_dataset, Packed)
