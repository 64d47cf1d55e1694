# make demo    set everything up and run the default study (experiments/bandpo.py)
# make test    set everything up and pass the tests
# make lint    ruff, check only
# make aot     compile every kernel for TPUs and an H100 that are not there (an environment of 1 GB of its own)
# The environment is .venv. It is made once, and again only when pyproject.toml changes; after that no network is needed.

PY := .venv/bin/python
ARGS ?=

.PHONY: help demo test lint aot models setup
help:
	@sed -n 's/^# //p' Makefile | head -5

demo: setup
	@echo "==> the default study: experiments/bandpo.py $(ARGS)"
	@$(PY) experiments/bandpo.py $(ARGS)

test: models
	@echo "==> tests"
	@$(PY) -m pytest $(ARGS)

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

aot:
	@sh .ci/aot $(ARGS)

setup:
	@sh .ci/setup

models: setup
	@sh .ci/setup models
