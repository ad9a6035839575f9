# Two commands do all the set-up on a fresh machine: make quickstart, make test.
# Python 3.11 is taken where there is one, with the versions of constraints.txt; another Python
# gets the newest versions.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PINS := $(shell $(PYTHON) -c "import sys; print('--constraint constraints.txt' * (sys.version_info[:2] == (3, 11)))")
SOURCES := pyproject.toml setup.py README.md $(shell find tf_lbopt official_recipes -type f -not -name '*.pyc' 2>/dev/null)
# Tests import the installed package, so pytest is called as a script: `python -m` adds this folder.
PYTEST := TF_LBOPT_INSTALLED=1 $(BIN)/pytest
# A test that hangs ends its process after so many seconds, with the stacks of its threads.
LIMIT ?= 900
JOBS ?= 2
# For `make recipes`: a folder of small real data sets, or nothing.
DATA ?= $(wildcard ../shared/data)
PRINT_PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
MKDOCS := NO_MKDOCS_2_WARNING=1 TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= .venv-docs/bin/mkdocs

.PHONY: setup quickstart recipes evidence batch-size test test-all matrix lint types format benchmark tpu-check docs docs-serve clean

setup: .venv/.installed

.venv/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on $(PINS) build
	$(BIN)/python -m pip install --quiet --progress-bar on $(PINS) '.[recipes,dev]'
	touch $@

.venv/.installed: .venv/.dependencies $(SOURCES)
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist . >dist.log 2>&1 || { cat dist.log; exit 1; }
	rm -f dist.log
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	touch $@

quickstart: setup
	$(BIN)/python -m official_recipes.quickstart

recipes: setup
	$(BIN)/python -m official_recipes.small_runs $(if $(DATA),--data_dir=$(DATA))

evidence: setup
	$(BIN)/python -m benchmarks.study --render

# Without DATA the page alone is filled again.
batch-size: setup
	$(BIN)/python -m benchmarks.batch_size $(if $(DATA),--data_dir=$(DATA)) --render

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# What each of the two runs is in docs/testing.md.
test: lint types
	$(PYTEST) -n $(JOBS) --dist worksteal --durations=40 -m 'not long' -o faulthandler_timeout=$(LIMIT) tests

test-all: lint types
	$(PYTEST) -n $(JOBS) --dist worksteal tests

# Other versions, in environments of their own: all, or those whose names fit ONLY (a regex).
matrix: setup
	$(BIN)/python -m tests.matrix --only='$(ONLY)'

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup
	$(BIN)/python -m benchmarks.update_time

# The TPU's compiler, in an environment of its own; needs Python 3.11 or later.
.venv-tpu/.installed: benchmarks/tpu_check/requirements.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --progress-bar on --requirement $<
	touch $@

# Updates compiled for a TPU: all, or those whose names fit ONLY (a regex).
tpu-check: setup .venv-tpu/.installed
	$(BIN)/python -m benchmarks.tpu_check --only='$(ONLY)'

# MkDocs in an environment of its own, which finds the package and TensorFlow in the other one.
.venv-docs/.installed: .venv/.dependencies
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --progress-bar on $(PINS) --group docs
	$(BIN)/python -c $(PRINT_PACKAGES) >$$(.venv-docs/bin/python -c $(PRINT_PACKAGES))/package.pth
	touch $@

# The documentation as a site, in build/site; with `docs-serve` on a local port, anew at each change.
docs: setup .venv-docs/.installed
	$(MKDOCS) build --clean

docs-serve: setup .venv-docs/.installed
	$(MKDOCS) serve

clean:
	rm -rf .venv .venv-docs .venv-tpu build dist *.egg-info runs
