"""Fine-tune, be killed, resume, hand over: `python examples/finetune_and_resume.py [--steps 300]`.

Plain fine-tuning and FocuSFT on the standard-library set, each by `metafocus train CONFIG`, killed
at random steps and started again by the same command. Then the checkpoints are read as strangers
read them: by transformers, by PEFT and, where it is installed, by lm_eval. A failed check raises.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import metafocus as mf
from metafocus.cli.train import main as train
from metafocus.data import Collator
from metafocus.masks import causal
from metafocus.trainer import FocusTrainer, resumable


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything; return what was found, by method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps; %(default)s")
    parser.add_argument("--kills", type=int, default=3, help="how often to kill; %(default)s")
    parser.add_argument("--quick", action="store_true", help="12 steps, killed once, a tiny model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death; %(default)s")
    parser.add_argument("--output", type=Path, help="directory to keep; default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return _all(args, args.output or Path(folder))


def _all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(args.seed)
    steps, kills = (12, 1) if args.quick else (args.steps, args.kills)
    found = {}
    for method in ("sft", "focusft"):
        config = write_config(folder / method, method, steps, args.quick)
        start = time.perf_counter()
        trainer, found[method] = killed_and_resumed(config, steps, kills, chance)
        found[method] |= handed_over(trainer, folder / method)
        print(f"{method}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def write_config(folder: Path, method: str, steps: int, quick: bool) -> Path:
    """Write the file that `metafocus train` is given each time."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "method": method,
        "output_dir": str(folder / "run"),
        "resume_from_checkpoint": "true",
        "train_file": "stdlib",
        "max_train_samples": 24 if quick else 400,
        "vocab_size": 512 if quick else 2048,
        "hidden_size": 64,
        "num_hidden_layers": 2 if quick else 4,
        "max_length": 256,
        "max_steps": steps,
        "per_device_train_batch_size": 2 if quick else 4,
        "learning_rate": 1e-3,
        "warmup_steps": steps // 10,
        "logging_steps": 1,
        "save_steps": 3 if quick else 20,
        "save_total_limit": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# --- killed and resumed ------------------------------------------------------------------------


