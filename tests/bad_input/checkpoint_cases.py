"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

CHECKPOINTS = [
    (
        "a checkpoint that is not there",
        (
            "from metafocus.trainer.checkpoints import require_complete\n"
            'require_complete(folder / "checkpoint-1")'
        ),
        "DataError",
        "resume_from_checkpoint='FOLDER/checkpoint-1' cannot be resumed: it is not a directory",
        "Pass True to use the newest complete checkpoint",
    ),
    (
        "a process killed while it saved",
        (
            "from metafocus.trainer.checkpoints import require_complete\n"
            '(folder / "checkpoint-1").mkdir()\n'
            '(folder / "checkpoint-1" / "model.safetensors").write_bytes(b"half")\n'
            'require_complete(folder / "checkpoint-1")'
        ),
        "DataError",
        (
            "resume_from_checkpoint='FOLDER/checkpoint-1' cannot be resumed: trainer_state.json "
            "is missing"
        ),
        "Pass True to use the newest complete checkpoint",
    ),
    (
        "a state that was cut off",
        (
            "from metafocus.trainer.checkpoints import resumable\n"
            '(folder / "checkpoint-1").mkdir()\n'
            '(folder / "checkpoint-1" / "trainer_state.json").write_text(\'{"global_st\')\n'
            "resumable(folder)"
        ),
        "DataError",
        "no checkpoint in FOLDER can be resumed … trainer_state.json is cut off",
        "Restore it, name another with resume_from_checkpoint=PATH, or delete it to start over",
    ),
    (
        "weights that were cut off",
        (
            "from metafocus.trainer.checkpoints import resumable\n"
            '(folder / "checkpoint-1").mkdir()\n'
            '(folder / "checkpoint-1" / "trainer_state.json").write_text(\'{"global_step": '
            "1}')\n"
            '(folder / "checkpoint-1" / "model.safetensors").write_bytes(struct.pack("<Q", '
            '99) + b"{}")\n'
            "resumable(folder)"
        ),
        "DataError",
        "no checkpoint in FOLDER can be resumed … model.safetensors is missing or cut off",
        "Restore it, name another with resume_from_checkpoint=PATH, or delete it to start over",
    ),
    (
        "a state of another step",
        (
            "from metafocus.trainer.checkpoints import resumable\n"
            '(folder / "checkpoint-2").mkdir()\n'
            '(folder / "checkpoint-2" / "trainer_state.json").write_text(\'{"global_step": '
            "1}')\n"
            "resumable(folder)"
        ),
        "DataError",
        "no checkpoint in FOLDER can be resumed … trainer_state.json is of step 1",
        "Restore it, name another with resume_from_checkpoint=PATH, or delete it to start over",
    ),
    (
        "fast weights that were never saved",
        "mf.FullWeights(mf.all_linear).load(linear, folder)",
        "DataError",
        "FOLDER/fast_weights.safetensors is missing",
        "save the fast weights again",
    ),
    (
        "fast weights that were cut off",
        (
            "full = mf.FullWeights(mf.all_linear)\n"
            "full.save(linear, full.init(linear), folder)\n"
            'path = folder / "fast_weights.safetensors"\n'
            "path.write_bytes(path.read_bytes()[:-8])\n"
            "full.load(linear, folder)"
        ),
        "DataError",
        "FOLDER/fast_weights.safetensors is cut off or no safetensors",
        "save the fast weights again",
    ),
    (
        "fast weights of another placement",
        (
            'full = mf.FullWeights(lambda model: ("0",))\n'
            "full.save(linear, full.init(linear), folder)\n"
            'mf.FullWeights(lambda model: ("2",)).load(linear, folder)'
        ),
        "ProblemError",
        (
            "FullWeights: fast weights of another model or placement: missing ['2.bias', "
            "'2.weight'] (2), unknown ['0.bias', '0.weight']"
        ),
        "make them with init(model) of this adapter",
    ),
    (
        "fast weights below a file",
        (
            'write("file", "")\n'
            "full = mf.FullWeights(mf.all_linear)\n"
            'full.save(linear, full.init(linear), folder / "file")'
        ),
        "DataError",
        "FOLDER/file/fast_weights.safetensors could not be written",
        "what was there before is untouched",
    ),
    (
        "an output directory below a file",
        (
            'write("file", "")\n'
            'write("c.jsonl", (line + "\\n") * 4)\n'
            'write("run.yaml", f"output_dir: {folder}/file/run\\ntrain_file: '
            '{folder}/c.jsonl\\nuse_cpu: true\\n")\n'
            'command("train {folder}/run.yaml")'
        ),
        "Refused",
        "--output_dir FOLDER/file/run: FOLDER/file is a file",
        "Name a directory",
    ),
    (
        "a model whose weights were cut off",
        (
            'model().save_pretrained(folder / "m")\n'
            'tokenizer().save_pretrained(folder / "m")\n'
            'path = folder / "m" / "model.safetensors"\n'
            "path.write_bytes(path.read_bytes()[:-8])\n"
            'command("compare --quick --model_name_or_path {folder}/m")'
        ),
        "Refused",
        "name_or_path='FOLDER/m' cannot be loaded … metadata",
        "Give a directory with a model and its tokenizer, a hub id, or a GGUF file",
    ),
    (
        "a model whose weights are a pickle",
        (
            'model().save_pretrained(folder / "m")\n'
            'tokenizer().save_pretrained(folder / "m")\n'
            '(folder / "m" / "model.safetensors").unlink()\n'
            "import pickle\n"
            '(folder / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(print, protocol=2))\n'
            'command("compare --quick --model_name_or_path {folder}/m")'
        ),
        "Refused",
        "name_or_path='FOLDER/m' cannot be loaded: its weights are a pickle … could run any code",
        "Save the model as safetensors",
    ),
]
