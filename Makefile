# Three commands do everything, each from a fresh clone:
#   make quickstart   set up, then train a tiny model end to end
#   make real         set up, then teach a small real model arithmetic
#   make test         set up, then check and test
# All make the virtual environment .venv here and the server's own environment under ~/.cache/lockstep.

PYTHON ?= python3
# The CPU build where the package index offers one; set TORCH to choose another build.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: quickstart real test test-all test-oldest checked check reference dist docs setup-train setup-real setup-dev runtime clean

quickstart: setup-train runtime
	@$(BIN)/lockstep quickstart

real: setup-real runtime
	@$(BIN)/lockstep quickstart --real

# Two at a time: much of a test is a server's or a trainer's start, which keeps one core busy. A file stays on one side, for what its
# tests share, and files come in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: checked
	@echo "== tests"
	@$(PYTEST) -m "not slow" --durations=15

# Also a real server for each family and sync path: about eleven minutes more.
test-all: checked
	@$(PYTEST) --durations=25

# .venv has the newest transformers that pyproject.toml allows. This runs what reads and writes models with the oldest, which lies before
# it on the path: about four minutes, 15 MB.
OLDEST := 5.16.1

test-oldest: .oldest/$(OLDEST)
	@echo "== tests with transformers $(OLDEST)"
	@PYTHONPATH=$(CURDIR)/.oldest/$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(OLDEST)", t'
	@PYTHONPATH=$(CURDIR)/.oldest/$(OLDEST) $(PYTEST) -m "not slow" tests/unit/models/test_tiny.py tests/unit/models/test_model_config.py \
		tests/unit/models/test_contract.py tests/unit/models/test_loading.py tests/unit/engine/test_parity.py

.oldest/$(OLDEST): .venv/made-dev
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@ "transformers==$(OLDEST)" "huggingface-hub<2"
	@touch $@

# The checks keep one core busy, and installing the server's environment the other.
checked: setup-dev
	@$(MAKE) --no-print-directory -j2 runtime check

check: setup-dev
	@echo "== style, types, imports, dead code"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports --no-logo
	@! $(BIN)/vulture | grep -E '^(src|runtime)/'

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Lockstep needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	@echo "== making .venv and installing torch (about 200 MB without a GPU, several GB with)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	@touch $@

.venv/made-train: .venv/made pyproject.toml
	@echo "== installing Lockstep and what the trainer needs (about 150 MB)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[train]"
	@touch $@

.venv/made-real: .venv/made pyproject.toml
	@echo "== installing Lockstep, what the trainer needs, and what reads GGUF files (about 200 MB)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[train,gguf,examples]"
	@touch .venv/made-train $@

.venv/made-dev: .venv/made-train
	@echo "== installing the development tools (about 100 MB)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[train,dev]"
	@# The chat templates of real families, as files. What trl itself needs to run is left out.
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps "trl==1.16.0"
	@touch $@

setup-train: .venv/made-train
setup-real: .venv/made-real
setup-dev: .venv/made-dev

runtime: setup-train
	@echo "== server environment"
	@PATH="$(CURDIR)/$(BIN):$$PATH" lockstep runtime install

# The pages of docs/reference, from the code.
reference: setup-dev
	@$(BIN)/python -m lockstep.cli.reference docs/reference

# Wheel and sdist, the same bytes from the same commit: timestamps inside are the commit's.
dist: setup-dev
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/uv build --quiet --python $(BIN)/python --out-dir dist
	@ls -l dist
	@sha256sum dist/*.whl dist/*.tar.gz

# The site, into build/site, from docs/ alone. No page needs the network.
docs: setup-dev
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet "mkdocs-material>=9.6,<10"
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv .oldest .pytest_cache .ruff_cache .hypothesis
