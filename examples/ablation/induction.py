"""An initialisation in which two heads form an induction circuit (Olsson et al. 2022).

To find something in the context by what stands before it is what every task here needs, and what a
model learns late: small ones from random weights after tens of millions of tokens, longer than two
cores have. So a head of the first layer begins by looking at the token before, and a head of the
second by looking for a token that had the present one before it, and passes it on; if it finds
none, it rests on the first token of all, as heads of large models do (Guo et al. 2024). All weights
are trained, and training may undo it. Large models come by both by themselves; here they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD, BEFORE, MATCH, COPY, OUT = 0.06, 3.0, 2.0, 2.0, 0.05
REST = 9.0  # the score of the first token: above chance matches, below a true one


@torch.no_grad()
def plant_induction(model: nn.Module, first_token: int, generator: torch.Generator) -> None:
    """Initialise a Qwen2 with untied embeddings: small random matrices, and the circuit.

    Raises:
        ValueError: if the model is too narrow for the three directions of a head's size.
    """
    body, config = model.model, model.config
    size = body.layers[0].self_attn.head_dim
    if config.hidden_size < 3 * size:
        raise ValueError(f"hidden={config.hidden_size} is below {3 * size}: widen the model.")
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # What writes into the residual stream begins smaller, the deeper the model is.
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = SPREAD / (2 * config.num_hidden_layers) ** 0.5 if writes else SPREAD
            weight.normal_(0, scale, generator=generator)
    # Large beside what the layers add, so that each token still knows itself further up.
    body.embed_tokens.weight.normal_(0, 1, generator=generator)
    model.lm_head.weight.copy_(OUT * body.embed_tokens.weight)

    first, second = (layer.self_attn for layer in body.layers[:2])
    noise = torch.empty(config.hidden_size, config.hidden_size).normal_(generator=generator)
    now, before, passed = torch.linalg.qr(noise)[0][: 3 * size].split(size)
    head = slice(size)
    # Constant queries and keys: the rotation by position alone decides, and prefers one back.
    constant = torch.full((size,), BEFORE)
    first.q_proj.weight[head] = first.k_proj.weight[head] = 0
    first.k_proj.bias[head] = constant
    first.q_proj.bias[head] = rotated(constant, -1, config.rope_parameters["rope_theta"])
    first.v_proj.weight[head], first.o_proj.weight[:, head] = now, before.T
    second.q_proj.weight[head], second.k_proj.weight[head] = MATCH * now, MATCH * before
    second.v_proj.weight[head], second.o_proj.weight[:, head] = passed, COPY * passed.T
    # The first token has itself before it. Where the rotation is slow, that key is near from afar.
    key = MATCH * now @ body.embed_tokens.weight[first_token]
    slow = torch.arange(size) % (size // 2) >= size // 4
    second.q_proj.bias[head] = REST * size**0.5 * (key * slow) / (key * slow).square().sum()


def rotated(vector: Tensor, places: int, theta: float) -> Tensor:
    """Return a head's vector as rotary embedding turns it at a position."""
    half = len(vector) // 2
    angle = places * theta ** (-torch.arange(half) / half)
    x, y = vector[:half], vector[half:]
    return torch.cat((x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()))
