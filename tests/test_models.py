"""Models by name and from scratch, and what is said of those that cannot be used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import chat, flags, refused, training, tree, write
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import metafocus as mf
from metafocus.errors import DataError
from metafocus.models import check_fits

TEXTS = ["the cat sat on the mat"] * 4
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1}


def saved(folder: Path) -> Path:
    model, tokenizer = mf.models.small(TEXTS, **SIZES)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"))


def test_what_is_loaded_is_what_was_made(tmp_path):
    torch.manual_seed(3)
    model, tokenizer = mf.models.small(TEXTS, **SIZES)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = mf.models.load(tmp_path)
    ids = tokenizer("the cat 12.5!", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, words("the cat 12.5!", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
    assert words.chat_template and words.pad_token_id is not None
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings == 512


def test_the_global_seed_is_the_models(tmp_path):
    first, second, other = (
        (torch.manual_seed(seed), mf.models.small(TEXTS, **SIZES)[0].state_dict())[1]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_keywords_are_those_of_from_pretrained(base):
    assert mf.models.load(base)[0].dtype == torch.float32
    model, _ = mf.models.load(base, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_a_tokenizer_without_padding_pads_with_its_end(base, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    assert mf.models.load(base)[1].pad_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple of 64"),
        ({"hidden_size": 0}, "hidden_size=0 must be a multiple of 64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"vocab_size": 10}, "vocab_size=10 is below 259"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(changes, text):
    with pytest.raises(DataError, match=text):
        mf.models.small(TEXTS, **{**SIZES, **changes})


def test_a_temporary_directory_that_is_full(monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(DataError, match=r"No space left .*Make room, or name another with TMPDIR"):
        mf.models.small(TEXTS, **SIZES)


def test_models_that_are_too_small(base):
    model, tokenizer = mf.models.load(base)
    check_fits(model, tokenizer, 512)
    with pytest.raises(DataError, match="max_length=513 is more than the 512 positions"):
        check_fits(model, tokenizer, 513)
    config = Qwen2Config.from_pretrained(base)
    config.vocab_size -= 1
    with pytest.raises(DataError, match="resize_token_embeddings"):
        check_fits(Qwen2ForCausalLM(config), tokenizer, 8)


BROKEN = {
    "no weights": ("model.safetensors", None, "cannot be loaded: .*model.safetensors"),
    "cut weights": ("model.safetensors", b"cut", "cannot be loaded: .*header"),
    "no config": ("config.json", None, "cannot be loaded: there is no config.json"),
    "cut config": ("config.json", b"{", "cannot be loaded: .*JSON"),
    "cut tokenizer": ("tokenizer.json", b"{", "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directories(tmp_path, base, name):
    file, content, message = BROKEN[name]
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / file).unlink() if content is None else (model / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        mf.models.load(model)
    assert str(caught.value).startswith(f"name_or_path={str(model)!r} cannot be loaded")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere' cannot be loaded: it is not a directory on"):
        mf.models.load(tmp_path / "nowhere")


def test_commands_need_a_chat_template(tmp_path, base):
    model, data = tmp_path / "model", write(tmp_path / "chats.jsonl", chat(0), chat(1))
    shutil.copytree(base, model)
    (model / "chat_template.jinja").unlink()
    assert mf.models.load(model)[1].chat_template is None
    before = tree(tmp_path)
    error = refused(*training(data, tmp_path / "out", model_name_or_path=model))
    assert str(model) in error and "no chat template" in error
    assert tree(tmp_path) == before


def test_commands_say_what_is_too_long(tmp_path, base):
    data = write(tmp_path / "chats.jsonl", chat(0), chat(1))
    changes = {"model_name_or_path": base, "max_length": 513}
    for words in (training(data, tmp_path / "out", **changes), ["compare", *flags(**changes)]):
        assert "max_length=513 is more than the 512 positions" in refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there(device):
    error = refused("compare", "--quick", "--device", device)
    assert f"--device {device!r} cannot be used" in error
