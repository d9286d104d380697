"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

MODELS = [
    (
        "a model that is not Hugging Face's",
        "mf.lm_loss(linear, adapter=lora, mask=masks.causal)",
        "ProblemError",
        "model … got Sequential without a config",
        "must be a Hugging Face model",
    ),
    (
        "no adapter",
        "mf.lm_loss(model(), adapter=None, mask=masks.causal)",
        "ProblemError",
        "adapter … got None",
        "must be an adapter such as mf.LoRA(mf.all_linear)",
    ),
    (
        "an adapter's class",
        "mf.lm_loss(model(), adapter=mf.FullWeights, mask=masks.causal)",
        "ProblemError",
        "adapter … got <class",
        "must be an adapter such as mf.LoRA(mf.all_linear)",
    ),
    (
        "a mask's name",
        'mf.lm_loss(model(), adapter=lora, mask="causal")',
        "ProblemError",
        "mask … got 'causal'",
        "must be a function of the batch such as mf.masks.context_bidirectional",
    ),
    (
        "a policy that returns a dense mask",
        "lm_loss({}, mask=lambda batch: masks.causal(batch).dense())",
        "ProblemError",
        "a mask policy … returned Tensor",
        "returns mf.Spans, one interval of keys per query",
    ),
    (
        "a token policy's name",
        'mf.lm_loss(model(), adapter=lora, mask=masks.causal, tokens="answers")',
        "ProblemError",
        "tokens … got 'answers'",
        "must be a function of the batch such as mf.answer_tokens",
    ),
    (
        "tokens that are no integers",
        'lm_loss({"input_ids": batch()["input_ids"].float()})',
        "DataError",
        "input_ids are torch.float32",
        "token ids are integers",
    ),
    (
        "tokens of another tokenizer",
        'lm_loss({"input_ids": batch()["input_ids"] + 64})',
        "DataError",
        "row 0: input_ids has tokens outside of 0 to 63",
        "encode with the model's own tokenizer",
    ),
    (
        "tokens below zero",
        'lm_loss({"input_ids": batch()["input_ids"] - 100})',
        "DataError",
        "row 0: input_ids has tokens outside of 0 to 63",
        "-100 belongs into labels only",
    ),
    (
        "an empty batch",
        "lm_loss({name: value[:0] for name, value in batch().items()})",
        "DataError",
        "the batch is empty: input_ids has shape [0, 12]",
        "(pass at least one row)",
    ),
    (
        "a batch of no tokens",
        "lm_loss({name: value[:, :0] for name, value in batch().items()})",
        "DataError",
        "the batch is empty: input_ids has shape [2, 0]",
        "(pass at least one token)",
    ),
    (
        "an answer mask of another length",
        'lm_loss({"answer_mask": batch()["answer_mask"][:, :5]})',
        "DataError",
        "batch['answer_mask'] has shape [2, 5], but input_ids has [2, 12]",
        "give one entry per token",
    ),
    (
        "labels as answer mask of a loss",
        (
            'lm_loss({"answer_mask": torch.where(batch()["answer_mask"], '
            'batch()["input_ids"], -100)})'
        ),
        "DataError",
        "row 0: answer_mask has entries other than 0 and 1",
        "from Hugging Face labels: labels != -100",
    ),
    (
        "a batch without an answer mask",
        (
            "mf.lm_loss(model(), adapter=lora, mask=masks.causal)(lora.init(model()), {}, "
            '{"input_ids": batch()["input_ids"]})'
        ),
        "ProblemError",
        "answer_tokens needs batch['answer_mask']",
        "metafocus.data.collate makes it",
    ),
    (
        "a batch as an episode",
        "mf.recipes.focusft(model(), adapter=lora)({}, batch())",
        "ProblemError",
        "episode … got dict of 4",
        "must be mf.Episode(support, query)",
    ),
    (
        "a model that is frozen whole",
        (
            "import copy\n"
            "frozen = copy.deepcopy(model()).requires_grad_(False)\n"
            "mf.recipes.focusft(frozen, adapter=lora)({}, mf.Episode(batch(), batch()))"
        ),
        "ProblemError",
        "no parameter of the model requires grad",
        "call model.requires_grad_(True), or evaluate under torch.no_grad()",
    ),
    (
        "fast weights without an adapter",
        "mf.diagnostics.attention_profile(model(), batch(), mask=masks.causal, fast={})",
        "ProblemError",
        "fast is given without adapter",
        "give both, for a profile with fast weights, or neither",
    ),
    (
        "a profile of no tokens",
        (
            'mf.diagnostics.attention_profile(model(), {"answer_mask": torch.ones(1, 3)}, '
            "mask=masks.causal)"
        ),
        "ProblemError",
        "a profile needs batch['input_ids']",
        "add it (metafocus.data does)",
    ),
    (
        "a small model of an odd width",
        'mf.models.small(["hello there"], hidden_size=100)',
        "DataError",
        "hidden_size=100",
        "must be a multiple of 64",
    ),
    (
        "a sequence longer than the model",
        (
            "from metafocus.models import check_fits\n"
            "check_fits(model(), tokenizer(), max_length=1000)"
        ),
        "DataError",
        "max_length=1000 is more than the 64 positions of the model",
        "use at most 64",
    ),
]
