"""Real processes that share sequences: `python sequence_script.py RANKS DIR PART`.

One process computes every case of a part alone; then RANKS processes compute it together. Each
writes what it found to DIR: `alone.pt`, `rank0.pt`, and so on.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

import architectures
from models import build_exact, chat_batch, grads
from processes import environments, failed, forked

import metafocus as mf
from metafocus.attention import register, ulysses_attention
from metafocus.parallel import average_over_groups, replicated, sequence_group, summed
from metafocus.trainer.distributed import parametrise

# A rank that waits longer ends with an error, and its test fails: nothing hangs.
WAIT = datetime.timedelta(seconds=60)
LORA = mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), rank=2, alpha=4.0)
EVERYWHERE = mf.LoRA(mf.all_linear, rank=2, alpha=4.0)
FULL = mf.FullWeights(mf.matching(".*down_proj"))
SECOND = mf.Unrolled(recompute=True)


# --- one meta loss ---------------------------------------------------------------------------


def meta(group, batch=None, *, family="qwen2", attn="sdpa", model=None, **settings):
    """The loss, inner losses, adapted weights and gradient of FocuSFT on one batch."""
    options = {"layers": 2, **(model or {})}
    network = build_exact(family=family, attn=attn, **options)
    settings = {"adapter": EVERYWHERE, "generator": torch.Generator().manual_seed(5), **settings}
    batch = chat_batch(24) if batch is None else batch
    loss = mf.recipes.focusft(network, sequence_group=group, **settings)
    value, aux = loss({}, mf.Episode(batch, batch))
    value.backward()
    adapted = [x.flatten() for x in aux.params.values()]
    return {
        "loss": value.detach(),
        "inner losses": aux.inner_losses,
        "fast": torch.cat(adapted) if adapted else torch.ones(1),
        "gradient": grads(network),
    }


def packed(length: int = 24):
    """Rows of two documents each, with a boundary that is no boundary between ranks."""
    batch = chat_batch(length)
    documents = (torch.arange(length) >= 13).long().expand(2, -1)
    return {**batch, "document_ids": torch.where(batch["attention_mask"] == 1, documents, -1)}


def left_padded():
    batch = chat_batch(24)
    return {name: x.roll(4, -1) for name, x in batch.items()} | {
        "attention_mask": batch["attention_mask"].roll(4, -1)
    }


def one_row():
    return {name: x[:1] for name, x in chat_batch(24).items()}


def late_answer():
    """Only the last of the ranks has a scored token."""
    batch = one_row()
    answers = torch.zeros_like(batch["answer_mask"])
    answers[:, -2:] = True
    return {**batch, "answer_mask": answers}


def own_parametrization(group):
    """Weights that a parametrization of the model's own makes of others."""
    network = build_exact(layers=2)
    for layer in network.model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)
    loss = mf.recipes.focusft(network, adapter=LORA, estimator=SECOND, sequence_group=group)
    value, _ = loss({}, mf.Episode(chat_batch(), chat_batch()))
    value.backward()
    return {"loss": value.detach(), "gradient": grads(network)}


def gradient_of(group, loss_of):
    """The value and gradient of a language-model loss whose slow weights are the model's own."""
    network = build_exact(layers=2)
    fast = {k: torch.full_like(x, 0.1) for k, x in LORA.init(network).items()}
    loss = mf.lm_loss(
        network, adapter=LORA, mask=mf.masks.context_bidirectional, sequence_group=group
    )
    value = loss_of(loss, fast, chat_batch())
    if value.requires_grad:
        value.backward()
    return {"loss": value.detach(), "gradient": grads(network)}


@torch.no_grad()
def evaluated(loss, fast, batch):
    return loss(fast, {}, batch)


def transformed(group, adapter, order):
    """The gradient by torch.func.grad."""
    network = build_exact(layers=2)
    loss = mf.recipes.focusft(network, adapter=adapter, estimator=order, sequence_group=group)
    episode = mf.Episode(chat_batch(), chat_batch())
    found = torch.func.grad(lambda outer: loss(outer, episode)[0])(
        {k: p.detach() for k, p in network.named_parameters()}
    )
    return {"gradient": torch.cat([x.flatten() for x in found.values()])}


