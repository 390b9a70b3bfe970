# make demo   install, then a study of the digits by class end to end: train, search, compare, export
# make fashion   install, then garments by class in the latents of an autoencoder of its own, from nothing: needs Fashion-MNIST's four files
# make test   install, then ruff, mypy and pytest
# make docs   the documentation as a site, site/index.html
# make docs-test   the site, what its pages show, and the wheel
# make test-all   these, what takes longer, the notebooks, and every benchmark at small sizes
# make mutants   try the tests on changed code
# A second call does not install again.

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/digits-classes
BIN    := $(VENV)/bin
# Where uv is on the PATH it installs, faster than pip. It reads none of pip's settings, so it is told where wheels lie, and left out where pip is told of another
# index; where it fails, pip tries.
UV     := $(if $(PIP_INDEX_URL)$(PIP_EXTRA_INDEX_URL),,$(shell command -v uv 2> /dev/null))
UV     := $(if $(UV),UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" uv pip install --compile-bytecode --python $(BIN)/python)
WHAT    = --quiet --editable '.[$(1)]' --constraint constraints.txt
install = $(if $(UV),$(UV) $(WHAT) ||) $(BIN)/python -m pip install $(WHAT)

# Where an installation breaks off, as without Debian's python3-venv, the next call begins it anew.
.DELETE_ON_ERROR:

.PHONY: demo fashion test test-all docs docs-test lint types tests mutants clean

demo: $(VENV)/.demo
	$(BIN)/nas run studies/digits_classes.py --out $(RUN)
	rm -rf $(RUN)/exported
	$(BIN)/nas export studies/digits_classes.py --within macs_share=0.3 --to $(RUN)/exported --out $(RUN)
	$(BIN)/nas sample studies/digits_classes.py --within macs_share=0.3 --to $(RUN)/report/samples.png --out $(RUN)

fashion: $(VENV)/.demo
	$(BIN)/nas run studies/fashion_latent.py --searcher evolution
	$(BIN)/nas report studies/fashion_latent.py
	rm -rf runs/fashion-latent/exported
	$(BIN)/nas export studies/fashion_latent.py --within macs_share=0.5 --to runs/fashion-latent/exported

test: lint types tests

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going docs site

docs-test: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_docs.py -m "docs and not long" -n 2 --dist load

test-all: test docs-test
	$(call install,benchmarks)
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m benchmarks.table --check

types: $(VENV)/.dev
	$(BIN)/mypy

# In the order that tests/conftest.py gives the files: by their number of tests, long ones would run last and alone.
tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

# Do the tests notice when the code changes? Hours; goes on where it stopped.
mutants: $(VENV)/.dev
	$(call install,mutation)
	$(BIN)/python -m benchmarks.mutation

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,dashboard)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,dev)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs build site *.egg-info
