# `make` lists the targets. The first that needs it makes .venv; everything installs by name.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
# OpenMP threads that spin while they wait slow each other down wherever tests share a machine.
PATIENT := OMP_WAIT_POLICY=passive
# Two processes, each with a half of the tests in their order: what tests of a module share is made
# once, unless one has finished and takes some of the other's. ARGS=-n0 makes it one process.
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: help install finetune finetune-all test test-fast newcomer lint format docs bench tables gpu sanitize wheels clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## make .venv and build fastopt in it

# torch has its own stamp: it is gigabytes, and its version changes more seldom than the sources.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -m pip install -q -c constraints.txt torch numpy
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(RUN) -m pip install -q -c constraints.txt -e '.[finetune,test,lint]'
	touch $@

finetune: install  ## fine-tune MiniLM on BBC news with torch's AdamW and with ours (ARGS=...)
	$(RUN) bench/finetune.py $(ARGS)

finetune-all: install  ## fine-tune every task; a page of all in bench/results (ARGS=...)
	PYTHONPATH=bench $(RUN) -m finetuning.all_tasks $(ARGS)

test: install  ## run the test suite (ARGS=...)
	$(PATIENT) $(RUN) $(PYTEST) $(ARGS)

# A test that takes longer there than it may is to be marked slow.
test-fast: install  ## every property once: a choice of parameters, nothing slow (ARGS=...)
	$(PATIENT) $(RUN) $(PYTEST) --once --timeout=60 $(ARGS)

newcomer:  ## install, test and fine-tune as one without our settings (12 GB, 40 minutes)
	tests/newcomer.sh

CPP = $(shell git ls-files '*.cpp' '*.h' '*.cu')
lint: install  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: install  ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/docs: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs  ## make the pages, into build/docs
	$(RUN) -m sphinx -q -W --keep-going docs build/docs

$(VENV)/rivals: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt -e '.[rivals]'
	touch $@

bench: $(VENV)/rivals  ## measure a step against its rivals, into bench/results (ARGS=...)
	$(RUN) bench/run.py bench $(ARGS)

tables: install  ## write the tables and pictures of the figures in bench/results
	PYTHONPATH=bench $(RUN) -m throughput.pages $(ARGS)

# That machine's own Python has torch, the build's tools and the tests': no venv, no network. A build
# that would leave the kernels out fails. Each part takes less than 8 minutes.
gpu:  ## on a machine with a GPU: PART="check bench tune finetune profile" of it (OUT=DIR CACHE=DIR)
	FASTOPT_CUDA=1 PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) bench/run.py gpu \
	  $(if $(PART),--part $(PART)) $(if $(OUT),--out "$(OUT)") $(if $(CACHE),--cache "$(CACHE)") $(ARGS)

# Run from the folder of the sanitized build, which python -m puts before the installed one.
SANITIZERS := $(foreach lib,asan ubsan stdc++,$(shell c++ -print-file-name=lib$(lib).so))
sanitize: install  ## run the numeric tests, CUDA's on the host, under AddressSanitizer and UBSan
	FASTOPT_SANITIZE=ON FASTOPT_CUDA_ON_HOST=ON $(RUN) -m pip install -q --target build/sanitize --no-deps --upgrade .
	cd build/sanitize && $(PATIENT) LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 ../../$(RUN) $(PYTEST) -q -p no:cacheprovider \
	  $(addprefix ../../tests/test_,layouts.py shared_memory.py errors.py parity.py cuda_on_host.py cuda_source.py)

# For every Python at hand, pyenv's or on PATH; what they share, CUDA's kernels above all, is compiled
# once. auditwheel's tag says which glibc a wheel needs: the newest that this machine's compiler asks
# for. OpenMP is torch's.
PYTHONS ?= $(foreach minor,10 11 12 13 14,$(firstword \
  $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python) $(shell command -v python3.$(minor))))
wheels: install  ## build an sdist, and a manylinux wheel for each Python here, into dist/ (PYTHONS=...)
	rm -rf build/lib.* build/wheels dist
	$(RUN) -m build -q --sdist .
	for python in $(PYTHONS); do \
	  $(RUN) -m pip --python $$python wheel -q --no-deps -w build/wheels . || exit; \
	done
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 -w dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*

clean:  ## remove what was built
	rm -rf build dist $(VENV) *.egg-info fastopt/*.so
