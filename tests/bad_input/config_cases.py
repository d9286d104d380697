"""Bad input, one table: see catalogue.py."""

from __future__ import annotations

CONFIGURATION = [
    (
        "no such configuration",
        'command("train {folder}/none.yaml")',
        "Refused",
        "FOLDER/none.yaml cannot be read: No such file or directory.",
    ),
    (
        "a configuration that is a directory",
        ('(folder / "run.yaml").mkdir()\ncommand("train {folder}/run.yaml")'),
        "Refused",
        "FOLDER/run.yaml cannot be read: Is a directory.",
    ),
    (
        "an empty configuration",
        'config(b"")',
        "DataError",
        "FOLDER/run.yaml must hold names and values, not null.",
    ),
    (
        "a configuration that is a list",
        'config(b"- output_dir: run")',
        "DataError",
        "FOLDER/run.yaml must hold names and values, not a list.",
    ),
    (
        "a configuration in UTF-16",
        'config("output_dir: run".encode("utf-16"))',
        "DataError",
        (
            "FOLDER/run.yaml cannot be read: not UTF-8 ('utf-8' codec can't decode byte 0xff "
            "in position 0: invalid start byte)."
        ),
    ),
    (
        "settings that are unknown",
        'config("inner_stepz: 2\\nlearning_rat: 1")',
        "DataError",
        (
            "FOLDER/run.yaml: unknown setting inner_stepz, did you mean inner_steps?; unknown "
            "setting learning_rat, did you mean learning_rate? (see metafocus train --help)"
        ),
    ),
    (
        "a setting that is a number",
        'config("7: 8")',
        "DataError",
        "FOLDER/run.yaml: unknown setting 7 (see metafocus train --help)",
    ),
    (
        "a setting that stands twice",
        'config("seed: 1\\nseed: 2")',
        "DataError",
        "FOLDER/run.yaml: 'seed' stands there twice: remove one.",
    ),
    (
        "a setting that stands twice in JSON",
        'config(b\'{"seed": 1, "seed": 2}\', "run.json")',
        "DataError",
        "FOLDER/run.json: 'seed' stands there twice: remove one.",
    ),
    (
        "YAML that makes objects",
        'config("""train_file: !!python/object/apply:os.system ["touch gone"]""")',
        "DataError",
        (
            "FOLDER/run.yaml is not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system' in \"<unicode string>\", line "
            "3, column 13: train_file: !!python/object/apply:os.system ... ^"
        ),
    ),
    (
        "YAML that doubles at every line",
        'config("train_file: &a [x, x]\\nseed: [*a, *a]")',
        "DataError",
        "FOLDER/run.yaml: *a is an alias: write the value out.",
    ),
    (
        "YAML nested ten thousand times",
        'config("train_file: " + "[" * 10_000)',
        "DataError",
        "FOLDER/run.yaml is nested too deeply.",
    ),
    (
        "JSON nested a hundred thousand times",
        'config(b"[" * 100_000, "run.json")',
        "DataError",
        "FOLDER/run.json is nested too deeply.",
    ),
    (
        "a truth value that is a number",
        'config("packing: 1")',
        "DataError",
        "FOLDER/run.yaml: packing must be true or false, got 1.",
    ),
    (
        "a truth value that is a word",
        'config("packing: maybe")',
        "DataError",
        (
            "argument --packing: Truthy value expected: got maybe but expected one of "
            "yes/no, true/false, t/f, y/n, 1/0 (case insensitive). (see metafocus train --help)"
        ),
    ),
    (
        "a truth value in a list",
        'config("packing: [true]")',
        "DataError",
        "FOLDER/run.yaml: packing must be true or false, got a list.",
    ),
    (
        "a whole number with a point",
        'config("inner_steps: 2.5")',
        "DataError",
        "FOLDER/run.yaml: inner_steps must be a whole number, got 2.5.",
    ),
    (
        "a whole number that is True",
        'config("inner_steps: true")',
        "DataError",
        "FOLDER/run.yaml: inner_steps must be a whole number, got True.",
    ),
    (
        "a whole number that is null",
        'config("inner_steps: null")',
        "DataError",
        "FOLDER/run.yaml: inner_steps must be a whole number, got null.",
    ),
    (
        "a whole number that is a word",
        'config("inner_steps: two")',
        "DataError",
        "argument --inner_steps: invalid int value: 'two' (see metafocus train --help)",
    ),
    (
        "a whole number that is too large",
        'config("seed: 99999999999999999999")',
        "DataError",
        "FOLDER/run.yaml: seed must be a whole number, got 99999999999999999999.",
    ),
    (
        "a number that is a date",
        'config("inner_lr: 2020-01-01")',
        "DataError",
        "FOLDER/run.yaml: inner_lr must be a number, got a date.",
    ),
    (
        "a number that is a list",
        'config("learning_rate: [1.0e-5]")',
        "DataError",
        "FOLDER/run.yaml: learning_rate must be a number, got a list.",
    ),
    (
        "a text that is a number",
        'config("validation_file: 3")',
        "DataError",
        "FOLDER/run.yaml: validation_file must be text or null, got 3.",
    ),
    (
        "a text that is null",
        'config("lora_modules: null")',
        "DataError",
        "FOLDER/run.yaml: lora_modules must be text, got null.",
    ),
    (
        "a text that is a list",
        'config("lora_modules: [up_proj]")',
        "DataError",
        "FOLDER/run.yaml: lora_modules must be text, got a list.",
    ),
    (
        "inner steps below zero",
        'config("inner_steps: -1")',
        "ProblemError",
        "inner_steps must be finite and >= 0, got -1.",
    ),
    (
        "an inner learning rate of infinity",
        'config("inner_lr: .inf")',
        "ProblemError",
        "inner_lr must be finite and >= 0, got inf.",
    ),
    (
        "an inner learning rate that is NaN",
        'config(b\'{"output_dir": "run", "inner_lr": NaN}\', "run.json")',
        "ProblemError",
        "inner_lr must be finite and >= 0, got nan.",
    ),
    (
        "an inner clip of zero",
        'config("inner_clip: 0")',
        "ProblemError",
        "inner_clip must be finite and > 0, got 0.0.",
    ),
    (
        "a learning rate that is NaN",
        'config("learning_rate: .nan")',
        "ProblemError",
        "learning_rate must be a finite number >= 0, got nan.",
    ),
    (
        "a learning rate below zero",
        'config("learning_rate: -1.0e-5")',
        "ProblemError",
        "learning_rate must be a finite number >= 0, got -1e-05.",
    ),
    (
        "batches of nothing",
        'config("per_device_train_batch_size: 0")',
        "ProblemError",
        "per_device_train_batch_size must be >= 1, got 0.",
    ),
    (
        "an unknown estimator in a file",
        'config("estimator: magic")',
        "ProblemError",
        (
            "estimator='magic' is unknown: use one of first-order, unrolled-last-1, "
            "unrolled, unrolled-recompute, unrolled-forward, unrolled-finite, implicit-cg."
        ),
    ),
    (
        "an unknown mask in a file",
        'config("mask: zigzag")',
        "ProblemError",
        ("mask='zigzag' is unknown: use one of causal, prefix-lm, context-bidirectional, full."),
    ),
    (
        "a share of layers above one",
        'config("layer_fraction: 35")',
        "PlacementError",
        (
            "top_layers(fraction=35.0) must lie in [0, 1]: it is the share of layers, not "
            "their number"
        ),
    ),
    (
        "a rank of zero in a file",
        'config("lora_rank: 0")',
        "ProblemError",
        "lora_rank must be finite and >= 1, got 0.",
    ),
    (
        "samples of one token",
        'config("max_length: 1")',
        "DataError",
        "max_length must be >= 2, got 1.",
    ),
    (
        "an outer rank below zero",
        'config("outer_lora_rank: -1")',
        "DataError",
        "outer_lora_rank must be >= 0, got -1.",
    ),
    (
        "an attention that takes no mask",
        'config("attn_implementation: flash_attention_2")',
        "DataError",
        "attn_implementation='flash_attention_2' is unknown: use one of sdpa, eager.",
    ),
    (
        "failures below zero",
        'config("max_skipped: -1")',
        "ProblemError",
        "max_skipped must be >= 0, got -1.",
    ),
    (
        "columns that would be dropped",
        'config("remove_unused_columns: true")',
        "ProblemError",
        (
            "remove_unused_columns=True would drop answer_mask and turn_ids from every "
            "sample: leave it False."
        ),
    ),
    (
        "DeepSpeed",
        'config("deepspeed: zero.json")',
        "ProblemError",
        (
            "deepspeed='zero.json' is not supported by FocusTrainer: its engine must run the "
            "forward pass itself; use DDP, or fsdp with version 2."
        ),
    ),
    (
        "a flag cut short",
        'command("train --output_dir run --inner_step 3")',
        "Refused",
        "unknown flag --inner_step, did you mean --inner_steps? (see metafocus train --help)",
    ),
]
