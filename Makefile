# One verb per job. README, pre-commit and continuous integration call these and nothing else.
#   make train ARGS="--epochs 5"     ARGS is passed on to the command behind train, test, test-tt, docs, bench, faults
#   make test PYTHON=python3.12      the Python that .venv is made with, where there is no .venv yet

PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
STAMP  := .venv/installed.stamp
TT     := .venv-tt/bin
OLD    := pctt needs Python 3.10 or newer, and this one is older

.DEFAULT_GOAL := help
.PHONY: help venv train test test-tt check fix docs bench faults clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv and install pctt with everything development needs

# An existing .venv is kept and brought up to date; only one that cannot run pip is made again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || [ -x $(BIN)/python ] || \
	  { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(OLD) ($$($(PYTHON) --version 2>&1)): name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear .venv || \
	    { echo "$(PYTHON) -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(OLD) (the one in .venv): delete .venv and name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

train: $(STAMP)  ## train on the embedded digits; curves and weights go to runs/
	$(BIN)/pctt train digits $(ARGS)

test: $(STAMP)  ## run the tests; what needs a card or a data set that is absent is skipped and listed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-tt: .venv-tt/installed.stamp  ## run what needs ttnn: on mock cards, and on every simulator and card here
	$(TT)/python tools/tt_tests.py $(ARGS)

# Beside .venv, because ttnn has wheels for few Python versions and wants an older NumPy.
.venv-tt/installed.stamp: pyproject.toml constraints-tt.txt
	@$(TT)/python -m pip --version >/dev/null 2>&1 || { \
	  found=$$($(PYTHON) tools/tt_tests.py --find-python) && "$$found" -m venv --clear .venv-tt; }
	$(TT)/python -m pip install --quiet -c constraints-tt.txt -e ".[tt,cli,data,plot,test]"
	@touch $@

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix: $(STAMP)  ## repair what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors: a page that no list names, a link that leads nowhere, a docstring that cannot be read.
docs: .venv/docs.stamp  ## make the site in build/site: all pages and the reference of the API
	$(BIN)/sphinx-build -q -W --keep-going -c docs/_site . build/site $(ARGS)
	@echo "build/site/index.html"

.venv/docs.stamp: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

bench: $(STAMP)  ## milliseconds per training batch, beside backprop, other libraries and the floor
	$(BIN)/pctt bench $(ARGS)

faults: $(STAMP)  ## plant known faults in a copy and see that the tests notice
	$(BIN)/python tools/plant_faults.py $(ARGS)

clean:  ## delete .venv, caches and build output; runs/ is kept
	rm -rf .venv .venv-tt build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
