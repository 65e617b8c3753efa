# Every target first makes .venv with the tested versions, if it is missing or older than what it is made from;
# `make train` without the tools that only tests and documentation need.
# Needs only make and Python 3.11 or newer (PYTHON=... picks another).

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
READY := .venv/ready
LIBRARY := .venv/library
# Each of the two processes begins with one half of the tests, so that what the tests of a file share is made once.
PYTEST := .venv/bin/python -m pytest -n 2 --dist worksteal
INTERPRETED = TRITON_INTERPRET=1 $(PYTEST) $$(grep -rl --include='test_*.py' triton_interpreter tests)
# Else half the time goes to pages that are given back and asked for again.
KEEP := MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

.PHONY: help train test test-slow exhaustive lint format wheel docs drawings examples clean

help:
	@echo 'make train      train ResNet-18 on scikit-learn digits with FGMP; print its energy per epoch'
	@echo 'make test       run the tests (test-slow: the long ones too)'
	@echo 'make exhaustive compare rounding with ml_dtypes over all 2^32 float32s; about an hour on one core'
	@echo 'make lint       ruff, mypy and import-linter (format: let ruff rewrite)'
	@echo 'make docs       build the documentation, site/index.html (drawings, examples: make its pictures, print its outputs)'
	@echo 'make wheel      build dist/*.tar.gz, and from that dist/*.whl'
	@echo 'make clean      remove .venv and everything built'

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed; none was found (make PYTHON=/path/to/python3)' >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(LIBRARY): pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv; torch is most of it (some minutes)'
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,plot]'
	@touch $@

$(READY): pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,plot,dev,docs]'
	touch $(LIBRARY) $@

train: $(LIBRARY)
	.venv/bin/lnpu train digits_resnet18

test: $(READY)
	$(PYTEST) -m 'not slow and not triton_interpreter'
	$(INTERPRETED) -m 'not slow and triton_interpreter'

test-slow: $(READY)
	$(PYTEST) -m 'not triton_interpreter'
	$(INTERPRETED) -m triton_interpreter

exhaustive: $(READY)
	$(KEEP) nice -n 19 .venv/bin/python tests/exhaustive.py numba
	$(KEEP) nice -n 19 .venv/bin/python tests/exhaustive.py reference
	TRITON_INTERPRET=1 nice -n 19 .venv/bin/python -W ignore::RuntimeWarning tests/exhaustive.py triton

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: $(READY)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

wheel: $(READY)
	rm -rf build dist
	.venv/bin/python -m build

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet
	@echo 'site/index.html is the first page'

drawings: $(READY)
	.venv/bin/python docs/generate/drawings.py
	.venv/bin/python docs/generate/chips.py

examples: $(READY)
	for each in swap_layers fp16_share compare_chips; do \
		COLUMNS=140 .venv/bin/python examples/$$each.py >docs/printed/$$each.txt || exit; done

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
