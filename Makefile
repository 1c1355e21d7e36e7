# `make demo` and `make test` each work as the first command after cloning: they create .venv when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test quick zoo lint docs scenes benchmark transitions pipelines gpu clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# Each worker on one thread: two that share the threads of torch wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not zoo"

# What every pipeline class does, with its rows, micro-batches and widths, at length: a quarter of an hour on 2 cores.
zoo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m zoo

# Without the pipeline zoo and whatever takes seconds: for the edit loop.
quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not zoo"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site, in site/index.html: offline, and any warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q docs site

# Retrain the embedded model: about four hours on one CPU core.
scenes: $(READY)
	cd examples && ../$(BIN)/python -m scenes.train

# Steering against best-of-N at 160 network calls, with the settings that were chosen: the table in README.md.
benchmark: $(READY)
	$(BIN)/python examples/benchmarks/steering.py report --budgets 160

# Distance to the true law against network calls: the figure and the tables of docs/solvers.md.
transitions: $(READY)
	cd examples/benchmarks && ../../$(BIN)/python transitions.py

# What works in which of diffusers' pipeline classes: the table of docs/pipelines.md.
pipelines: $(READY)
	cd tests && ../$(BIN)/python -m zoo.survey

# What steps, steering and twists cost at the sizes of public models: at most 8 minutes on one GPU (docs/gpu.md).
gpu: $(READY)
	@$(BIN)/python examples/benchmarks/gpu.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
