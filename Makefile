# Everything a person types. requirements.lock says what is installed; `make lock` writes it anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# No build isolation: what builds the package comes from the lock, too.
LOCKED := $(INSTALL) --constraint requirements.lock --no-build-isolation
# Tests need a thread each: they run side by side.
PYTEST := -m pytest --dist loadfile --durations 15

.PHONY: demo quick test test-latest test-oldest fuzz lint lock bench train-shapes clean

$(VENV)/.core: pyproject.toml requirements.lock Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) hatchling
	$(BIN)/python $(LOCKED) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python $(LOCKED) --editable ".[test,oracles,lint]"
	touch $@

demo: $(VENV)/.core
	$(BIN)/ditkit demo

# For the one who edits: under a minute.
quick: lint
	$(BIN)/python $(PYTEST) -n 2 -m "not slow" tests/unit

test: $(VENV)/.test
	$(BIN)/python $(PYTEST) -n 2

# The newest release of everything, in an environment of its own that is made anew each time.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python $(INSTALL) --editable ".[test,oracles]"
	.venv-latest/bin/python $(PYTEST) -n 2 -m "not locked" -o filterwarnings=default

# Each dependency at the lower bound that pyproject.toml promises, without what the tests only compare with.
test-oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tools/oldest.py > .venv-oldest/oldest.txt
	.venv-oldest/bin/python $(INSTALL) --constraint .venv-oldest/oldest.txt --editable ".[test]"
	.venv-oldest/bin/python $(PYTEST) -n 2 -m "not locked" -o filterwarnings=default --without oracles

# Odd inputs for everything that is read. COUNT inputs of each target, SEED, TARGET for one alone.
COUNT ?= 2000
SEED ?= 0
fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz $(TARGET) --count $(COUNT) --seed $(SEED)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	$(PYTHON) tools/lock.py $(if $(TORCH),--torch $(TORCH))

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

train-shapes: $(VENV)/.test
	$(BIN)/python training/shapes.py
	$(BIN)/python training/shapes_i2v.py

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest build dist outputs
