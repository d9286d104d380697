"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

EVALUATION = [
    (
        "lengths that are no numbers",
        (
            'command("eval --suite babilong --model_name_or_path m --lengths 4x '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "--lengths '4x'",
        "a length such as 4k or 500",
    ),
    (
        "an unknown task",
        (
            'command("eval --suite babilong --model_name_or_path m --tasks qa99 --lengths 1k '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "tasks='qa99' is unknown",
        "use one of qa1, qa2, qa3, qa4, qa5",
    ),
    (
        "no tasks to do",
        (
            'command("eval --suite babilong --model_name_or_path m --tasks , --lengths 1k '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "--tasks is empty",
        "use some of qa1, qa2, qa3, qa4, qa5",
    ),
    (
        "a haystack of nothing",
        (
            'command("eval --suite ruler --model_name_or_path m --lengths 0k '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "--lengths '0k'",
        "0k is for BABILong only, RULER needs a haystack",
    ),
    (
        "questions without a file",
        (
            'command("eval --suite ruler --model_name_or_path m --tasks qa --lengths 1k '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "--tasks qa",
        "needs --questions FILE: .jsonl, SQuAD or HotpotQA",
    ),
    (
        "an evaluation into a file",
        (
            'write("out", "")\n'
            'command("eval --suite ruler --model_name_or_path m --lengths 1k '
            '--output_dir {folder}/out")'
        ),
        "Refused",
        "--output_dir FOLDER/out: FOLDER/out is a file",
        "Name a directory",
    ),
    (
        "no samples to ask",
        (
            'command("eval --suite babilong --model_name_or_path m --lengths 1k --n 0 '
            '--output_dir {folder}/run")'
        ),
        "Refused",
        "argument --n/--num_questions: … got 0",
        "must be a whole number >= 1",
    ),
]
