"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

MASKS = [
    (
        "a batch of lists",
        'masks.causal({"input_ids": [[1, 2, 3]]})',
        "DataError",
        "batch['input_ids'] is a list and no tensor [B, S]",
        "metafocus.data.collate makes batches, or use torch.tensor",
    ),
    (
        "tokens without a batch",
        'masks.causal({"input_ids": torch.zeros(3)})',
        "DataError",
        "input_ids … got shape [3]",
        "must be [batch, sequence]",
    ),
    (
        "a batch without tokens",
        'masks.causal({"attention_mask": torch.ones(1, 3)})',
        "ProblemError",
        "needs batch['input_ids'] … the batch has only ['attention_mask']",
        "add it (metafocus.data does)",
    ),
    (
        "a mask policy without turns",
        (
            'masks.context_bidirectional({"input_ids": torch.zeros(1, 3), "answer_mask": '
            "torch.ones(1, 3)})"
        ),
        "ProblemError",
        "context_bidirectional needs batch['turn_ids']",
        "add it (metafocus.data does), or choose another mask policy",
    ),
    (
        "labels as answer mask",
        (
            "labels = torch.tensor([[-100, -100, 5]])\n"
            'masks.prefix_lm({"input_ids": torch.zeros(1, 3), "answer_mask": labels})'
        ),
        "DataError",
        "row 0: answer_mask has entries other than 0 and 1",
        "give True on answers; from Hugging Face labels: labels != -100",
    ),
    (
        "an additive attention mask",
        (
            "additive = torch.tensor([[0.0, 0.0, -1e9]])\n"
            'masks.causal({"input_ids": torch.zeros(1, 3), "attention_mask": additive})'
        ),
        "DataError",
        "row 0: attention_mask has entries other than 0 and 1",
        "give 1 on tokens and 0 on padding",
    ),
    (
        "numbers of documents as attention mask",
        (
            'masks.causal({"input_ids": torch.zeros(1, 3), "attention_mask": '
            "torch.tensor([[1, 2, 2]])})"
        ),
        "DataError",
        "row 0: attention_mask has entries other than 0 and 1",
        "numbers of documents go into document_ids",
    ),
    (
        "an attention mask of four dimensions",
        (
            'masks.causal({"input_ids": torch.zeros(1, 3), "attention_mask": torch.ones(1, '
            "1, 3, 3)})"
        ),
        "DataError",
        "batch['attention_mask'] has shape [1, 1, 3, 3], but input_ids has [1, 3]",
        "give one entry per token",
    ),
    (
        "padding between tokens",
        (
            'masks.causal({"input_ids": torch.zeros(1, 3), "attention_mask": '
            "torch.tensor([[1, 0, 1]])})"
        ),
        "DataError",
        "row 0: attention_mask has padding between tokens",
        "put all padding of a row at its ends",
    ),
    (
        "documents that come back",
        ('masks.full({"input_ids": torch.zeros(1, 3), "document_ids": torch.tensor([[0, 1, 0]])})'),
        "DataError",
        "row 0: document_ids returns to a document after another one began",
        "keep the tokens of a document together",
    ),
    (
        "a window of nothing",
        "masks.sliding_window(0)",
        "ProblemError",
        "sliding_window: width … got 0",
        "must be an integer >= 1, since a query always sees itself",
    ),
    (
        "a window of a word",
        'masks.sliding_window("4")',
        "ProblemError",
        "sliding_window: width … got '4'",
        "must be an integer >= 1",
    ),
    (
        "spans narrowed to nothing",
        ("from metafocus.masks.spans import windowed\nwindowed(spans, 0)"),
        "ProblemError",
        "windowed: window … got 0",
        "must be an integer >= 1",
    ),
    (
        "spans of different lengths",
        'spans & masks.causal({"input_ids": torch.zeros(1, 5)})',
        "ProblemError",
        "a & b needs spans of one shape, got [1, 4] and [1, 5]",
        "make both of the same batch",
    ),
    (
        "an integer mask",
        "spans.dense(torch.int64)",
        "ProblemError",
        "dense(dtype=torch.int64) is neither boolean nor additive",
        "pass None for a boolean mask or a floating-point dtype for an additive one",
    ),
    (
        "blocks of no tokens",
        "spans.block_mask(0)",
        "ProblemError",
        "block_mask: block_size … got 0",
        "must be an integer >= 1",
    ),
    (
        "stacked spans of another shape",
        "mf.Spans.unstack(torch.zeros(1, 1, 4, 4, dtype=torch.int64))",
        "ProblemError",
        "stacked spans … got torch.int64 of shape [1, 1, 4, 4]",
        "build it with Spans.stack()",
    ),
    (
        "an unknown back end",
        'mf.attention.span_attention(q, q, q, spans, backend="fast")',
        "ProblemError",
        "backend='fast'",
        "must be one of dense, auto, tiled, flash, triton, flex",
    ),
    (
        "attention over a dense mask",
        "mf.attention.span_attention(q, q, q, spans.dense())",
        "ProblemError",
        "spans must be mf.Spans … got Tensor",
        "a mask policy makes them: mf.masks.causal(batch)",
    ),
    (
        "queries of three dimensions",
        "mf.attention.span_attention(q[0], q[0], q[0], spans)",
        "ProblemError",
        "q … got torch.float32 [2, 4, 3]",
        "must be a floating-point tensor [B, heads, S, D]",
    ),
    (
        "keys of another type",
        "mf.attention.span_attention(q, q.double(), q, spans)",
        "ProblemError",
        "k … got torch.float64",
        "of the type and device of q (torch.float32, cpu)",
    ),
    (
        "heads that do not divide",
        "mf.attention.span_attention(q[:, :1], q, q, spans)",
        "ProblemError",
        "must agree … got [1, 1, 4, 3], [1, 2, 4, 3]",
        "H a multiple of Hkv",
    ),
    (
        "fewer queries than keys",
        "mf.attention.span_attention(q[:, :, :2], q, q, spans)",
        "ProblemError",
        "must agree … got [1, 2, 2, 3], [1, 2, 4, 3]",
        "There are as many keys as queries: attention from a cache is not served",
    ),
    (
        "spans of another batch",
        ("mf.attention.span_attention(q, q, q, mf.Spans(spans.start[:, :2], spans.stop[:, :2]))"),
        "ProblemError",
        "spans.start … got torch.int64 [1, 2]",
        "must be an integer tensor [1, 4]",
    ),
    (
        "spans of numbers with a point",
        ("mf.attention.span_attention(q, q, q, mf.Spans(spans.start.float(), spans.stop.float()))"),
        "ProblemError",
        "spans.start … got torch.float32 [1, 4]",
        "must be an integer tensor [1, 4]",
    ),
    (
        "spans beyond the keys",
        (
            "mf.attention.span_attention(q, q, q, mf.Spans(spans.start, spans.stop + 9), "
            'backend="flash")'
        ),
        "ProblemError",
        "the span of query 0 in row 0 is [0, 10), beyond the 4 keys",
        "start <= key < stop within [0, S)",
    ),
    (
        "a soft cap of zero",
        "mf.attention.span_attention(q, q, q, spans, softcap=0.0)",
        "ProblemError",
        "softcap=0.0",
        "must be positive, or None for no cap",
    ),
    (
        "sinks of other heads",
        "mf.attention.span_attention(q, q, q, spans, sinks=torch.ones(3))",
        "ProblemError",
        "sinks … got torch.float32 [3]",
        "must be one floating-point logit for each of the 2 heads",
    ),
]
