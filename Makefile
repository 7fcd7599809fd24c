# `make demo` and `make test` do everything on a fresh machine: they make .venv and install into it.
# To use an environment that you have, name its python: `make test-gpu PYTHON=python3`.
PYTHON ?= .venv/bin/python
TORCH ?= torch==2.13.0
SETUP := $(filter .venv/bin/python,$(PYTHON))

.PHONY: demo test test-gpu lint

demo: $(SETUP)
	$(PYTHON) -m tq_inductor.cli demo

# One thread for each of the two workers: tensors are tiny, and threads that wait for work spin.
test: $(SETUP) lint
	OMP_NUM_THREADS=1 $(PYTHON) -P -m pytest -m "not gpu" -n 2 --dist worksteal

test-gpu: $(SETUP)
	$(PYTHON) -P -m pytest -m gpu -n 10

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/types && $(PYTHON) -m pip install -q --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(PYTHON) -m mypy

.venv/bin/python: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip setuptools
	.venv/bin/python -m pip install -q "$(TORCH)"
	.venv/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@
