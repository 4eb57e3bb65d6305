# Everything a person types. The environment is made once and made anew when pyproject.toml or the pin changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The one place where the torch of this checkout is pinned; the package itself takes any torch from 2.6 on.
TORCH := torch==2.13.0

.PHONY: demo test lint bench train-shapes clean

$(VENV)/.core: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,lint]"
	touch $@

demo: $(VENV)/.core
	$(BIN)/ditkit demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

train-shapes: $(VENV)/.test
	$(BIN)/python training/shapes.py
	$(BIN)/python training/shapes_i2v.py

clean:
	rm -rf $(VENV) build dist outputs
