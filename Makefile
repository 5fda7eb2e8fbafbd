# Each target sets itself up: it makes .venv from pyproject.toml first. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
STAMP := .venv/installed

.PHONY: help demo test lint check plots clean

help:
	@echo "make demo    train five modes on real digits, then show the table and draw the figure (minutes)"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make check   lint and test"
	@echo "make plots   draw the figures of every finished run again"
	@echo "make clean   remove .venv"

# One thread, for layers of 8x8 pixels are too small to share: two would mostly wait for each other. The figure comes
# before the table so that the table is what is read last.
demo: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/blpa-run experiment=demo -m
	.venv/bin/blpa-run task=plots
	.venv/bin/blpa-run task=tables

test: $(STAMP)
	.venv/bin/python -m pytest

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint test

plots: $(STAMP)
	.venv/bin/blpa-run task=plots

clean:
	rm -rf .venv

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blpa needs Python 3.11 or newer, this is %d.%d; name one that is: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@
