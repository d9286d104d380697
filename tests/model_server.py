"""A model behind OpenAI's chat completions API: its chat template, its context, real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
from openai_server import Reply


def model_replies(model: Any, tokenizer: Any, context: int) -> Callable[[dict, int], Reply]:
    """A function for `openai_server.serving`, by transformers' own template and `generate`.

    Requests that come at the same time wait for each other, as they do on one device.
    """
    device = threading.Lock()

    @torch.no_grad()
    def reply(body: dict[str, Any], number: int) -> Reply:
        given = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        size = given["input_ids"].shape[1]
        if size + body["max_tokens"] > context:
            message = (
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{size + body['max_tokens']} tokens. Please reduce the length of the messages."
            )
            error = {"message": message, "type": "BadRequestError", "code": 400}
            return 400, json.dumps({"error": error})
        sampling: dict[str, Any] = {"do_sample": False}
        if body["temperature"] > 0:
            sampling = {"do_sample": True, "temperature": body["temperature"], "top_k": 0}
        with device:
            torch.manual_seed(body["seed"])
            ids = model.generate(
                **given, max_new_tokens=body["max_tokens"], pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )  # fmt: skip
        return tokenizer.decode(ids[0, size:], skip_special_tokens=True)

    return reply
