# make demo and make test set up everything they need in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TRAIN := $(BIN)/metafocus train --data stdlib --steps 120 --samples 480 --max-length 320 \
	--lr 2e-3 --rank 8 --seed 1234 --overwrite
# The tests run in two processes of one thread each: on two cores that beats one of two threads.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/metafocus compare --inner-steps 4 --output $(DEMO)
	$(TRAIN) --method sft --output $(DEMO)/sft
	$(TRAIN) --method focusft --output $(DEMO)/focusft
	$(BIN)/python examples/demo_report.py $(DEMO)/sft $(DEMO)/focusft

test: $(VENV)/.dev
	$(TEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache .hypothesis
