"""What `metafocus train` says and leaves behind: lines on the screen, and the report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from metafocus.cli.callbacks import key
from metafocus.cli.settings import Settings
from metafocus.comparison.report import environment
from metafocus.files import write_json
from metafocus.trainer.checkpoints import saving
from metafocus.trainer.config import FocusArguments, FocusOptions
from metafocus.trainer.evaluation import ways
from metafocus.trainer.trainer import FocusTrainer

REPORT = "metafocus.json"


def placed(paths: tuple[str, ...], model: Any) -> str:
    """Return a sentence about the modules that have fast weights."""
    ends = Counter(path.rpartition(".")[2] for path in paths)
    text = f"fast weights in {len(paths)} modules: {', '.join(f'{n} {k}' for k, n in ends.items())}"
    config = model.config.get_text_config()
    experts = any(getattr(config, f"num_{kind}", 0) for kind in ("experts", "local_experts"))
    if experts and paths and all("shared" in path or "experts" not in path for path in paths):
        text += "; the routed experts have none, because their weights are no linear modules"
    return text


def finish(
    trainer: FocusTrainer, settings: Settings, metrics: dict[str, float], output: Path
) -> None:
    """Save the model and its report, and say what has changed."""
    report = _report(trainer, settings, metrics["train_runtime"])
    _save(trainer, metrics, report, output)
    say(settings.args, _changed(report, trainer.state.log_history, output))
    say(settings.args, _inner_warning(trainer.state.log_history))


def _report(trainer: FocusTrainer, settings: Settings, seconds: float) -> dict[str, Any]:
    args, history = settings.args, trainer.state.log_history
    measured = [entry for entry in history if key("deployed") in entry]
    before, after = (
        {name: entry[key(name)] for name in ways(args)} for entry in (measured[0], measured[-1])
    ) if measured else (None, None)  # fmt: skip
    values = {k: v for part in settings[:3] for k, v in vars(part).items()}
    names = settings.given | {f.name for f in dataclasses.fields(FocusOptions)}
    return {
        "method": args.method,
        "mask": args.mask_name(),
        "estimator": args.estimator if args.method == "focusft" else None,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "settings": {name: values[name] for name in sorted(names)},
        "environment": environment(next(trainer.model.parameters()).dtype),  # pyright: ignore
    }


def _save(
    trainer: FocusTrainer, metrics: dict[str, float], report: dict[str, Any], output: Path
) -> None:
    # The report comes last: where it is, the checkpoint beside it is whole.
    with saving(output, "the checkpoint"):
        if trainer.is_world_process_zero():
            (output / REPORT).unlink(missing_ok=True)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", metrics)
        if report["heldout_loss_after"]:
            losses = {key(name): loss for name, loss in report["heldout_loss_after"].items()}
            trainer.save_metrics("eval", losses)
        if trainer.is_world_process_zero():
            write_json(output / REPORT, report)


def _changed(report: dict[str, Any], history: list[dict[str, Any]], output: Path) -> str:
    before, after = report["heldout_loss_before"], report["heldout_loss_after"]
    if after:
        changes = [f"{before[name]:.4f} -> {after[name]:.4f} ({name})" for name in after]
        text = f"held-out loss {', '.join(changes)}"
    else:
        losses = [entry["loss"] for entry in history if "loss" in entry]
        text = f"training loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "no loss logged"
    return f"{text}; {report['steps']} steps in {report['seconds']:.0f} s; saved in {output}"


def _inner_warning(history: list[dict[str, Any]]) -> str:
    """Return what to say of inner steps that raise the inner loss; nothing if few do."""
    # The loss after the last step is known only where both losses score the same tokens.
    shares = [entry["last_step_rose"] for entry in history if "last_step_rose" in entry]
    rose = [
        entry["inner_loss_last"] > entry["inner_loss_first"]
        for entry in history
        if "inner_loss_first" in entry
    ]
    if sum(rose) > len(rose) / 2:
        found = "the inner loss rose in most steps"
    elif shares and (share := sum(shares) / len(shares)) > 0.1:
        found = f"the last inner step raised the inner loss in {share:.0%} of the batches"
    else:
        return ""
    return (
        f"warning: {found}. First-order hypergradients cannot be trusted there. Lower --inner_lr "
        "or --inner_steps."
    )


def say(args: FocusArguments, text: str) -> None:
    """Print a text once, whatever the number of processes; nothing if it is empty."""
    if text and args.process_index == 0:
        print(text, flush=True)
