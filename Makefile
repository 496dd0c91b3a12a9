# `make demo` and `make test` set up all they need; `make check` is what CI runs.
VENV ?= .venv
python := $(VENV)/bin/python
export VENV

# Workers share the cores with the tensor library's threads (tests/conftest.py); worksteal evens out long tests.
pytest := $(python) -m pytest -n auto --maxprocesses 8 --dist worksteal
# Runs that look for a wrong version or a missing file, not for a wrong number.
brief := --hypothesis-profile brief -m "not slow"

# The suite in parts that CI times one by one; `core` is all that is in no other part.
experiments := tests/experiments tests/analysis tests/test_model_configs.py
ecosystem := tests/ecosystem
manual := tests/docs
but = $(addprefix --ignore=,$(1))
core := tests $(call but,$(experiments) $(ecosystem) $(manual))
# Coverage adds up over the parts; the last one reports, and fails when it is too low.
covered := --cov --cov-append
silent := --cov-report= --cov-fail-under=0

.PHONY: help demo test test-core test-experiments test-ecosystem test-interpreter check lint types docs test-oldest test-wheel thorough format clean

help:
	@echo "make demo         set up, then generate from the embedded model and inspect it"
	@echo "make test         set up, then run the tests with coverage"
	@echo "make check        all that CI runs: lint, types, tests, manual, oldest transformers, wheel"
	@echo "make docs         build the manual in site/"
	@echo "make thorough     10,000 cases of the property tests (a quarter of an hour on two cores)"
	@echo "make format       let ruff format and fix"
	@echo "make clean        remove what the targets made, the environment included"

# One part after the other: coverage adds up, and the tests use all cores as it is.
.NOTPARALLEL:

# The stamps make a repeated call immediate, and a changed dependency install itself.
$(VENV)/.installed: pyproject.toml constraints.txt scripts/setup_venv.sh
	@scripts/setup_venv.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt scripts/setup_venv.sh
	@scripts/setup_venv.sh $(VENV) '[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(VENV)/bin/hymba generate "def " --max-new-tokens 100 --temperature 0.7 --seed 2
	$(VENV)/bin/hymba inspect

# Triton has wheels for Linux only; elsewhere its kernels stay unmeasured, and so the gate on coverage is off.
linux := $(filter Linux,$(shell uname -s))

test: $(if $(linux),test-interpreter) test-core test-experiments test-ecosystem

test-core: $(VENV)/.installed-dev
	$(pytest) $(if $(linux),$(covered),--cov) $(silent) --property-cases 200 $(core)

test-experiments: $(VENV)/.installed-dev
	$(pytest) $(covered) $(silent) $(experiments)

test-ecosystem: $(VENV)/.installed-dev
	$(pytest) $(covered) $(if $(linux),,--cov-fail-under=0) $(ecosystem) $(manual)

check:
	@bash .ci/run

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

# Broken links, pages that the navigation lacks and wrong names in the reference are errors.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --quiet --strict --config-file .mkdocs.yml

test-oldest: $(VENV)/.installed-dev
	overlay=$$(scripts/overlay.sh oldest) && PYTHONPATH=$$overlay $(pytest) $(brief) tests $(call but,$(experiments) $(manual))

test-interpreter: $(VENV)/.installed-dev
	overlay=$$(scripts/overlay.sh interpreter) && \
		PYTHONPATH=$$overlay TRITON_INTERPRET=1 $(pytest) --cov --cov-report= --cov-fail-under=0 tests/ops/test_triton_*.py

test-wheel: $(VENV)/.installed-dev
	scripts/test_wheel.sh -n auto --maxprocesses 8 --dist worksteal $(brief) $(core)

thorough: $(VENV)/.installed-dev
	$(pytest) --hypothesis-profile thorough --property-cases 10000 -m hypothesis

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .cache .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
