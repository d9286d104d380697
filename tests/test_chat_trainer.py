"""What the trainer says and does with packed evaluation sets and with the options of others."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from metafocus.data import Collator, pack
from metafocus.errors import DataError, ProblemError
from metafocus.trainer import FocusArguments, FocusTrainer

QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # so that attention matters
    return made


def samples():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 64, (n,), generator=generator),
            "answer_mask": torch.arange(n) > 3,
            "turn_ids": (torch.arange(n) > 3).long(),
        }
        for n in (9, 12, 8, 14)
    ]


def loss_of_logits(prediction):
    logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
    scored = labels[:, 1:] != -100
    found = logits[:, :-1].log_softmax(-1)[scored]
    return {"nll": float(-found.gather(-1, labels[:, 1:][scored][:, None]).mean())}


def test_logits_of_packed_rows_see_documents_apart(tmp_path):
    losses = {}
    for name, data in (("apart", samples()), ("packed", pack(samples(), 32))):
        trainer = FocusTrainer(
            model(),
            FocusArguments(str(tmp_path), **QUIET),
            eval_dataset=data,
            compute_metrics=loss_of_logits,
        )
        found, predicted = trainer.evaluate(), trainer.predict(data).metrics  # pyright: ignore
        assert predicted is not None
        losses[name] = [found["eval_loss"], found["eval_nll"], predicted["test_nll"]]
    # The Trainer keeps the sums of losses in float32, and eager softmax is float32.
    for values in losses.values():
        torch.testing.assert_close(values, [losses["apart"][1]] * 3, rtol=2e-6, atol=0)


def test_plain_training_arguments(tmp_path):
    args = TrainingArguments(str(tmp_path), **QUIET)
    for collator in (None, Collator(0)):
        with pytest.raises(DataError, match=r"remove_unused_columns=True, the default .*Focus"):
            FocusTrainer(model(), args, train_dataset=samples(), data_collator=collator)  # pyright: ignore
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **QUIET)
    assert FocusTrainer(model(), args, train_dataset=samples()).train_dataset  # pyright: ignore


# trl sets an option of transformers that is renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' is not supported .*plain cross entropy"),
        ({"router_aux_loss_coef": 0.01}, r"router_aux_loss_coef=0\.01 is not supported"),
    ],
)
def test_loss_options_of_trl_are_refused(tmp_path, option, text):
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from metafocus.trainer import FocusMixin

    class Trainer(FocusMixin, SFTTrainer):
        pass

    args = SFTConfig(str(tmp_path), **QUIET, **option)
    with pytest.raises(ProblemError, match=text):
        Trainer(model(), args)


def test_a_router_that_asks_for_its_own_loss_is_refused(tmp_path):
    routed = model()
    routed.config.output_router_logits = True
    with pytest.raises(ProblemError, match="output_router_logits=True asks for the auxiliary"):
        FocusTrainer(routed, FocusArguments(str(tmp_path), **QUIET), train_dataset=samples())
