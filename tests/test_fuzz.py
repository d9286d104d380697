"""Bytes that nobody meant to write: only the library's own errors come out, in one line."""

from __future__ import annotations

import io
import json
import random
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metafocus.__main__ import main
from metafocus.data import encode_chats, read_chats
from metafocus.data.tokenizer import train_tokenizer
from metafocus.errors import DataError

TOKENIZER = train_tokenizer(["hello there"], 270)
CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hé \u2028 there", "evidence": [[0, 2]]},
        {"role": "assistant", "content": "yo", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
}
PIECES = [
    *(b"\xff\xfe", b"\x00", b"{", b"}", b"[", b"]", b'"', b"\\ud800", b"null", b"1e999", b"-"),
    *(b"\n", b"\r", b"messages", b"role", b"content", b"NaN", b"\xef\xbb\xbf", b": ", b", "),
    *(b"&a ", b"*a", b"!!python/object ", b"? ", b"- ", b"|", b"\t", b"<<: ", b"---\n"),
]


def fuzz(examples: int) -> Any:
    """The same examples at every run, and no clock."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@st.composite
def mutated(draw: Any, *seeds: bytes) -> bytes:
    """One of the seeds after a few cuts, repetitions, strange bytes and swaps."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = rng.randrange(len(data) + 1)
        to = min(at + rng.randrange(1, 24), len(data))
        match draw(st.integers(0, 5)):
            case 0:
                del data[at:to]
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                data[at:to] = rng.randbytes(to - at)
            case 3:
                data[at:at] = data[at:to] * 3
            case 4:
                del data[at:]
            case 5:
                data[at:to] = data[at:to][::-1]
    return bytes(data)


def use(path: Path) -> None:
    """Read and encode as training does."""
    records = read_chats(path)
    assert records and all(isinstance(record["messages"], list) for record in records)
    encode_chats(records, TOKENIZER)


def only_one_line(error: DataError, path: Path) -> None:
    assert type(error) is DataError, repr(error)
    assert len(str(error)) < 2000


LINES = "\n".join(json.dumps(CHAT, ensure_ascii=ascii) for ascii in (True, False)).encode()
INDENTED = json.dumps(CHAT, indent=1).encode()


@fuzz(400)
@given(mutated(LINES, INDENTED, LINES.decode().encode("utf-16"), b""))
def test_lines_of_json(tmp_path, content):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    try:
        use(path)
    except DataError as error:
        only_one_line(error, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "weight", "evidence", "tool_calls", "type", "text", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", 7, None]), "content": JSON},
    optional={"weight": JSON, "evidence": JSON, "tool_calls": JSON, "name": JSON},
)
RECORD = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON}, optional={"tools": JSON}
)


@fuzz(300)
@given(RECORD)
def test_records_of_every_shape(tmp_path, record):
    """Valid JSON, invalid chats: whatever the reader lets through, the encoder takes or refuses."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(CHAT))
    try:
        use(path)
    except DataError as error:
        only_one_line(error, path)


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([CHAT] * 3), file)
    return file.getvalue()


PARQUET = parquet()


@fuzz(150)
@given(mutated(PARQUET))
def test_bytes_of_parquet(tmp_path, content):
    path = tmp_path / "chats.parquet"
    path.write_bytes(content)
    try:
        use(path)
    except DataError as error:
        only_one_line(error, path)


COLUMN = st.sampled_from(
    [
        pa.array([1, 2]),
        pa.array(["a", None]),
        pa.array([b"\xff", b"\x00"]),
        pa.array([[1], []]),
        pa.array([[{"role": "user", "content": "a"}], None]),
        pa.array([[{"role": "assistant", "content": b"\xff"}], []]),
        pa.array([None, None]),
        pa.array([[None], [{"role": None, "content": 2.5}]]),
    ]
)


@fuzz(40)
@given(COLUMN, COLUMN)
def test_columns_of_every_type(tmp_path, messages, tools):
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"messages": messages, "tools": tools}), path)
    with pytest.raises(DataError) as caught:
        use(path)
    only_one_line(caught.value, path)


# --- configuration -----------------------------------------------------------------------------

YAML = b"""\
output_dir: run
use_cpu: true
report_to: none
train_file: none.jsonl
inner_steps: 2
inner_lr: 1.0
lora_modules: up_proj,down_proj
mask: causal
packing: false
learning_rate: 1e-5
per_device_train_batch_size: 2
"""


def trained(path: Path) -> tuple[int, str]:
    """What `metafocus train FILE` ends with. The data is never there, so nothing is trained."""
    error = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(error), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        status = main(["train", str(path)])
    return status, error.getvalue()


@fuzz(80)
@given(mutated(YAML, b"{}", b"- a\n- b\n"))
def test_configuration_files(tmp_path, monkeypatch, content):
    # Without data a mutation could start a run on the standard library's documentation.
    monkeypatch.setattr(
        "metafocus.data.stdlib_qa.texts", lambda: (_ for _ in ()).throw(DataError("no data"))
    )
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    status, error = trained(path)
    lines = [line for line in error.splitlines() if line.startswith("metafocus: error: ")]
    assert status == 2 and len(lines) == 1, error
    assert error.splitlines()[-1] == lines[0]


SETTING = st.sampled_from(
    ["inner_steps", "inner_lr", "packing", "train_file", "mask", "method", "seed", "learning_rate",
     "optim", "fsdp_config", "report_to", "layer_fraction", "lora_rank", "save_strategy", "zzz"]
)  # fmt: skip


@fuzz(100)
@given(st.dictionaries(SETTING | st.text(max_size=4), JSON, max_size=3))
def test_values_of_every_type(tmp_path, monkeypatch, values):
    monkeypatch.setattr(
        "metafocus.data.stdlib_qa.texts", lambda: (_ for _ in ()).throw(DataError("no data"))
    )
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"report_to": "none", "use_cpu": True, "output_dir": "run", **values})
    )
    status, error = trained(path)
    lines = [line for line in error.splitlines() if line.startswith("metafocus: error: ")]
    assert status == 2 and len(lines) == 1, error
