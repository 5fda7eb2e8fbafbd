# Targets set themselves up: they make .venv from pyproject.toml first. Another interpreter: make PYTHON=python3.12 demo
# Those for a GPU machine, which may have no network, do not: they run in .venv where it is, or under the PYTHON given.

PYTHON ?= python3
STAMP := .venv/installed
RUNNER = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard .venv/bin/python) $(PYTHON)),$(PYTHON))

.PHONY: help demo reproduce-tables known-profile test lint check plots gpu-check gpu-test gpu-bench train-table known-python known-gpu clean

# The cells of the paper's tables. demo: small or predicted ones, for a CPU. paper: all of them, for a GPU and days.
PROFILE ?= demo
EXPERIMENTS_demo := demo,demo-batches,demo-times,demo-gradients
# The largest batches first, while the process that asks for them has nothing on the card.
EXPERIMENTS_paper := table2,table2-wide,table2-fp32,table3,table3-wide,table3-fp32,gradients,table1
CHECK_paper = @.venv/bin/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "PROFILE=paper needs a CUDA GPU, and torch finds none here; PROFILE=demo does not")'
EXPERIMENTS = $(EXPERIMENTS_$(PROFILE))
# One thread, for layers of 8x8 pixels are too small to share: two would mostly wait for each other.
THREADS_demo := OMP_NUM_THREADS=1
THREADS = $(THREADS_$(PROFILE))

# What gpu-check, gpu-test and gpu-bench write: logs, and records.
OUT ?= gpu-out
BUDGET_MINUTES ?= 8.5
# After so many seconds, so that a machine that is taken back after 10 minutes has told what it found by then.
INTERRUPTED = timeout --foreground -s INT -k 20
GPU_TESTS := tests/runners/test_gpu.py tests/blpa/test_triton_ops.py
# Words in the names of the most informative tests: the others compile hundreds of variants of kernels.
GPU_QUICK := captured_run or other_precisions or network_s_gradients or accurate or counted
# In the order of their worth, strict fp32 last; a sweep goes on where the last one stopped.
BENCHES := bench-kernels,bench-times,bench-training,bench-batches,bench-times-wide,bench-batches-wide,bench-largest
BENCHES := $(BENCHES),bench-largest-wide,bench-kernels-others,bench-times-fp32,bench-batches-fp32,bench-largest-fp32

help:
	@echo "make demo    train five modes on real digits, then show the table and draw the figure (minutes)"
	@echo "make reproduce-tables PROFILE=demo   a small form of every table and figure, on a CPU (a quarter of an hour)"
	@echo "make reproduce-tables PROFILE=paper  the paper's tables, on a GPU; goes on where it was interrupted"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make check   lint and test"
	@echo "make gpu-check OUT=folder   the first four minutes on a GPU: whether it computes right, how fast, what fits"
	@echo "make gpu-test OUT=folder    run the tests that need a GPU, a quick part of them first"
	@echo "make gpu-bench OUT=folder   measure everything else on a GPU (9 minutes, then again for the rest)"
	@echo "make train-table OUT=folder BUDGET_MINUTES=9   train the cells of the paper's first table, or go on with them;"
	@echo "             EXPERIMENT=table1-quarter is a quarter of it, CELLS='dataset=digits depth=29' names other cells,"
	@echo "             JOBS=2 trains two at a time"
	@echo "make plots   draw the figures of every finished run again"
	@echo "make clean   remove .venv"

# In a folder of its own, since git tracks what lies in results. The figure comes first: the table is what is read last.
DEMO := results/demo
demo: $(STAMP)
	$(THREADS_demo) .venv/bin/blpa-run experiment=demo -m results=$(DEMO)
	.venv/bin/blpa-run task=plots results=$(DEMO)
	.venv/bin/blpa-run task=tables "task.tables=[errors]" results=$(DEMO)

