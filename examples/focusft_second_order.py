"""FocuSFT with its exact gradient: what the first-order form leaves out, and what it costs.

The official code treats the adapted fast weights as constants: `mf.FirstOrder()`. In fact they
depend on the model through every inner step, and `mf.Unrolled(recompute=True)` differentiates this
dependence too. Moving the model along a direction shows which of the two is the derivative.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import metafocus as mf
from metafocus import params as pt
from metafocus.data import Collator, encode_chats, stdlib_qa

ESTIMATORS = {"first order": mf.FirstOrder(), "exact": mf.Unrolled(recompute=True)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("out/focusft_second_order"))
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    length, name = 256 if args.quick else 1024, args.model_name_or_path
    torch.manual_seed(args.seed)
    made = mf.models.load(name) if name else mf.models.small(stdlib_qa.texts(), max_length=length)
    model, tokenizer = made[0].double(), made[1]  # double: for differences of two losses
    chats = stdlib_qa.generate(tokenizer, n=2, context_tokens=length - 96, seed=args.seed)
    samples = encode_chats(chats, tokenizer, max_length=length).samples
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(samples)

    def meta(estimator, steps):
        # A new generator, so that each call begins with the same fast weights.
        fresh = torch.Generator().manual_seed(args.seed)
        solver = mf.SGD(1.0, steps, clip=mf.clip_per_tensor(1.0))
        return mf.recipes.focusft(model, solver=solver, estimator=estimator, generator=fresh)

    params, episode, rows = mf.trainable(model), mf.Episode(batch, batch), []
    for steps in (1, 2, 4):
        grads, seconds = {}, {}
        for name, estimator in ESTIMATORS.items():
            begin = time.perf_counter()
            grads[name] = mf.hypergrad(meta(estimator, steps))(params, episode)[0]
            seconds[name] = time.perf_counter() - begin
        first, exact = grads["first order"], grads["exact"]
        # How does the loss change along the direction in which the two differ?
        apart = pt.sub(exact, first)
        apart = pt.scale(apart, 1 / pt.norm(apart))
        moved = [pt.add(pt.detach(params), apart, h) for h in (1e-5, -1e-5)]
        with torch.no_grad():
            ahead, behind = (meta(ESTIMATORS["first order"], steps)(p, episode)[0] for p in moved)
        row = {"inner steps": steps, "slope of the loss": (ahead - behind).item() / 2e-5}
        row |= {f"slope by the {k} gradient": pt.dot(v, apart).item() for k, v in grads.items()}
        row["cosine"] = (pt.dot(first, exact) / pt.norm(first) / pt.norm(exact)).item()
        row["time, exact / first order"] = seconds["exact"] / seconds["first order"]
        rows.append(row)
        print("   ".join(f"{key} {value:.4g}" for key, value in row.items()))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "focusft_second_order.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
