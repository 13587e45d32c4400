# Every target sets itself up: .venv is made on the first call and re-installed when the dependencies change.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Without compiled modules each process parses torch's sources anew, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE :=
STAMP  := $(VENV)/.installed
UV     := $(PY) -m uv pip install --quiet --python $(PY)
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: help env demo demo-search test slow zoo fuzz wheel docs bench bench-tile bench-parallel bench-shard bench-accuracy bench-papers lint clean

help:
	@echo "make demo | demo-search | test | slow | zoo | fuzz | wheel | docs | bench | bench-tile | bench-parallel | bench-shard | bench-accuracy | bench-papers | lint | env | clean"

demo: $(STAMP)
	$(PY) examples/01_vgg16.py

demo-search: $(STAMP)
	$(PY) examples/05_search_factors.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not zoo"

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m tests.zoo.sweep

fuzz: $(STAMP)
	$(PY) -m tests.fuzz --table

# The wheel alone, in an environment of its own, for every interpreter that is here; or PYTHONS="/path/to/python3.14".
PYTHONS ?= python3.11 python3.12 python3.13 python3.14

wheel: $(STAMP)
	@rm -rf build/wheel && mkdir -p build/wheel
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	@for python in $(PYTHONS); do \
	  $$python -c "" 2>/dev/null || { echo "$$python is not here"; continue; }; \
	  where=build/wheel/$$(basename $$python); \
	  $(PY) -m uv venv --quiet --clear --python $$python $$where && \
	  $(PY) -m uv pip install --quiet --python $$where/bin/python -c constraints.txt \
	    "splitfx[completion,plot,search,train] @ file://$$(ls $(CURDIR)/build/wheel/*.whl)" && \
	  mkdir $$where/empty && (cd $$where/empty && ../bin/python -P $(CURDIR)/tests/wheel.py) || exit 1; \
	done

docs: $(STAMP)
	$(PY) -m sphinx --fail-on-warning --quiet -b html docs build/docs
	@echo "the site is in build/docs/index.html"

bench: $(STAMP)
	$(PY) -m benchmarks.run

bench-tile: $(STAMP)
	$(PY) -m benchmarks.run tile

bench-parallel: $(STAMP)
	$(PY) -m benchmarks.run parallel

bench-shard: $(STAMP)
	$(PY) -m benchmarks.run shard

# Fashion-MNIST is fetched where it is not installed; about two and a half hours on one core, most of it training.
bench-accuracy: $(STAMP)
	benchmarks/fashion_mnist.sh
	$(PY) -m benchmarks.run reconstruction reconstruction_epoch

# The papers' tables on 32x32 Fashion-MNIST, an hour or two on a core. Stopped, it goes on where it was.
bench-papers: $(STAMP)
	benchmarks/fashion_mnist.sh
	$(PY) -m benchmarks.run papers

lint: $(STAMP)
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --check --quiet .
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m pyright --pythonpath $(PY)

env: $(STAMP)

clean:
	rm -rf $(VENV) build dist docs/made *.egg-info .pytest_cache .ruff_cache .hypothesis

# uv is only for speed; without it pip installs the same versions.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (the first time takes some minutes: torch is large)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'splitfx needs Python 3.11 or newer; run make PYTHON=python3.11')"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PIP) uv || echo "uv cannot be installed; going on with pip"
	@if $(PY) -m uv --version >/dev/null 2>&1; then installer="$(UV)"; else installer="$(PIP)"; fi; \
	$$installer -c constraints.txt -e '.[dev]'
	@touch $@
