# Every target sets its environment up by itself: a virtual environment in .venv, installed again when setup.cfg changes.
#   make PYTHON=python3.11 ...        choose the interpreter (3.10 or newer)
#   make PIP_ARGS="..." setup         further arguments for pip install, such as an index of CPU-only builds of torch

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
# The folders import as nextflow.<folder>, and so mypy has to meet the checkout under that name.
TYPED := $(abspath $(VENV))/typed
PACKAGES := callbacks datamodules diagnosis evaluation generation kernels lightning_modules models planning rewards sequence

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint

help:
	@echo "make quickstart   the whole pipeline on a CPU: data, tokenizer, transformer, pictures (ARGS=\"--only 3 --force\")"
	@echo "make test         lint, types, then the tests (ARGS=\"-k layout\" goes to pytest)"
	@echo "make lint         ruff and mypy"
	@echo "make setup        the environment in $(VENV) alone"

setup: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no '$(PYTHON)'; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: NextFlow needs Python 3.10 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); } || \
		{ echo "error: $(PYTHON) -m venv failed; Debian and Ubuntu keep it in the package python3-venv"; exit 1; }
	@echo "== installing NextFlow and its dependencies into $(VENV) (torch is large: minutes the first time)"
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python quickstart.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(TYPED) && ln -sfn $(CURDIR) $(TYPED)/nextflow
	cd $(TYPED) && MYPYPATH=$(TYPED) $(BIN)/mypy --config-file $(CURDIR)/setup.cfg --cache-dir $(CURDIR)/.mypy_cache \
		$(addprefix -p nextflow.,$(PACKAGES)) -m nextflow.main -m nextflow.quickstart

# The script `pytest`, not `python -m pytest`, which would put this folder and so our `kernels` on sys.path.
test: lint
	$(BIN)/pytest $(ARGS)
