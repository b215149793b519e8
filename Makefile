# What you can do with a clone. `make help` lists it; `.venv/bin/inv --list` has the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
INV := $(VENV)/bin/inv
LOCK := configs/locks/control.txt
STAMP := $(VENV)/.control-lock
# The newest Python on PATH that will do (pyenv's shims answer for versions they lack, so
# each is asked).
PYTHON = $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
# uv itself comes from the control lock; pip only fetches it.
UV_PIN = $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' $(LOCK))

.PHONY: help setup demo test lint bench clean

help: ## List what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv, the control environment

$(STAMP): $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python >= 3.11 with venv is needed and was not found on PATH" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(UV_PIN)"
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --require-hashes --compile-bytecode -r $(LOCK)
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps --build-constraints configs/locks/build-constraints.txt -e .
	cp $(LOCK) $(STAMP)

demo: setup ## Do the main job: base model, data, LoRA, before/after, merged model, report
	$(INV) demo

test: setup ## Run all tests this machine can run; MARK=unit runs one kind
	$(INV) stack.install
	$(VENV)/bin/python -m pytest $(if $(MARK),-m '$(MARK)') $(ARGS)

lint: setup ## Check style, types, YAML, roles and shell; change nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/ansible-lint --offline --strict
	$(VENV)/bin/shellcheck .ci/run $$(git ls-files '*.sh')
	$(VENV)/bin/hadolint docker/Dockerfile benchmarks/reference.Dockerfile

bench: setup ## Measure against what one would do otherwise; ONLY=merge runs one benchmark
	$(INV) stack.install
	PYTHONPATH=src:tests $(VENV)/bin/python -m benchmarks $(ONLY)

clean: ## Delete .venv and the training environment; runs and base models stay
	rm -rf $(VENV) .tunesmith/envs