def half(group, order):
    """In bfloat16 weights, the loss and the gradient of one step."""
    return meta(group, model={"dtype": torch.bfloat16}, estimator=order)


def sharded(group, how, order=None, seed=0, **changes):
    """The gradient of a sharded model, whole; its shards lie on all ranks."""
    network = build_exact(layers=2, **changes)
    if group is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if how == "parametrised":
            parametrise(network, mesh, sequence_group=group)
        else:
            for module in (*network.model.layers, network):
                fully_shard(module, mesh=mesh)
            average_over_groups(network, group)
    draw = torch.Generator().manual_seed(5)
    loss = mf.recipes.focusft(
        network, adapter=LORA, generator=draw, estimator=order, sequence_group=group
    )
    batch = chat_batch(seed=seed)
    value, aux = loss({}, mf.Episode(batch, batch))
    value.backward()
    whole = [
        (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).flatten()
        for p in network.parameters()
    ]
    found = {"loss": value.detach(), "inner losses": aux.inner_losses, "gradient": torch.cat(whole)}
    return found | {"fast": torch.cat([x.flatten() for x in aux.params.values()])}


MASKS = {
    "causal": mf.masks.causal,
    "full": mf.masks.full,
    "prefix": mf.masks.prefix_lm,
    "turns": mf.masks.context_bidirectional,
    "window": mf.masks.sliding_window(5),
}
ORDERS = {"first order": None, "second order": SECOND}

POLICIES = {
    f"{mask}, {order}": lambda group, mask=mask, order=order: meta(
        group, mask=MASKS[mask], estimator=ORDERS[order]
    )
    for mask in MASKS
    for order in ORDERS
}

SETTINGS = {
    "odd length": {"batch": chat_batch(23)},
    "packed": {"batch": packed()},
    "left padding": {"batch": left_padded(), "mask": mf.masks.causal},
    "late answer": {"batch": late_answer()},
    "per example": {"per_example": True},
    "shared prefix": {"adapter": LORA},
    "checkpointing": {"model": {"checkpointing": True}},
    "tiled": {"attn": "metafocus_ulysses"},
    "windows of layers": {"family": "mistral", "mask": mf.masks.causal},
    "no fast weights": {"adapter": mf.NoAdapter()},
    "full weights": {"adapter": FULL},
    "context tokens": {"inner_tokens": mf.context_tokens},
    "graph": {"estimator": mf.Unrolled()},
    "implicit": {"estimator": mf.Implicit(mf.CG(steps=3, damping=1.0))},
    "finite differences": {"estimator": mf.Unrolled(hvp=mf.hvp_finite(1e-4))},
    "untied head": {"model": {"tied": False}},
}

WHOLE = {
    name: lambda group, name=name: meta(group, **{"estimator": SECOND, **SETTINGS[name]})
    for name in SETTINGS
} | {
    "own weights": lambda group: gradient_of(group, lambda loss, f, batch: loss(f, {}, batch)),
    "evaluation": lambda group: gradient_of(group, evaluated),
    "own parametrization": own_parametrization,
    "torch.func": lambda group: transformed(group, LORA, SECOND),
    "torch.func, full weights": lambda group: transformed(group, FULL, SECOND),
    "bfloat16, first order": lambda group: half(group, None),
}


# --- attention alone -------------------------------------------------------------------------