# Finished cells are skipped, and one that fails leaves a record and does not stop the rest: the tables are written all
# the same, unless a signal ended it, and the exit code tells.
reproduce-tables: known-profile $(STAMP)
	$(CHECK_$(PROFILE))
	$(THREADS) .venv/bin/blpa-run experiment=$(EXPERIMENTS) -m; code=$$?; test $$code -gt 1 && exit $$code; \
	.venv/bin/blpa-run task=tables && .venv/bin/blpa-run task=report && exit $$code

known-profile:
	@test -n "$(EXPERIMENTS)" || { echo "PROFILE=$(PROFILE) is not allowed: choose demo or paper" >&2; exit 2; }

test: $(STAMP)
	.venv/bin/python -m pytest

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint test

plots: $(STAMP)
	.venv/bin/blpa-run task=plots

gpu-check: known-python
	@$(RUNNER) -m runners.gpu_check --out $(OUT)

GPU_PYTEST = $(INTERRUPTED) 540 $(RUNNER) -m pytest -W default -p no:cacheprovider -rs --durations=10 $(GPU_TESTS)
gpu-test: known-gpu
	@bash -o pipefail -c '{ $(GPU_PYTEST) -k "$(GPU_QUICK)" --junitxml=$(OUT)/gpu-test-quick.xml; code=$$?; \
	$(GPU_PYTEST) -k "not ($(GPU_QUICK))" --junitxml=$(OUT)/gpu-test.xml && exit $$code; } 2>&1 | \
	tee $(OUT)/gpu-test.log'

# Whatever becomes of the sweeps, what they measured is shown and kept. The whole card is a process of its own's: one
# that has used it keeps some of it.
BUDGET_SECONDS = $(shell awk 'BEGIN { print int(60 * "$(BUDGET_MINUTES)") + 15 }')
SECONDS_LEFT = $$(($(BUDGET_SECONDS) > SECONDS ? $(BUDGET_SECONDS) - SECONDS : 1))
SWEEP = $(INTERRUPTED) $(SECONDS_LEFT) $(RUNNER) -m runners -m budget_minutes=$(BUDGET_MINUTES)
gpu-bench: known-gpu
	@bash -o pipefail -c '{ $(SWEEP) experiment=$(BENCHES); failed=$$?; test $$failed -gt 1 && exit $$failed; \
	$(SWEEP) experiment=bench-card; code=$$?; test $$failed -eq 0 && exit $$code; exit $$failed; } 2>&1 | \
	tee $(OUT)/gpu-bench.log'; code=$$?; \
	$(RUNNER) -m runners task=tables "task.tables=[batches,times,kernels]" | tee -a $(OUT)/gpu-bench.log; \
	cp results/records.csv $(OUT)/records.csv; tar -czf $(OUT)/runs.tgz -C results runs; \
	test $$code -eq 3 -o $$code -eq 124 || exit $$code

# Every call goes on where the last one stopped; what OUT/carry.txt names is what another machine needs for that.
# CELLS names other runs: CELLS="dataset=digits depth=29". JOBS cells are trained side by side, or as many as the
# experiment says.
EXPERIMENT ?= table1
CELLS ?=
JOBS ?=
BLPA = $(RUNNER) -m runners "results=$(OUT)"
train-table: known-python
	@$(BLPA) experiment=$(EXPERIMENT) -m budget_minutes=$(BUDGET_MINUTES) $(if $(JOBS),jobs=$(JOBS)) $(CELLS); \
	code=$$?; test $$code -ne 2 || exit 2; \
	$(BLPA) task=tables "task.tables=[errors]" && $(BLPA) task=progress || exit; \
	test $$code -eq 3 && echo "Not finished: the same command goes on." || exit $$code

known-python:
	@$(RUNNER) -c 'import torch, runners.compose, runners.reporting.figures' || \
	{ echo "$(RUNNER) lacks what pyproject.toml names: make test installs it in .venv, PYTHON=... takes another" >&2; exit 2; }

known-gpu: known-python
	@$(RUNNER) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA GPU: torch finds none under $(RUNNER)")'
	@mkdir -p $(OUT)

clean:
	rm -rf .venv

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blpa needs Python 3.11 or newer, this is %d.%d; name one that is: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@
