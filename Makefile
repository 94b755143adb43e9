# `make quickstart` runs the main job, `make test` the tests; both set up .venv first and write only in this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SEEDS ?= 3

.PHONY: quickstart test lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("ehap_jax needs Python 3.11 or newer; set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-cache-dir --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m recipes.quickstart --seeds $(SEEDS) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
