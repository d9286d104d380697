"""Bad input, one table: see catalogue.py."""

from __future__ import annotations

COMMANDS = [
    (
        "no command",
        'command("")',
        "Refused",
        "the following arguments are required: COMMAND (see metafocus --help)",
    ),
    (
        "train without data",
        'command("train")',
        "Refused",
        ("the following arguments are required: --data, --output (see metafocus train --help)"),
    ),
    (
        "an option that is unknown",
        'command("compare --quick --estimator unrolled")',
        "Refused",
        "unrecognized arguments: --estimator unrolled (see metafocus --help)",
    ),
    (
        "no repeats",
        'command("compare --repeats 0")',
        "Refused",
        ("argument --repeats: must be a whole number >= 1, got 0 (see metafocus compare --help)"),
    ),
    (
        "a batch of minus two",
        'command("compare --batch-size -2")',
        "Refused",
        (
            "argument --batch-size: must be a whole number >= 1, got -2 (see metafocus "
            "compare --help)"
        ),
    ),
    (
        "a rank with a point",
        'command("compare --rank 2.5")',
        "Refused",
        ("argument --rank: must be a whole number >= 1, got 2.5 (see metafocus compare --help)"),
    ),
    (
        "a number that is too large",
        'command("compare --rank 99999999999999999999")',
        "Refused",
        (
            "argument --rank: must be a whole number >= 1, got 99999999999999999999 (see "
            "metafocus compare --help)"
        ),
    ),
    (
        "a learning rate of infinity",
        'command("compare --inner-lr inf")',
        "Refused",
        ("argument --inner-lr: must be a positive number, got inf (see metafocus compare --help)"),
    ),
    (
        "a learning rate of a word",
        'command("compare --inner-lr fast")',
        "Refused",
        ("argument --inner-lr: must be a positive number, got fast (see metafocus compare --help)"),
    ),
    (
        "an unknown estimator",
        'command("compare --quick --estimators magic")',
        "Refused",
        (
            "--estimators 'magic' is unknown: use one of first-order, unrolled-last-1, "
            "unrolled, unrolled-recompute, unrolled-forward, unrolled-finite, implicit-cg."
        ),
    ),
    (
        "no estimators",
        'command("compare --quick --estimators ,")',
        "Refused",
        (
            "--estimators is empty: use some of first-order, unrolled-last-1, unrolled, "
            "unrolled-recompute, unrolled-forward, unrolled-finite, implicit-cg."
        ),
    ),
    (
        "an unknown mask",
        'command("compare --quick --mask zigzag")',
        "Refused",
        ("--mask 'zigzag' is unknown: use one of causal, prefix-lm, context-bidirectional, full."),
    ),
    (
        "a model's directory that is empty",
        ('(folder / "empty").mkdir()\ncommand("compare --quick --model {folder}/empty")'),
        "Refused",
        (
            "--model 'FOLDER/empty' cannot be loaded: there is no config.json in it. Give a "
            "directory with a model and its tokenizer, or a hub id."
        ),
    ),
    (
        "a hidden size that does not divide",
        'command("compare --quick --hidden-size 100")',
        "Refused",
        "--hidden-size must be a multiple of 64, got 100.",
    ),
    (
        "layers above one",
        'command("compare --quick --layer-fraction 2")',
        "Refused",
        (
            "top_layers(fraction=2.0) must lie in [0, 1]: it is the share of layers, not "
            "their number"
        ),
    ),
    (
        "modules that the model has not",
        'command("compare --quick --modules zero_proj")',
        "Refused",
        (
            "top_layers: no module in a layer of Qwen2ForCausalLM is named ['zero_proj']; "
            "its linear modules are ['self_attn.q_proj', 'self_attn.k_proj', "
            "'self_attn.v_proj', 'self_attn.o_proj', 'mlp.gate_proj', 'mlp.up_proj', "
            "'mlp.down_proj']"
        ),
    ),
    (
        "an output that is a file",
        ('write("out", "")\ncommand("compare --quick --output {folder}/out/run")'),
        "Refused",
        "--output FOLDER/out/run: FOLDER/out is a file. Name a directory.",
    ),
    (
        "an output that is not empty",
        ('write("old", "")\ncommand("train --data stdlib --output {folder}")'),
        "Refused",
        (
            "--output FOLDER is not empty: name another directory, or pass --overwrite to "
            "replace its checkpoint."
        ),
    ),
    (
        "data that is not there",
        'command("train --data {folder}/none.jsonl --output {folder}/run")',
        "Refused",
        "path='FOLDER/none.jsonl' is not a file: check the name and the folder",
    ),
    (
        "a held-out fraction of one",
        (
            'write("c.jsonl", (line + "\\n") * 4)\n'
            'command("train --data {folder}/c.jsonl --heldout-fraction 1 --vocab-size 300 '
            '--hidden-size 64 --output {folder}/run")'
        ),
        "Refused",
        "--heldout-fraction must be between 0 and 1, got 1.0.",
    ),
    (
        "one chat, none to hold out",
        (
            'write("c.jsonl", line)\n'
            'command("train --data {folder}/c.jsonl --vocab-size 300 --hidden-size 64 '
            '--output {folder}/run")'
        ),
        "Refused",
        ("--data holds 1 chat: at least 2 are needed to hold one out. Or name --heldout FILE."),
    ),
]