def killed_and_resumed(
    config: Path, steps: int, kills: int, chance: random.Random
) -> tuple[FocusTrainer, dict[str, Any]]:
    """Train to the end in spite of `kills` deaths; check that no step came out differently."""
    run, seen, deaths, again = config.parent / "run", {}, [], 0
    for i in range(kills):
        aim = chance.randint(1 + i * steps // kills, (i + 1) * steps // kills - 1)
        leg, code = leg_until(config, aim)
        if code != -signal.SIGKILL:
            raise AssertionError(f"the process was to be killed, and ended by itself with {code}.")
        again += _same(seen, leg)
        deaths.append((max(leg), _newest(run)))
    trainer = train([str(config)])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The history holds what was logged by dead processes before their last checkpoint, too.
    last = {int(entry["step"]): _printed(entry) for entry in logs}
    _same(seen, last)
    again += len([step for step in seen if deaths and deaths[-1][1] < step <= deaths[-1][0]])
    if sorted(last) != list(range(1, steps + 1)):
        raise AssertionError(f"steps are missing from the history: {sorted(last)}.")
    name = "plain fine-tuning" if trainer.focus.method == "sft" else "FocuSFT"
    dead = ", ".join(f"at step {step} (resumed from {place})" for step, place in deaths)
    print(
        f"{name}: {steps} steps, killed {dead}; {again} steps were run twice, with the same losses "
        f"and gradient norms; training loss {logs[0]['loss']:.3f} at the first step, "
        f"{logs[-1]['loss']:.3f} at the last",
        flush=True,
    )
    return trainer, {"deaths": deaths, "compared": again, "losses": [x["loss"] for x in logs]}


def leg_until(config: Path, aim: int) -> tuple[dict[int, dict[str, Any]], int]:
    """Run the command and kill it once it has logged step `aim`; return what it logged."""
    seen, step = {}, _newest(config.parent / "run")
    command = [sys.executable, "-m", "metafocus", "train", str(config)]
    with (config.parent / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{'loss'"):
                continue
            step += 1
            seen[step] = _printed(ast.literal_eval(line))
            if step == aim:
                process.kill()
        return seen, process.wait()


def _newest(run: Path) -> int:
    """The step that the next process resumes from."""
    with warnings.catch_warnings():
        # A checkpoint that a dead process was still writing is passed over.
        warnings.simplefilter("ignore", UserWarning)
        found = resumable(run)
    return int(found.name.split("-")[1]) if found else 0


def _printed(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry as the Trainer prints it, without what is measured by the clock."""
    kept = {k: v for k, v in entry.items() if k not in ("inner_time_share", "epoch", "step")}
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in kept.items()}


def _same(seen: dict[int, dict], later: dict[int, dict]) -> int:
    """Check that steps logged twice came out the same; return how many; remember the new ones."""
    twice = len(seen.keys() & later.keys())
    for step, entry in later.items():
        if seen.setdefault(step, entry) != entry:
            raise AssertionError(f"step {step} differs: {seen[step]} before, {entry} after.")
    return twice


# --- handed over -------------------------------------------------------------------------------


def handed_over(trainer: FocusTrainer, folder: Path) -> dict[str, Any]:
    """Check that plain transformers, PEFT and lm_eval read what the run has left."""
    run, sample = folder / "run", trainer.eval_dataset[0]  # pyright: ignore
    batch = Collator(trainer.processing_class.pad_token_id)([sample])  # pyright: ignore
    live = logits(trainer.model, batch)
    places = [run, run / f"checkpoint-{trainer.state.global_step}"]
    for place in places:
        plain = AutoModelForCausalLM.from_pretrained(place)
        if not torch.equal(logits(plain, batch), live):
            raise AssertionError(f"{place}: from_pretrained gives other logits than the trainer.")
    names = " and ".join(place.name for place in places)
    print(f"  transformers: {names} load, logits equal to the trainer's, bit for bit")
    found: dict[str, Any] = {"eval_loss": trainer.evaluate()["eval_loss"]}
    print(f"  held-out answer loss of the deployed model: {found['eval_loss']:.3f}")
    if trainer.focus.method == "focusft":
        found["as_trained"] = as_trained(trainer)
        print(f"  adapted on these answers, as in training: {found['as_trained']:.3f}")
    found["peft"] = exported(run, folder / "adapter", batch)
    found["lm_eval"] = evaluated(run, folder, trainer)
    return found


def as_trained(trainer: FocusTrainer) -> float:
    """The held-out loss with what training gives the model: fast weights that saw the answers."""
    meta = mf.recipes.focusft(trainer.model)  # pyright: ignore[reportArgumentType]
    collator, total, tokens = Collator(trainer.processing_class.pad_token_id), 0.0, 0  # pyright: ignore
    data: Any = trainer.eval_dataset
    for i in range(0, len(data), 4):
        batch = collator(data[i : i + 4])
        number = int(batch["answer_mask"].sum())
        loss, _ = meta({}, mf.Episode(batch, batch))
        total, tokens = total + loss.item() * number, tokens + number
    return total / tokens


def exported(run: Path, target: Path, batch: dict[str, Tensor]) -> float:
    """Adapt to a context, save the fast weights; return how far PEFT's logits are from ours."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(run)
    adapter = mf.LoRA(mf.top_layers(0.5, ("gate_proj", "up_proj", "down_proj")), rank=8, alpha=16.0)
    problem = mf.recipes.focusft_problem(
        model, adapter=adapter, mask=causal, inner_tokens=mf.context_tokens
    )
    solver = mf.SGD(1.0, steps=2, clip=mf.clip_per_tensor(1.0))
    slow = {name: p.detach() for name, p in model.named_parameters()}
    episode = problem.prepare(slow, mf.Episode(batch, batch))  # pyright: ignore
    fast = mf.adapt(problem, slow, episode.support, solver=solver).params
    with adapter.bind(model, fast):
        ours = logits(model, batch)
    moved = (ours - logits(model, batch)).abs().max().item()
    adapter.save(model, fast, target)
    theirs = logits(PeftModel.from_pretrained(model, str(target)), batch)
    error = (theirs - ours).abs().max().item()
    if not error <= 1e-4 * moved:
        raise AssertionError(f"PEFT: logits differ by {error:.1e}, adapted by {moved:.1e}.")
    print(f"  PEFT: adapter loads, logits differ by {error:.1e}; it moves them by {moved:.1e}")
    return error


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a causal model without padding."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False).logits


# --- lm_eval -----------------------------------------------------------------------------------


def evaluated(run: Path, folder: Path, trainer: FocusTrainer) -> dict[str, float] | None:
    """Let lm_eval score answers on a local task; check its likelihoods against transformers'."""
    if importlib.util.find_spec("lm_eval") is None:
        print("  lm_eval: absent (pip install 'metafocus[eval]'), not checked")
        return None
    # Whatever is not on this machine is not asked for.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tokenizer: Any = AutoTokenizer.from_pretrained(run)
    task = local_task(folder, tokenizer, trainer)
    results: dict[str, float] = {}
    plain = AutoModelForCausalLM.from_pretrained(run)
    for name, peft in (("model", None), ("model and adapter", str(folder / "adapter"))):
        lm = HFLM(str(run), device="cpu", peft=peft, batch_size=1, dtype="float32")
        scored = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
        assert scored is not None
        samples = scored["samples"][task["task"]]
        total = sum(sample["resps"][0][0][0] for sample in samples) / len(samples)
        results[name] = total
        if peft is None:
            for sample in samples:
                expected = likelihood(plain, tokenizer, sample["doc"])
                if abs(sample["resps"][0][0][0] - expected) > 1e-4 * abs(expected):
                    raise AssertionError(f"lm_eval: {sample['resps']}, transformers: {expected}.")
    print(
        f"  lm_eval {importlib.metadata.version('lm_eval')}: mean log-likelihood of "
        f"{len(samples)} answers {results['model']:.2f}, each as transformers computes it; with "
        f"the PEFT adapter of one context {results['model and adapter']:.2f}"
    )
    return results


def local_task(folder: Path, tokenizer: Any, trainer: FocusTrainer) -> dict[str, Any]:
    """A task of lm_eval from held-out samples: the likelihood of the answer after its prompt."""
    path = folder / "task.jsonl"
    with path.open("w") as file:
        for i in range(min(len(trainer.eval_dataset), 8)):  # pyright: ignore
            sample = trainer.eval_dataset[i]  # pyright: ignore
            first = int(sample["answer_mask"].int().argmax())
            ids = sample["input_ids"].tolist()
            prompt, answer = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])
            # lm_eval counts spaces at the end of a prompt as the answer's.
            space = prompt[len(prompt.rstrip()) :]
            record = {"prompt": prompt.rstrip(), "answer": space + answer}
            file.write(json.dumps(record) + "\n")
    return {
        "task": "stdlib_answers",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


def likelihood(model: Any, tokenizer: Any, doc: dict[str, str]) -> float:
    """The log-likelihood of an answer after its prompt."""
    first = len(tokenizer(doc["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(doc["prompt"] + doc["answer"])["input_ids"]])
    scores = logits(model, {"input_ids": ids})[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[first - 1 :].sum().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
