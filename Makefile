# Two commands for a newcomer: `make demo` and `make test`. Both set everything up first, and skip that when it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Set TORCH_INDEX to a wheel index with CPU builds of torch where the default one serves CUDA builds.
TORCH_INDEX ?=
# Tests that run at a time, one process each.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup demo test lint types
setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt examples/consumers/package-lock.json
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[formats,dev]"
	$(BIN)/pip install -q --no-deps torchdistill==1.1.5   # an oracle of tests alone; its own requirements bring a CUDA build of torch
	@command -v npm >/dev/null || { echo "no npm: the JavaScript examples are not tested, and target browser cannot be measured"; exit 0; }; npm ci --silent --prefix examples/consumers || echo "npm ci failed: the JavaScript examples are not tested"
	touch $@

demo: setup
	$(BIN)/edgekd compress --teacher sam_nano --target host --data examples/photos --output runs/demo

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy edgekd
