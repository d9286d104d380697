# make demo and make test set up everything they need in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TRAIN := $(BIN)/metafocus train --data stdlib --samples 480 --max-length 320 --overwrite
TUNE := $(TRAIN) --model $(DEMO)/base --steps 60 --lr 5e-4 --seed 1234
# One thread: on a machine that others use too, two threads wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint docs reproduce benchmarks clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/metafocus compare --inner-steps 4 --output $(DEMO)
	@echo "--- a small base model, from nothing; then the same steps on it by two methods"
	$(TRAIN) --method sft --steps 200 --lr 3e-3 --seed 1 --output $(DEMO)/base
	$(TUNE) --method sft --output $(DEMO)/sft
	$(TUNE) --method focusft --rank 8 --output $(DEMO)/focusft
	$(BIN)/python examples/demo_report.py $(DEMO)/base $(DEMO)/sft $(DEMO)/focusft

test: $(VENV)/.dev
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
