# Targets set themselves up: they make .venv from pyproject.toml first. Another interpreter: make PYTHON=python3.12 demo
# Those that need a GPU do not, for its machine may have no network: they take .venv where it is, or the PYTHON given.

PYTHON ?= python3
STAMP := .venv/installed
RUN := .venv/bin/blpa-run

# The cells of the paper's tables. demo: small or predicted ones, for a CPU. paper: all of them, for a GPU and days; the
# largest batches first, while the process that asks for them has nothing on the card. Trainings on ImageNet come last,
# and only where IMAGENET=/path names its folder.
PROFILE ?= demo
EXPERIMENTS_demo := demo,demo-memory,demo-batches,demo-times,demo-gradients
EXPERIMENTS_paper := table2,table2-fp32,imagenet-batches,table3,table3-fp32,imagenet-times,gradients,table1
IMAGENET ?=
IMAGENET_demo = $(error IMAGENET=$(IMAGENET) needs PROFILE=paper: it takes days on a GPU)
IMAGENET_paper = $(RUN) experiment=table1-imagenet -m "dataset.root=$(IMAGENET)" || code=$$?;
ifndef EXPERIMENTS_$(PROFILE)
$(error PROFILE=$(PROFILE) is not allowed: choose demo or paper)
endif

# On a GPU, in the order of their worth, strict fp32 last.
BENCHES := bench-kernels,bench-times,bench-training,bench-batches,bench-largest,bench-card,bench-kernels-others
BENCHES := $(BENCHES),bench-converted,bench-times-fp32,bench-batches-fp32,bench-largest-fp32,bench-converted-fp32
GPU_TESTS := tests/runners/test_gpu.py tests/blpa/test_triton_ops.py tests/blpa/test_triton_any_layout.py
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard .venv/bin/python) $(PYTHON)),$(PYTHON))
GPU_RUN = $(GPU_PYTHON) -m runners

# make train-table BUDGET_MINUTES=9 stops within 9 minutes; the same command resumes. CELLS='dataset=digits depth=29'
# overrides values of the experiment.
EXPERIMENT ?= table1
BUDGET_MINUTES ?= null
CELLS ?=
OUT ?= results

# CIFAR-10 as image files, made once.
IMAGE_FILES := data/cifar10-files

.PHONY: help demo image-files reproduce-tables test lint check plots gpu-check gpu-test gpu-bench train-table gpu-python clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## five modes on real digits, memory and largest batches, in minutes on a CPU, into results/demo
	OMP_NUM_THREADS=1 $(RUN) experiment=demo,demo-memory,demo-batches -m results=results/demo
	$(RUN) task=plots results=results/demo
	$(RUN) task=tables "task.tables=[memory,batches,errors]" results=results/demo

image-files: $(STAMP) $(IMAGE_FILES)  ## train six modes on CIFAR-10 as JPEG files, ImageNet's way, 40 minutes on a CPU
	OMP_NUM_THREADS=1 $(RUN) experiment=image-files -m dataset.root=$(IMAGE_FILES) dataset.workers=1 results=$(OUT); \
	code=$$?; $(RUN) task=plots results=$(OUT) && $(RUN) task=tables "task.tables=[errors]" results=$(OUT) && exit $$code

$(IMAGE_FILES): | $(STAMP)
	.venv/bin/python -m runners.examples.cifar_as_files --root data --out $@

reproduce-tables: $(STAMP)  ## every table in small, on a CPU; PROFILE=paper [IMAGENET=/path] is the paper's, on a GPU
	$(RUN) experiment=$(EXPERIMENTS_$(PROFILE)) -m; code=$$?; $(if $(IMAGENET),$(IMAGENET_$(PROFILE))) \
	$(RUN) task=tables && $(RUN) task=report && exit $$code

test: $(STAMP)  ## run the tests
	.venv/bin/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)  ## check style and types
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint test  ## lint and test

plots: $(STAMP)  ## draw the figures of every finished run again
	$(RUN) task=plots

gpu-check: gpu-python  ## the first four minutes on a GPU: whether it computes right, how fast, what fits
	$(GPU_PYTHON) -m runners.gpu_check --out gpu-check

gpu-test: gpu-python  ## run the tests that need a GPU
	$(GPU_PYTHON) -m pytest -W default -p no:cacheprovider -p no:xdist $(GPU_TESTS)

gpu-bench: gpu-python  ## measure everything else on a GPU; it goes on where it was stopped
	$(GPU_RUN) experiment=$(BENCHES) -m; code=$$?; $(GPU_RUN) task=tables "task.tables=[batches,times,kernels]" && exit $$code

train-table: gpu-python  ## train the cells of the paper's first table, or EXPERIMENT=table1-quarter; it goes on likewise
	$(GPU_RUN) experiment=$(EXPERIMENT) -m budget_minutes=$(BUDGET_MINUTES) results=$(OUT) $(CELLS); code=$$?; \
	$(GPU_RUN) task=tables "task.tables=[errors]" results=$(OUT) && $(GPU_RUN) task=progress results=$(OUT) && exit $$code

gpu-python:
	@$(GPU_PYTHON) -c 'import torch, runners.cli, runners.reporting.figures' || \
	{ echo "$(GPU_PYTHON) lacks what pyproject.toml names: make test installs it in .venv, PYTHON=... takes another" >&2; exit 2; }

clean:  ## remove .venv
	rm -rf .venv

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blpa needs Python 3.11 or newer, this is %d.%d; name one that is: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@
