# `make` alone prints the targets. Needs make and Python 3.11 or newer; uses uv for speed where it is on the PATH.
#   make train ARGS="algorithm=grpo seed=3"     overrides in Hydra's grammar
#   make train CHECKPOINT=best                  which checkpoint of the run is evaluated
#   make test ARGS="tests/objective -k tied"    arguments of pytest
#   make test PYTHON=python3.12                 the interpreter that .venv is made from
#   make env-mmdet MMDET_PYTHON=PATH            the Python 3.11 of the environment of mmdet

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CHECKPOINT ?= last
MMDET_PYTHON ?= python3.11
MMDET_VENV ?= .venv-mmdet

# The folder of the run that `make train` starts and then evaluates: as train.py would choose it.
given = $(patsubst $(1)=%,%,$(filter $(1)=%,$(ARGS)))
RUN := $(or $(call given,output),$(patsubst %/checkpoints/,%,$(dir $(call given,resume))),\
    outputs/$(shell date +%Y-%m-%d/%H-%M-%S)-$(or $(call given,name),train))
SEVERAL_OR_NONE := $(filter -m --multirun -h --help --cfg --info,$(ARGS))

PY := $(VENV)/bin/python
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --python $(PY),$(PY) -m pip install) --constraint constraints.txt
EXTRAS := geneval ocr lora serve dashboard launchers dev

.DEFAULT_GOAL := help
.PHONY: help install train evaluate test test-all lint format constraints env-mmdet clean

help:  ## this list
	@echo "Targets (the first one installs what it needs into $(VENV), about 6 GB):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(CORE)  ## make .venv and install the pinned packages

train: $(CORE)  ## train, evaluate, write a report; ARGS="algorithm=grpo seed=3"
ifeq ($(SEVERAL_OR_NONE),)
	$(PY) train.py output=$(RUN) $(filter-out output=%,$(ARGS))
	$(PY) evaluate.py checkpoint=$(RUN)/checkpoints/$(CHECKPOINT).ckpt
else
	$(PY) train.py $(ARGS)
endif

evaluate: $(CORE)  ## evaluate a checkpoint; ARGS="checkpoint=PATH"
	$(PY) evaluate.py $(ARGS)

test: $(DEV)  ## the tests, without those marked slow
	$(PY) -m pytest -m "not slow" $(ARGS)

test-all: $(DEV)  ## all tests
	$(PY) -m pytest $(ARGS)

lint: $(DEV)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)  ## let ruff rewrite what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

constraints:  ## resolve constraints.txt anew (needs uv); pins that still hold stay
	@test -n "$(UV)" || { echo "make constraints needs uv on the PATH" >&2; exit 1; }
	$(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	    --no-header --no-annotate $(addprefix --extra ,$(EXTRAS)) --output-file constraints.txt pyproject.toml

env-mmdet:  ## make .venv-mmdet, where mmdet itself runs (about 6 GB, ten minutes)
	bash environments/mmdet.sh $(MMDET_VENV) $(MMDET_PYTHON)

clean:  ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) build stage_rl.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "stage needs Python 3.11 or newer, and '$(PYTHON)' is not one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(if $(UV),$(UV) venv --quiet --clear --seed --python "$$(command -v $(PYTHON))",$(PYTHON) -m venv --clear) $(VENV)

$(CORE): pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV): about 6 GB, most of it PyTorch; minutes the first time"
	$(INSTALL) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV): about 6 GB, most of it PyTorch; minutes the first time"
	$(INSTALL) --editable '.[dev,dashboard,geneval,launchers,lora,ocr,serve]'
	@touch $(CORE) $@
