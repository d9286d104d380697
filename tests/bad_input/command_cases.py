"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

COMMANDS = [
    (
        "no command",
        'command("")',
        "Refused",
        "arguments are required: COMMAND",
        "see metafocus --help",
    ),
    (
        "train without data",
        'command("train")',
        "Refused",
        "--output_dir is missing",
        "name a directory for the checkpoint",
    ),
    (
        "an option that is unknown",
        'command("compare --quick --estimator unrolled")',
        "Refused",
        "unknown flag --estimator",
        "did you mean --estimators?",
    ),
    (
        "no repeats",
        'command("compare --repeats 0")',
        "Refused",
        "argument --repeats: … got 0",
        "must be a whole number >= 1",
    ),
    (
        "a batch of minus two",
        'command("compare --per_device_train_batch_size -2")',
        "Refused",
        "argument --per_device_train_batch_size: … got -2",
        "must be a whole number >= 1",
    ),
    (
        "a rank with a point",
        'command("compare --lora_rank 2.5")',
        "Refused",
        "argument --lora_rank: … got 2.5",
        "must be a whole number >= 1",
    ),
    (
        "a number that is too large",
        'command("compare --lora_rank 99999999999999999999")',
        "Refused",
        "argument --lora_rank: … got 99999999999999999999",
        "must be a whole number >= 1",
    ),
    (
        "a learning rate of infinity",
        'command("compare --inner_lr inf")',
        "Refused",
        "argument --inner_lr: … got inf",
        "must be a positive number",
    ),
    (
        "a learning rate of a word",
        'command("compare --inner_lr fast")',
        "Refused",
        "argument --inner_lr: … got fast",
        "must be a positive number",
    ),
    (
        "an unknown estimator",
        'command("compare --quick --estimators magic")',
        "Refused",
        "estimators='magic' is unknown",
        "use one of first-order, unrolled-last-1, unrolled",
    ),
    (
        "no estimators",
        'command("compare --quick --estimators ,")',
        "Refused",
        "--estimators is empty",
        "use some of first-order, unrolled-last-1, unrolled",
    ),
    (
        "an unknown mask",
        'command("compare --quick --mask zigzag")',
        "Refused",
        "mask='zigzag' is unknown",
        "use one of causal, prefix-lm, context-bidirectional, full",
    ),
    (
        "a model's directory that is empty",
        (
            '(folder / "empty").mkdir()\n'
            'command("compare --quick --model_name_or_path {folder}/empty")'
        ),
        "Refused",
        "name_or_path='FOLDER/empty' cannot be loaded: there is no config.json",
        "Give a directory with a model and its tokenizer, a hub id, or a GGUF file",
    ),
    (
        "a hidden size that does not divide",
        'command("compare --quick --hidden_size 100")',
        "Refused",
        "hidden_size=100",
        "must be a multiple of 64",
    ),
    (
        "layers above one",
        'command("compare --quick --layer_fraction 2")',
        "Refused",
        "top_layers(fraction=2.0)",
        "must lie in [0, 1]: it is the share of layers",
    ),
    (
        "modules that the model has not",
        'command("compare --quick --lora_modules zero_proj")',
        "Refused",
        "no module in a layer of Qwen2ForCausalLM is named ['zero_proj']",
        "its linear modules are … 'mlp.up_proj'",
    ),
    (
        "an output that is a file",
        ('write("out", "")\ncommand("compare --quick --output_dir {folder}/out/run")'),
        "Refused",
        "--output_dir FOLDER/out/run: FOLDER/out is a file",
        "Name a directory",
    ),
    (
        "an output that is not empty",
        ('write("old", "")\ncommand("train --train_file stdlib --output_dir {folder}")'),
        "Refused",
        "--output_dir FOLDER is not empty",
        "name another directory, pass --overwrite_output_dir … or --resume_from_checkpoint true",
    ),
    (
        "data that is not there",
        'command("train --train_file {folder}/none.jsonl --output_dir {folder}/run")',
        "Refused",
        "path='FOLDER/none.jsonl' is not a file",
        "check the name and the folder",
    ),
    (
        "all of the chats held out",
        (
            'write("c.jsonl", (line + "\\n") * 4)\n'
            'command("train --train_file {folder}/c.jsonl --validation_split_percentage 100 '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "validation_split_percentage … got 100.0",
        "must be at least 0 and below 100",
    ),
    (
        "one chat, none to hold out",
        (
            'write("c.jsonl", line)\n'
            'command("train --train_file {folder}/c.jsonl --output_dir {folder}/run")'
        ),
        "Refused",
        "1 chat is not enough to hold one out",
        "name --validation_file FILE, or pass --validation_split_percentage 0",
    ),
    (
        "a flag of other tools",
        'command("train --data chats.jsonl --lr 1e-5 --output_dir run")',
        "Refused",
        "unknown flag --data … unknown flag --lr",
        "did you mean --train_file? … did you mean --learning_rate?",
    ),
    (
        "a flag with hyphens",
        'command("compare --inner-lr 0.5")',
        "Refused",
        "unknown flag --inner-lr",
        "did you mean --inner_lr?",
    ),
    (
        "train without chats",
        'command("train --output_dir run")',
        "Refused",
        "--train_file is missing",
        "name a file of chats, or stdlib; or a data set with --dataset_name",
    ),
    (
        "a logger that is not installed",
        'command("train --train_file stdlib --output_dir {folder}/out --report_to comet_ml")',
        "Refused",
        "--report_to … comet_ml … cannot be used",
        "pip install",
    ),
    (
        "one chat to leave out",
        'command("attribute --train_file a.jsonl --query_file b.jsonl --model_name_or_path c '
        '--output_dir {folder}/out --leave_one_out 1")',
        "Refused",
        "--leave_one_out 1: … for which one run says nothing",
        "Give at least 2, or 0 for none",
    ),
    (
        "a length below zero",
        'command("eval --suite babilong --lengths -1k --output_dir {folder}/out")',
        "Refused",
        "argument --lengths: expected one argument",
        "a value that begins with a minus is written --lengths=-VALUE",
    ),
    (
        "an optimiser whose package is missing",
        'command("train --train_file stdlib --max_train_samples 4 --max_steps 1 --use_cpu true '
        "--num_hidden_layers 2 --hidden_size 64 --report_to none --optim apollo_adamw "
        '--optim_target_modules all-linear --output_dir {folder}/out")',
        "Refused",
        "install `apollo_torch`",
        "pip install",
    ),
    (
        "no steps",
        'command("train --train_file stdlib --output_dir {folder}/out --max_steps 0")',
        "Refused",
        "nothing to train: max_steps=0",
        "Give max_steps >= 1",
    ),
    (
        "epochs below zero",
        'command("train --train_file stdlib --output_dir {folder}/out --num_train_epochs -1")',
        "Refused",
        "nothing to train … num_train_epochs=-1",
        "num_train_epochs > 0",
    ),
    (
        "a directory in place of a file of chats",
        'command("train --train_file {folder} --output_dir {folder}/out")',
        "Refused",
        "path='FOLDER' is a directory, not a file",
        "use .jsonl",
    ),
    (
        "a misspelt smollm2",
        'command("compare --quick --model_name_or_path smolm2")',
        "Refused",
        "name_or_path='smolm2' is not a directory",
        "did you mean 'smollm2'?",
    ),
]
