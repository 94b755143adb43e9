# `make quickstart` runs the main job, `make test` the tests; both set up .venv first and write only in this folder.
PYTHON ?= python3
EXTRAS ?= test
SEEDS ?= 3
VENV := .venv
BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

export JAX_PLATFORMS ?= cpu
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint docs site clean
DOCUMENTS := README.md CONTRIBUTING.md CHANGELOG.md LICENSE Makefile pyproject.toml constraints.txt docs results recipes tests ehap_jax interop \
  benchmarks

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("ehap_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-cache-dir --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m recipes.quickstart --seeds $(SEEDS) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -p no:cacheprovider -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/basedpyright

docs:
	$(MAKE) --no-print-directory site EXTRAS=docs

site: $(INSTALLED)
	rm -rf runs/docs && mkdir -p runs/docs/source
	cp -r $(DOCUMENTS) runs/docs/source
	$(BIN)/python docs/reference.py runs/docs/source/docs/reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file docs/mkdocs.yml
	@echo "runs/docs/site/index.html"

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
