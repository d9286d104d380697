"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

DATA = [
    (
        "no such file",
        'data.read_chats(folder / "none.jsonl")',
        "DataError",
        "path='FOLDER/none.jsonl' is not a file",
        "check the name and the folder",
    ),
    (
        "a directory",
        ('(folder / "chats.jsonl").mkdir()\ndata.read_chats(folder / "chats.jsonl")'),
        "DataError",
        "path='FOLDER/chats.jsonl' is not a file",
        "check the name and the folder",
    ),
    (
        "a file of another kind",
        'data.read_chats(write("chats.csv", "a,b"))',
        "DataError",
        "path='FOLDER/chats.csv' has an unknown suffix",
        "use .jsonl, .json, .parquet",
    ),
    (
        "no path",
        "data.read_chats(None)",
        "DataError",
        "path=None is not a path",
        "pass a string or a pathlib.Path",
    ),
    (
        "a name that is too long",
        'data.read_chats("x" * 300 + ".jsonl")',
        "DataError",
        "path='xxx … xxx.jsonl' is not a file",
        "check the name and the folder",
    ),
    (
        "an empty file",
        'data.read_chats(write("chats.jsonl", ""))',
        "DataError",
        "path='FOLDER/chats.jsonl' holds no record",
        "write one chat per line or row",
    ),
    (
        "UTF-16",
        'data.read_chats(write("chats.jsonl", line.encode("utf-16")))',
        "DataError",
        "line 1: not JSON … can't decode byte 0xff",
        "write one complete JSON object per line, in UTF-8",
    ),
    (
        "UTF-32",
        'data.read_chats(write("chats.jsonl", line.encode("utf-32")))',
        "DataError",
        "line 1: not JSON … can't decode byte 0xff",
        "write one complete JSON object per line, in UTF-8",
    ),
    (
        "a compressed file",
        (
            "import gzip\n"
            'data.read_chats(write("chats.jsonl", gzip.compress(line.encode(), mtime=0)))'
        ),
        "DataError",
        "line 1: not JSON … can't decode byte 0x8b",
        "write one complete JSON object per line, in UTF-8",
    ),
    (
        "a line that was cut off",
        'data.read_chats(write("chats.jsonl", line + "\\n" + line[:-1]))',
        "DataError",
        "line 2: not JSON",
        "write one complete JSON object per line",
    ),
    (
        "an array that was cut off",
        'data.read_chats(write("chats.json", f"[{line}"))',
        "DataError",
        "FOLDER/chats.json: not JSON",
        "write an array of objects, or one object per line",
    ),
    (
        "a number",
        'data.read_chats(write("chats.jsonl", "7"))',
        "DataError",
        "line 1: 7 is not an object",
        "object with messages",
    ),
    (
        "nested a hundred thousand times",
        'data.read_chats(write("chats.jsonl", "[" * 100_000))',
        "DataError",
        "chats.jsonl: nested too deeply for a chat",
        "(write the chat flat: a list of messages)",
    ),
    (
        "a key that appears twice",
        'data.read_chats(write("chats.jsonl", \'{"messages": [], "messages": []}\'))',
        "DataError",
        "line 1: the key 'messages' appears twice in one object",
        "remove one",
    ),
    (
        "records without messages",
        'data.read_chats(write("chats.jsonl", \'{"prompt": "hi", "answer": "yo"}\'))',
        "DataError",
        "line 1: no messages, only prompt, answer",
        "give each record messages (role and content), conversations (from and value), prompt",
    ),
    (
        "messages is null",
        'data.read_chats(write("chats.jsonl", \'{"messages": null}\'))',
        "DataError",
        "line 1: messages is None",
        "pass a list of message dicts",
    ),
    (
        "messages is text",
        'data.read_chats(write("chats.jsonl", \'{"messages": "hi"}\'))',
        "DataError",
        "line 1: messages is 'hi'",
        "pass a list of message dicts",
    ),
    (
        "messages is empty",
        'data.read_chats(write("chats.jsonl", \'{"messages": []}\'))',
        "DataError",
        "line 1: messages is empty",
        "pass at least one message",
    ),
    (
        "tools is no list",
        'data.read_chats(write("chats.jsonl", line[:-1] + \', "tools": {"f": 1}}\'))',
        "DataError",
        "tools={'f': 1} is not a list",
        "list of function descriptions",
    ),
    (
        "tools is no JSON",
        'data.read_chats(write("chats.jsonl", line[:-1] + \', "tools": "f(x)"}\'))',
        "DataError",
        "tools is a string, but not JSON",
        "(write a list of function descriptions)",
    ),
    (
        "an unknown role",
        'data.encode_chat([{"role": "human", "content": "hi"}], tokenizer())',
        "DataError",
        "message 0: role='human' is unknown",
        "use one of system, developer, user, assistant, tool",
    ),
    (
        "a role of another type",
        'data.encode_chat([{"role": ["user"], "content": "hi"}], tokenizer())',
        "DataError",
        "message 0: role=['user'] is unknown",
        "use one of system, developer, user, assistant, tool",
    ),
    (
        "no content",
        'data.encode_chat([{"role": "user"}], tokenizer())',
        "DataError",
        "message 0: the user message has no content",
        "give a string",
    ),
    (
        "content is a number",
        'data.encode_chat([{"role": "user", "content": 7}], tokenizer())',
        "DataError",
        "message 0: content=7",
        "neither a string nor a list of parts",
    ),
    (
        "a weight that is not 0 or 1",
        ('data.encode_chat([{"role": "assistant", "content": "yo", "weight": 0.5}], tokenizer())'),
        "DataError",
        "message 0: weight=0.5",
        "weight is 0 (not trained) or 1",
    ),
    (
        "a weight on a question",
        'data.encode_chat([{"role": "user", "content": "hi", "weight": 1}], tokenizer())',
        "DataError",
        "message 0: weight=1 on a user message",
        "only on assistant messages",
    ),
    (
        "evidence beyond the content",
        (
            'data.encode_chat([{"role": "user", "content": "hi", "evidence": [[0, 9]]}], '
            "tokenizer())"
        ),
        "DataError",
        "message 0: evidence span [0, 9] is not [start, end]",
        "0 <= start < end <= 2, the number of characters of the content",
    ),
    (
        "evidence of truth values",
        (
            'data.encode_chat([{"role": "user", "content": "hi", "evidence": [[False, '
            "True]]}], tokenizer())"
        ),
        "DataError",
        "message 0: evidence span [False, True] is not [start, end]",
        "0 <= start < end <= 2",
    ),
    (
        "evidence in an answer",
        (
            'data.encode_chat([{"role": "assistant", "content": "hi", "evidence": [[0, '
            "1]]}], tokenizer())"
        ),
        "DataError",
        "message 0: evidence",
        "belongs to a non-assistant message whose content is a string",
    ),
    (
        "half of a surrogate pair",
        'data.encode_chat([{"role": "user", "content": "a\\ud800"}, chat[1]], tokenizer())',
        "DataError",
        "message 0: character 1 … is half of a surrogate pair",
        "(read the source as UTF-16, whole)",
    ),
    (
        "messages is a string",
        'data.encode_chat("hi", tokenizer())',
        "DataError",
        "messages is 'hi'",
        "pass a list of message dicts",
    ),
    (
        "a message is a string",
        'data.encode_chat(["hi"], tokenizer())',
        "DataError",
        "message 0: 'hi' is not a dict",
        "dict with role and content",
    ),
    (
        "no tokenizer",
        "data.encode_chat(chat, None)",
        "DataError",
        "tokenizer is a NoneType",
        "pass a Hugging Face tokenizer, such as AutoTokenizer.from_pretrained(name)",
    ),
    (
        "a tokenizer's name",
        'data.encode_chats([{"messages": chat}], "gpt2")',
        "DataError",
        "tokenizer is a str",
        "pass a Hugging Face tokenizer",
    ),
    (
        "records is a dict",
        'data.encode_chats({"messages": chat}, tokenizer())',
        "DataError",
        "records is a dict",
        "pass a list of dicts with messages, as read_chats returns it",
    ),
    (
        "a record is a string",
        'data.encode_chats(["hi"], tokenizer())',
        "DataError",
        "record 0: 'hi' is not a dict",
        "dict with messages",
    ),
    (
        "a record is a message",
        "data.encode_chats(chat, tokenizer())",
        "DataError",
        "record 0: a single message",
        'a record is a whole chat, {"messages": [...]}',
    ),
    (
        "no records",
        "data.encode_chats([], tokenizer())",
        "DataError",
        "no answers at all in 0 chats",
        "check the roles and weights of the messages",
    ),
    (
        "no answers at all",
        'data.encode_chats([{"messages": chat[:1]}], tokenizer())',
        "DataError",
        "no answers at all in 1 chats … 1 have no trained assistant message",
        "check the roles and weights of the messages",
    ),
    (
        "answers that are all cut off",
        'data.encode_chats([{"messages": chat}], tokenizer(), max_length=5)',
        "DataError",
        "no answers at all in 1 chats: 1 lost theirs to max_length=5",
        "raise max_length or set tokenizer.truncation_side='left'",
    ),
    (
        "max_length with a point",
        'data.encode_chats([{"messages": chat}], tokenizer(), max_length=64.0)',
        "DataError",
        "max_length … got 64.0",
        "must be an integer >= 2 or None",
    ),
    (
        "max_length of one",
        'data.encode_chats([{"messages": chat}], tokenizer(), max_length=1)',
        "DataError",
        "max_length … got 1",
        "must be an integer >= 2 or None: a token is predicted from another one",
    ),
    (
        "no samples",
        "data.collate([], pad_token_id=0)",
        "DataError",
        "samples is empty",
        "pass at least one sample to collate",
    ),
    (
        "a sample without its mask",
        'data.collate([{"input_ids": torch.tensor([1, 2])}], pad_token_id=0)',
        "DataError",
        "sample 0 has no turn_ids, only input_ids",
        "encode_chat makes all",
    ),
    (
        "a sample of lists",
        (
            "data.collate([{name: value.tolist() for name, value in sample.items()}], "
            "pad_token_id=0)"
        ),
        "DataError",
        "sample 0: input_ids is list",
        "a tensor of one dimension",
    ),
    (
        "a sample of two dimensions",
        ("data.collate([{name: value[None] for name, value in sample.items()}], pad_token_id=0)"),
        "DataError",
        "sample 0: input_ids is [1, 2]",
        "a tensor of one dimension",
    ),
    (
        "a sample with too few turns",
        'data.collate([{**sample, "turn_ids": torch.tensor([0])}], pad_token_id=0)',
        "DataError",
        "sample 0: turn_ids has 1 entries for 2 tokens",
        "give one for each",
    ),
    (
        "a sample of no tokens",
        ("data.collate([{name: value[:0] for name, value in sample.items()}], pad_token_id=0)"),
        "DataError",
        "sample 0: input_ids has 0 entries for 0 tokens",
        "at least one token",
    ),
    (
        "a sample instead of samples",
        "data.collate(sample, pad_token_id=0)",
        "DataError",
        "sample 0 is a str",
        "pass a list of dicts",
    ),
    (
        "no padding token",
        "data.collate([sample], pad_token_id=None)",
        "DataError",
        "pad_token_id=None",
        "set tokenizer.pad_token (to tokenizer.eos_token, say) and pass tokenizer.pad_token_id",
    ),
    (
        "a padding token with a point",
        "data.collate([sample], pad_token_id=0.5)",
        "DataError",
        "pad_token_id … got 0.5",
        "must be an integer >= 0",
    ),
    (
        "padding on neither side",
        'data.collate([sample], pad_token_id=0, side="middle")',
        "DataError",
        "side='middle' is unknown",
        "pad on the 'right' or on the 'left'",
    ),
    (
        "a multiple of zero",
        "data.collate([sample], pad_token_id=0, pad_to_multiple_of=0)",
        "DataError",
        "pad_to_multiple_of … got 0",
        "must be an integer >= 1 or None",
    ),
    (
        "rows shorter than a sample",
        "data.pack([sample], 1)",
        "DataError",
        "sample 0 has 2 tokens, more than length=1",
        "raise length, or encode with max_length=length",
    ),
    (
        "rows of a length with a point",
        "data.pack([sample], 2.5)",
        "DataError",
        "length … got 2.5",
        "must be an integer >= 1",
    ),
    (
        "a vocabulary that is too small",
        (
            "from metafocus.data.tokenizer import train_tokenizer\n"
            'train_tokenizer(["hi"], vocab_size=100)'
        ),
        "DataError",
        "vocab_size=100 is below 259",
        "pass vocab_size >= 259",
    ),
    (
        "a tokenizer trained on one string",
        ('from metafocus.data.tokenizer import train_tokenizer\ntrain_tokenizer("hi")'),
        "DataError",
        "texts is a single string",
        "pass an iterable of strings, such as [text]",
    ),
    (
        "a tokenizer trained on numbers",
        ("from metafocus.data.tokenizer import train_tokenizer\ntrain_tokenizer([1, 2])"),
        "DataError",
        "texts holds 1 of type int",
        "pass strings only",
    ),
    (
        "a Parquet file without messages",
        (
            "import pyarrow as pa, pyarrow.parquet as pq\n"
            'pq.write_table(pa.table({"note": ["hi"]}), folder / "chats.parquet")\n'
            'data.read_chats(folder / "chats.parquet")'
        ),
        "DataError",
        "FOLDER/chats.parquet, row 1: no messages, only note",
        "give each record messages (role and content), conversations (from and value), prompt",
    ),
    (
        "a Parquet file without rows",
        (
            "import pyarrow as pa, pyarrow.parquet as pq\n"
            'pq.write_table(pa.table({"messages": pa.array([], pa.string())}), folder / '
            '"chats.parquet")\n'
            'data.read_chats(folder / "chats.parquet")'
        ),
        "DataError",
        "path='FOLDER/chats.parquet' holds no record",
        "write one chat per line or row",
    ),
]
