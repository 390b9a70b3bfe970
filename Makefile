# make demo   install, then a study of the digits by class end to end: train, search, compare, export
# make fashion   install, then garments by class in the latents of an autoencoder of its own, from nothing: needs Fashion-MNIST's four files
# make test   install, then ruff, mypy and pytest
# make docs   the documentation as a site, site/index.html
# make docs-test   the site, what its pages show, the notebooks, and the wheel
# make test-all   these, what takes minutes each, and every benchmark at small sizes
# make mutants   try the tests on changed code
# A second call does not install again.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/digits-classes

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
	$(BIN)/python -m pytest tests/test_docs.py -m docs -n 2 --dist load

test-all: test docs-test
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]' --constraint constraints.txt
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
	$(BIN)/python -m pip install --quiet --editable '.[mutation]' --constraint constraints.txt
	$(BIN)/python -m benchmarks.mutation

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dashboard]' --constraint constraints.txt
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) runs build site *.egg-info
