# minimind on a bare machine: needs only Python 3.11 or newer. Everything is installed into .venv; nothing global is touched.
#
#   PYTHON=...       the Python to use (default: the first of python3, python3.13, ... that is new enough)
#   TORCH_INDEX=...  the package index to take torch from (default: PyTorch's own index of CPU builds on a Linux machine
#                    without NVIDIA GPU, where the usual one would add gigabytes of CUDA; else the usual one)
#   RUN=...          the run that `make chat` talks with (default: runs/demo/sft)

.DEFAULT_GOAL := help
.PHONY: help demo test check chat setup clean
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
RUN ?= runs/demo/sft
TORCH ?= torch
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= -n 2

CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python

help:
	@echo "make demo    train a small model from nothing, in minutes, and report on it"
	@echo "make chat    talk with the model that the demo made (RUN=runs/... for another)"
	@echo "make test    run the tests"
	@echo "make check   lint, format, types, floors, tests: what a change must pass"
	@echo "make setup   install everything into .venv (the others do it when needed)"
	@echo "make clean   remove .venv and the caches; runs stay"

demo: $(VENV)/.minimind
	@$(PY) -m minimind demo
	@echo
	@echo "Talk with it:  make chat"

chat: $(VENV)/.minimind
	@if [ ! -e "$(RUN)" ]; then echo "$(RUN) is not there yet: run 'make demo' first, or name a run: make chat RUN=runs/NAME" >&2; exit 2; fi
	@$(PY) -m minimind chat "$(RUN)"

setup: $(VENV)/.minimind-dev

test: $(VENV)/.minimind-dev
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

check: $(VENV)/.minimind-dev
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m basedpyright
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" lint-imports
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find minimind tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from, so that a second call starts at once.
$(VENV)/.minimind: $(VENV)/.torch pyproject.toml constraints.txt
	@if [ -e $(VENV)/.minimind-dev ]; then extras='[dev]'; else extras=''; fi; \
	 echo "Installing minimind$$extras into $(VENV) ..." >&2; $(PIP) -e ".$$extras"
	@touch $@

$(VENV)/.minimind-dev: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing minimind and its development tools into $(VENV) ..." >&2
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.minimind $@

$(VENV)/.torch: constraints.txt | $(PY)
	@echo "Installing torch into $(VENV) (the largest part, once) ..." >&2
	@index="$(TORCH_INDEX)"; \
	 if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	   if $(PY) -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3)' "$(CPU_INDEX)" 2>/dev/null; \
	   then index="$(CPU_INDEX)"; fi; \
	 fi; \
	 $(PIP) $${index:+--index-url "$$index"} $(TORCH)
	@touch $@

$(PY):
	@for name in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	   if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$name"; break; fi; \
	 done; \
	 if [ -z "$$found" ]; then \
	   echo "minimind needs Python 3.11 or newer; none of these is: $(if $(PYTHON),$(PYTHON),$(CANDIDATES))." >&2; \
	   echo "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv; macOS: brew install python) or name it: make PYTHON=/path/to/python" >&2; \
	   exit 2; \
	 fi; \
	 if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	   echo "$$found comes without venv. Debian, Ubuntu: sudo apt-get install $$("$$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; \
	   exit 2; \
	 fi; \
	 echo "Making $(VENV) with $$("$$found" --version) ..." >&2; \
	 "$$found" -m venv --clear $(VENV)