def attention(group, heads: int, keys: int, backend: str, **options):
    """This rank's outputs, and first and second derivatives, of attention over turns."""
    torch.manual_seed(0)
    length, ranks = 48, 1 if group is None else dist.get_world_size(group)
    shapes = [(2, h, length, 8) for h in (heads, keys, keys, heads)]
    whole = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    stop = torch.cat([torch.full((16,), 16), torch.arange(17, 33), torch.full((16,), 48)])
    spans = mf.Spans(torch.zeros(1, length, dtype=torch.long), stop[None])
    rank = 0 if group is None else dist.get_rank(group)
    q, k, v, u = (x.chunk(ranks, 2)[rank].clone().requires_grad_() for x in whole)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 1, heads, dtype=torch.float64)
    out = ulysses_attention(q, k, v, spans, group, backend=backend, **options)
    first = torch.autograd.grad((torch.tanh(out) * u).sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum((x**2).sum() for x in first), (q, k, v))
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), first, strict=True))}
    found |= dict(zip(("ddq", "ddk", "ddv"), second, strict=True))
    return {name: x.detach() for name, x in found.items()}


ATTENTION = {
    f"{heads} heads, {keys} key heads, {backend}{', caps and sinks' * capped}": (
        lambda group, heads=heads, keys=keys, backend=backend, capped=capped: attention(
            group, heads, keys, backend, **({"softcap": 3.0, "sinks": True} if capped else {})
        )
    )
    for heads, keys in ((4, 4), (4, 2), (4, 1), (12, 4))
    for backend in ("dense", "tiled")
    for capped in (False, True)
}

SHARDED = {
    "fsdp2, first order": lambda group: sharded(group, "fsdp2"),
    "fsdp2, untied": lambda group: sharded(group, "fsdp2", tied=False),
    "parametrised, first order": lambda group: sharded(group, "parametrised"),
    "parametrised, second order": lambda group: sharded(group, "parametrised", SECOND),
    "parametrised, untied": lambda group: sharded(group, "parametrised", SECOND, tied=False),
}


def groups(group, how, order):
    """The mean gradient over groups of which each has a batch of its own."""
    if group is not None:
        seed = dist.get_rank() // dist.get_world_size(group)
        return {"gradient": sharded(group, how, order, seed)["gradient"]}
    each = [sharded(None, how, order, seed)["gradient"] for seed in range(2)]
    return {"gradient": torch.stack(each).mean(0)}


GROUPS = {
    name: lambda group, how=how, order=order: groups(group, how, order)
    for name, how, order in (
        ("groups, fsdp2", "fsdp2", None),
        ("groups, parametrised", "parametrised", SECOND),
    )
}


def architecture(group, name):
    """The loss and the exact hypergradient of a small model, or why it cannot share sequences."""
    register()
    try:
        network = architectures.build(name)
        if name in ("gemma2", "gpt_oss", "vaultgemma"):
            # transformers has soft caps and sinks in eager attention only.
            network.set_attn_implementation("metafocus_ulysses")
        loss = mf.recipes.focusft(
            network, adapter=architectures.ADAPTER, estimator=SECOND, sequence_group=group,
            generator=architectures.generator(),
        )  # fmt: skip
        batch = architectures.batch()
        value, aux = loss({}, mf.Episode(batch, batch))
        value.backward()
    except mf.errors.MetafocusError as error:
        return {"refused": str(error)}
    return {"loss": value.detach(), "inner losses": aux.inner_losses, "gradient": grads(network)}


ARCHITECTURES = {
    name: lambda group, name=name: architecture(group, name)
    for name in (*architectures.MASKED, *architectures.CAUSAL)
}


# --- what is refused -------------------------------------------------------------------------


def one_attention(group, transform):
    q = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64)
    causal = mf.Spans(torch.zeros(1, 12, dtype=torch.long), torch.arange(1, 13)[None])
    return transform(lambda x: ulysses_attention(x, x, x, causal, group).sum(), q)


def batched_gradients(fn, q):
    x = q[0].clone().requires_grad_()
    torch.autograd.grad(fn(x)[None], x, torch.ones(3, 1, dtype=x.dtype), is_grads_batched=True)


def different_batches(group):
    meta(group, batch=chat_batch(24, seed=dist.get_rank(group)))


def different_starts(group):
    meta(group, generator=torch.Generator().manual_seed(dist.get_rank(group)))


