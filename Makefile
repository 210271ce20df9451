# `make compile` sets everything up and compiles LLaVA-1.5-7B under a 65 % budget; `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# So quiet, pip tells of what fails and of nothing else.
PIP := $(BIN)/python -m pip install --quiet --quiet

.PHONY: compile fuzz test check install golden format clean

compile: install
	$(BIN)/planner compile --model llava-7b --budget 0.65 -o build/llava-7b

# Two processes with a thread each are faster than one with two; fixtures of a file are made once
# where a process keeps to neighbouring tests until it has none left.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Some minutes of hostile input, other than the last time; see docs/debugging.md.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzzing.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p planner
	$(BIN)/mypy benchmarks/*.py examples/*.py
	$(BIN)/lint-imports --no-logo

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "planner needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	@echo "installing planner and what it needs into $(VENV): a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

# Rewrite the golden text files after an intended change; read the diff before committing it.
golden: install
	PLANNER_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -k golden

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build
