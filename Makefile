# `make demo` and `make test` are enough on a machine with Python 3.11+, git, make and a C++ compiler.
# All that is made lands beside this file: .venv, .cache, runs, mlruns. What is done is not done again.

PORT ?= 5000
RANKS ?= 2
ARGS ?=
# Test files at a time; 0 is one after another in one process.
WORKERS ?= 2
# First Python that is new enough. 3.11 comes first because it is what the tests run on.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$name" && break; done)
# PyTorch comes first and alone, so that no other package picks its build. On Linux PyPI serves the CUDA build
# (several GB); TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small one.
TORCH = $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TORCH_INDEX ?=
# Compiling to bytecode is left to whatever imports: most modules never are, and it was half the time.
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export MLFLOW_DISABLE_TELEMETRY ?= true
# Containers like to set it, and then every process compiles all it imports, seven seconds of CPU for each rank.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test ui lint setup clean
.DEFAULT_GOAL := help

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

demo: setup ## Set up, grow the nano herd (teacher, two students, exports, evaluation), print where to look
	@port=$$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') && \
	.venv/bin/python .venv/bin/deepspeed --quiet --master_port $$port --num_accelerators $(RANKS) \
		--module distill --config configs/nano.yaml --resume auto $(ARGS)
	@test -f runs/nano/report.html || \
		{ echo "error: the run ended without a report; its ranks were killed from outside: make demo goes on where it was" >&2; exit 3; }
	@echo
	@echo "report       runs/nano/report.html"
	@echo "students     runs/nano/students/   exports: runs/nano/exports/"
	@echo "experiments  make ui"

test: setup ## Set up, run the tests (ARGS='-k name' for some, WORKERS=2 for two at a time)
	@.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

ui: .venv/.installed ## MLflow over mlruns/ on http://127.0.0.1:5000 (PORT=5001 for another)
	@.venv/bin/python -m herd.run.ui --port $(PORT)

lint: .venv/.installed ## ruff, formatting, and the floors of the house
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/lint-imports

setup: .cache/.compiled ## Only set up: .venv, packages, DeepSpeed's CPU op

clean: ## Remove what set-up and tools made; runs/ and mlruns/ stay
	rm -rf .venv .cache build dist *.egg-info .hypothesis .import_linter_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: each step leaves a stamp, and a killed one is done again ---------------------------------------

.venv/.made:
	@fail() { echo "error: $$1" >&2; exit 3; }; python="$(PYTHON)"; \
	case "$(CURDIR)" in *" "*) fail "$(CURDIR) has a space in its path, and PyTorch cannot compile there; move the checkout";; esac; \
	test -n "$$python" || fail "no Python 3.11 or newer on PATH; install one, or name it: make PYTHON=/path/to/python3.11"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		fail "PYTHON=$$python does not run or is older than 3.11; name a newer one"; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || \
		fail "$$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"; \
	"$$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' || \
		fail "$$python has no C headers (Python.h); on Debian or Ubuntu: apt install python3-dev"; \
	command -v "$${CXX:-c++}" >/dev/null || \
		fail "no C++ compiler ($${CXX:-c++}) on PATH; on Debian or Ubuntu: apt install g++, or set CXX"; \
	echo "[1/4] .venv with $$("$$python" --version)"; \
	.venv/bin/python -c '' 2>/dev/null || "$$python" -m venv --clear .venv
	@touch $@

.venv/.installed: pyproject.toml | .venv/.made
	@echo "[2/4] $(TORCH) (the largest download)"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "[3/4] the other packages (a few minutes the first time)"
	@$(PIP) --editable '.[dev]'
	@touch $@

.cache/.compiled: .venv/.installed
	@echo "[4/4] C++: DeepSpeed's CPU op, and bf16 products where this CPU has none"
	@mkdir -p .cache
	@.venv/bin/python -m herd.run.extensions
	@touch $@
