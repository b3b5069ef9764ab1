# Both commands set up everything they need in .venv, from the pinned versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-matrix lint clean

# torch's threads spin while they wait for each other: beside another busy program a step took several times as long.
demo: .venv/.installed
	OMP_WAIT_POLICY=passive $(BIN)/diffattn demo

# pip compiles nothing above: what the tests import is compiled once, and read by every process that they start. Each
# worker begins with a half of its own, so that what tests share is mostly made in one of them, and takes from the other.
test: .venv/.installed lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

# The quick tests on the oldest supported versions and on the newest, in environments of their own (several GB).
test-matrix:
	$(PYTHON) tools/test_matrix.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .matrix

# The stamp is written last: an installation that was cut off is repeated.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e ".[export,bench,test]"
	touch $@
