# Each target does its own set-up. The virtual environment is .venv; `make VENV=/elsewhere test` puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks
# Processes that share the tests, a file to one of them; two more than two cores have, as tests of killed commands wait.
# 0 runs them in one, with its output as it comes.
TEST_WORKERS ?= 4

# Commands that are started many times keep what Python has compiled of them.
export PYTHONDONTWRITEBYTECODE :=

# Threads that wait sleep: those that spin stand still on busy cores (docs/speed.md).
export OMP_WAIT_POLICY ?= PASSIVE

DEV_EXTRAS := train,eval,dicom,shards,remote,ray,demo,notebooks,docs,dev

.PHONY: help install dev quickstart demo test floors wheel lint format docs clean

help:
	@echo "make install      install all that training, demo and tests need; the others do their part of it by themselves"
	@echo "make quickstart   train a small model on the bundled phantoms, generate, write outputs/quickstart/report.html"
	@echo "make demo         open the demo on the bundled model: variations, blends and segments in a browser"
	@echo "make test         install what the tests need and run them"
	@echo "make floors       run the tests with the oldest versions of all packages that pyproject.toml allows"
	@echo "make wheel        build dist/, install only the wheel in an empty environment, run README and commands there"
	@echo "make lint         check style; make format mends what can be mended"
	@echo "make docs         build the documentation into site/"

install: dev $(VENV)/.installed-train $(VENV)/.installed-demo

dev: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed-train
	@echo "== Training on the bundled phantoms; about five minutes on two cores =="
	$(BIN)/python examples/quickstart.py --output_dir outputs/quickstart

demo: $(VENV)/.installed-demo
	$(BIN)/diffusers-dino demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	@echo "== Running the tests =="
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

floors: $(VENV)-floors/.installed
	$(VENV)-floors/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

wheel: $(VENV)/.installed-dev
	rm -rf build dist $(VENV)-wheel
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(echo dist/*.whl)[eval,shards]"
	$(VENV)-wheel/bin/python tests/run_wheel.py
	@ls -l dist

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

clean:
	rm -rf $(VENV) $(VENV)-floors $(VENV)-wheel outputs site build dist .pytest_cache .ruff_cache

$(BIN)/python:
	@echo "== Creating the virtual environment $(VENV) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "diffusers-dino needs Python >= 3.10; name one with 'make PYTHON=python3.11 $(MAKECMDGOALS)'."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is written only after its installation went through, so a broken one is done again. Not to compile saves a
# minute: Python compiles what it imports, which is little of it.
$(VENV)/.installed-train: EXTRAS = train
$(VENV)/.installed-demo: EXTRAS = demo,dicom
$(VENV)/.installed-dev: EXTRAS = $(DEV_EXTRAS)
$(VENV)/.installed-docs: EXTRAS = docs
$(VENV)/.installed-%: $(BIN)/python pyproject.toml
	@echo "== Installing diffusers-dino[$(EXTRAS)] into $(VENV); PyTorch is large, this takes minutes the first time =="
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)-floors/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-floors
	$(VENV)-floors/bin/python -m pip install --quiet uv
	$(VENV)-floors/bin/uv pip install --quiet --python $(VENV)-floors/bin/python --resolution lowest-direct \
		--editable '.[$(DEV_EXTRAS)]'
	@touch $@
