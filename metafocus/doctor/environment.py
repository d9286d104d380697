"""Versions, devices, and the attention kernels that are chosen here."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

import torch

from metafocus import masks
from metafocus.attention import span_attention
from metafocus.calls import inside, noting_into
from metafocus.doctor.findings import Finding
from metafocus.masks import Batch

PACKAGES = (
    *("transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy"),
    *("datasets", "trl", "triton", "flash-attn", "lm-eval"),
)
LENGTH, HEADS, WIDTH = 256, 4, 64
POLICIES = {"causal": masks.causal, "context-bidirectional": masks.context_bidirectional}


def versions(own: str) -> list[Finding]:
    """Return the versions of this package, of Python, and of the packages that it works with."""
    found = [Finding("metafocus", own), Finding("python", platform.python_version())]
    # The wheel's own metadata may leave out for which devices it was built, such as +cu130.
    found.append(Finding("torch", torch.__version__))
    for name in PACKAGES:
        try:
            found.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding(name, "not installed"))
    return found


def machine() -> list[Finding]:
    """Return the system, its processors and accelerators, and the compiler."""
    found = [
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"),
    ]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {about.major}.{about.minor}"
        found.append(Finding(f"cuda:{i}", f"{about.name}, {memory}, {capability}"))
    if not torch.cuda.is_available():
        found.append(Finding("cuda", f"none (torch was built for {torch.version.cuda or 'CPUs'})"))
    named = (os.environ.get("CXX", ""), "g++", "clang++")
    compiler = next((name for name in named if shutil.which(name)), None)
    found.append(Finding("C++ compiler", compiler or "none: mf.compiled needs one on a CPU"))
    return found


def kernels(device: torch.device) -> list[Finding]:
    """Return which kernel `span_attention(backend="auto")` takes, by mask and type."""
    found = []
    for name, policy in POLICIES.items():
        for dtype in types(device):
            q = torch.randn(1, HEADS, LENGTH, WIDTH, dtype=dtype, device=device)
            notes: dict[str, list[str]] = {}
            with inside(), noting_into(notes):
                span_attention(q, q, q, policy(turns(device)))
            kind = str(dtype).removeprefix("torch.")
            chosen = notes["attention"][0].removeprefix("over spans: ")
            found.append(Finding(f"{name}, {kind}", chosen))
    return found


def types(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the types that are of interest on a device."""
    half = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return (torch.float32, *half)


def turns(device: torch.device, length: int = LENGTH) -> Batch:
    """Return a batch of one row: two context turns, each with an answer."""
    turn = torch.arange(length, device=device)[None] // (length // 4)
    return {
        "input_ids": torch.zeros_like(turn),
        "attention_mask": torch.ones_like(turn),
        "turn_ids": turn,
        "answer_mask": turn % 2 == 1,
    }