def different_lengths(group):
    meta(group, batch=chat_batch(24 + 4 * dist.get_rank(group)))


def of_another_way(group, how):
    """A sharded model that was not told which ranks share sequences."""
    network = build_exact(layers=2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    {"fsdp2": fully_shard, "parametrised": parametrise}[how](network, mesh=mesh)
    mf.recipes.focusft(network, sequence_group=group)({}, mf.Episode(chat_batch(), chat_batch()))


def mixing_tokens(group):
    """A model in which a token also sees its neighbour outside of attention."""
    network = build_exact(layers=2)
    network.model.embed_tokens.register_forward_hook(lambda m, args, out: out + out.roll(1, 1))
    mf.recipes.focusft(network, sequence_group=group)({}, mf.Episode(chat_batch(), chat_batch()))


THREE = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
REFUSED = {
    "heads": lambda group: meta(group, model=THREE),
    "vmap": lambda group: one_attention(group, lambda fn, q: torch.vmap(fn)(q)),
    # torch itself refuses these two.
    "batched gradients": lambda group: one_attention(group, batched_gradients),
    "batched sums": lambda group: one_attention(
        group, lambda fn, q: batched_gradients(lambda x: replicated(x, group).sum(), q)
    ),
    "jvp": lambda group: one_attention(
        group, lambda fn, q: torch.func.jvp(fn, (q[0],), (torch.ones_like(q[0]),))
    ),
    "hvp_forward": lambda group: meta(group, estimator=mf.Unrolled(hvp=mf.hvp_forward)),
    "eager": lambda group: meta(group, attn="eager"),
    "dropout": lambda group: meta(group, model={"attention_dropout": 0.1}),
    "different batches": different_batches,
    "different lengths": different_lengths,
    "different starts": different_starts,
    "mixing tokens": mixing_tokens,
    "fsdp2": lambda group: of_another_way(group, "fsdp2"),
    "parametrised": lambda group: of_another_way(group, "parametrised"),
    "size": lambda group: sequence_group(dist.get_world_size() + 1),
}


def absent(group):
    """Only the first rank enters a sum over all of them."""
    if group is None:
        return {}
    few = sequence_group(dist.get_world_size(), timeout=datetime.timedelta(seconds=2))
    if dist.get_rank():
        return {}
    try:
        summed(torch.ones(1), few)
    except RuntimeError as error:
        return {"RuntimeError": str(error)}
    return {}


def refusal(case, group) -> dict[str, str]:
    if group is None:
        return {}
    try:
        case(group)
    except (mf.errors.MetafocusError, RuntimeError) as error:
        return {type(error).__name__: str(error)}
    return {}


PARTS = {
    "quick": {**ATTENTION, **{name: POLICIES[name] for name in POLICIES if "turns" in name}},
    "policies": POLICIES,
    "settings": WHOLE,
    "sharded": SHARDED,
    "groups": GROUPS,
    "architectures": ARCHITECTURES,
    "absent": {"absent": absent},
    "refused": {
        name: lambda group, case=case: refusal(case, group) for name, case in REFUSED.items()
    },
}


# --- processes -------------------------------------------------------------------------------


def main(ranks: int, folder: Path, part: str) -> int:
    pids = [forked(lambda: torch.save(found(part, None), folder / "alone.pt"))]
    for rank, env in enumerate(environments(ranks)):
        pids.append(forked(lambda rank=rank: together(rank, ranks, folder, part), env))
    return int(failed(pids))


def together(rank: int, ranks: int, folder: Path, part: str) -> None:
    dist.init_process_group("gloo", timeout=WAIT)
    # As a part of two groups, or all ranks together.
    group = sequence_group(ranks // 2 if part == "groups" else ranks, timeout=WAIT)
    torch.save(found(part, group), folder / f"rank{rank}.pt")
    dist.barrier()


def found(part: str, group) -> dict:
    """What each case found."""
    return {name: case(group) for name, case in PARTS[part].items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
