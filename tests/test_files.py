"""Files are whole or as they were, and nothing is left beside them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from metafocus.errors import DataError
from metafocus.files import (
    finite,
    read_tensors,
    replaced,
    write_json,
    write_json_lines,
    write_tensors,
    write_whole,
)


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_text_is_written_and_replaced(tmp_path):
    for text in ("first", "second, with a ü"):
        write_whole(tmp_path / "note.txt", text)
        assert (tmp_path / "note.txt").read_text(encoding="utf-8") == text
    write_whole(str(tmp_path / "note.txt"), "by a string")
    assert names(tmp_path) == ["note.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_there_survives_an_interrupted_write(tmp_path, error):
    path = tmp_path / "note.txt"
    write_whole(path, "before")
    with pytest.raises(error), replaced(path) as part:
        part.write_text("hal")
        raise error
    assert path.read_text() == "before"
    assert names(tmp_path) == ["note.txt"]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    (tmp_path / "note.txt").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "note.txt", "text")
    assert names(tmp_path) == ["note.txt"]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, math.nan], "y": {"z": math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, None], "y": {"z": None}}
    assert finite((1, "a", True, None)) == [1, "a", True, None]


def test_json_lines_are_all_there_or_none(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ({"i": i} for i in range(2)))
    assert (tmp_path / "a.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'
    with pytest.raises(TypeError):
        write_json_lines(tmp_path / "a.jsonl", iter([{"i": 3}, {"i": object()}]))
    assert (tmp_path / "a.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'
    assert names(tmp_path) == ["a.jsonl"]


def test_tensors_come_back_and_a_damaged_file_says_so(tmp_path):
    path = tmp_path / "deep" / "w.safetensors"
    write_tensors(path, {"w": torch.arange(3.0)})
    assert read_tensors(path)["w"].tolist() == [0.0, 1.0, 2.0]
    assert names(path.parent) == ["w.safetensors"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="cut off"):
        read_tensors(path)
    with pytest.raises(DataError, match="is missing"):
        read_tensors(tmp_path / "none")
    with pytest.raises(DataError, match="could not be written"):
        write_tensors(path / "below_a_file", {})
