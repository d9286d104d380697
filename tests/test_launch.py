"""Configuration files and flags, from words to a checkpoint; the cost model's arithmetic."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from metafocus.errors import DataError
from metafocus.trainer.launch import main, parse

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "examples" / "configs" / "qwen2.5-7b-focusft.yaml"


def chats(path: Path, count: int = 8) -> Path:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Say the number {i}."},
                    {"role": "assistant", "content": f"It is {i}."},
                ]
            }
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, **changes) -> dict:
    found = {
        "data": str(chats(folder / "train.jsonl")),
        "heldout": str(chats(folder / "heldout.jsonl", 3)),
        "output_dir": str(folder / "run"),
        "vocab_size": 300,
        "hidden_size": 64,
        "layers": 2,
        "max_length": 64,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return {**found, **changes}


def written(folder: Path, values: dict, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_file_and_flags_after_it(tmp_path, name):
    path = written(tmp_path, settings(tmp_path, inner_lr=0.5, target_modules="up_proj"), name)
    source, args = parse([path, "--inner_lr", "0.25", "--learning_rate", "3e-4", "--packing"])
    assert (args.inner_lr, args.learning_rate, args.target_modules) == (0.25, 3e-4, "up_proj")
    assert source.packing and source.max_length == 64 and args.max_steps == 2
    assert (args.inner_steps, args.lora_rank) == (2, 32)


def test_words_for_numbers_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-5\nuse_cpu: true\n")  # YAML 1.1 reads this as text.
    assert parse([str(path)])[1].learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner_stepz: 2", r"unknown settings \['inner_stepz'\]"),
        ("- 1", "must hold names and values, not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        parse([str(path)])


def test_bad_flags(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        parse([str(tmp_path / "none.yaml")])
    with pytest.raises(DataError, match="unknown arguments"):
        parse(["--inner_stepz", "3"])


def test_from_a_file_to_a_checkpoint_and_on(tmp_path):
    config = written(tmp_path, settings(tmp_path, evaluate_on="prompt"))
    first = main([config, "--max_steps", "1"])
    assert first.state.global_step == 1
    run = main([config, "--resume_from_checkpoint", "true"])
    assert run.state.global_step == 2
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [1, 2]
    folder = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not [key for key in model.state_dict() if "lora" in key]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "eval_loss" in json.loads((folder / "eval_results.json").read_text())
    assert (folder / "trainer_state.json").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packed_and_with_an_outer_lora(tmp_path):
    config = written(tmp_path, settings(tmp_path, packing=True, outer_lora_rank=2, max_steps=1))
    run = main([config])
    assert len(run.train_dataset) < 8 and "document_ids" in run.train_dataset[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_papers_configuration():
    values = yaml.safe_load(CONFIG.read_text())
    sharded = ("fsdp", "fsdp_config", "bf16", "report_to", "gradient_checkpointing")
    # Sharding and bfloat16 need the GPUs; what is left must be understood here.
    flags = ["--use_cpu", "true", "--report_to", "none"]
    text = yaml.safe_dump({k: v for k, v in values.items() if k not in sharded})
    path = CONFIG.parent / "none.yaml"
    assert not path.exists() and set(sharded) <= set(values)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        source, args = parse([str(path), *flags])
    assert source.model == "Qwen/Qwen2.5-7B" and source.max_length == 4096
    assert (args.inner_steps, args.inner_lr, args.inner_clip) == (2, 1.0, 1.0)
    assert (args.lora_rank, args.lora_alpha, args.layer_fraction) == (32, 64.0, 0.35)
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-5, 0.01, 5)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 32
    assert args.get_warmup_steps(100) == 10 and args.seed == 1234


def cost_model():
    path = ROOT / "examples" / "cost_model.py"
    spec = importlib.util.spec_from_file_location("cost_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["cost_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_cost_model_counts_what_the_models_have():
    model = cost_model()
    # Qwen2.5-7B has 7.62 billion, Llama-3-70B 70.6 billion; norms and biases are not counted.
    assert model.SEVEN.parameters == pytest.approx(7.62e9, rel=1e-3)
    assert model.SEVENTY.parameters == pytest.approx(70.6e9, rel=1e-3)
    run = model.RUNS[0]
    assert run.fast_layers == 10
    # 20 million numbers of fast weights at rank 32, in three copies of float32.
    assert run.memory()["fast"] == 12 * 21_626_880
    assert run.units(shared=False) == pytest.approx(4 + 2 * (18 / 28 + 2 * 10 / 28))


def test_the_page_shows_the_table_that_the_script_prints():
    assert cost_model().table() in (ROOT / "docs" / "training.md").read_text()
