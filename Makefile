# Everything below builds .venv itself where it is missing, with plain pip, and may be run again at any time.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo demo-mistral test lint clean-demo

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[seqio,hub,hf,beam,dedup,chart,mistral,metrics,benchmark,playground,docs,dev]'
	touch $(STAMP)

# The main job on the embedded Russian corpus: vocabulary, cache, UL2, instructions, Hugging Face, report.
demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tasks/demo.sh

# The Mistral side in small: tokenizer, init, pretrain, instruct, merge, chat, report.
demo-mistral: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash vikhr_mistral/demo.sh

clean-demo:
	rm -rf runs/demo runs/demo-mistral

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What is proven only with time: kill -9 at twenty moments, disk full, the whole demo; and exports in transformers 4.57.
test-slow: install .venv-transformers4/.installed
	$(BIN)/python -m pytest -m slow

.venv-transformers4/.installed:
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet --disable-pip-version-check \
	    transformers==4.57.6 torch==2.13.0 sentencepiece safetensors protobuf
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
