# make demo   the quick slice of the study, findings and figures      make study   all of settings.ini
# make test   linter, notebook examples and pytest                            make lab     JupyterLab on the notebooks
# make bench  what things cost here, against naive: a quarter of an hour on two free cores
# make docs   the site, in docs/_build/html/index.html
# make test-browser   headless Chromium (the system's, or that of `playwright install chromium`): the explorer in JupyterLab and Notebook 7, every page of the site
# make test-faults   kills, full disks and hostile input, with what was counted: seven minutes
.PHONY: demo test study lab docs readme bench test-browser test-faults
.DELETE_ON_ERROR:

SHELL := bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/fusion study --quick --workers 2

study: .venv/installed
	$(BIN)/fusion study --workers 2

test: .venv/installed
	$(BIN)/ruff check --quiet fusion_notebooks tests benchmarks docs
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o addopts= -q -m faults -n 2 --dist loadfile

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engine.py

test-browser: .venv/browser docs/_build/html/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -n 2 --dist loadfile tests/browser

lab: .venv/installed
	$(BIN)/jupyter lab nbs

# the examples run, so it takes a minute or two; nothing is fetched, neither here nor by the pages
docs: .venv/docs
	rm -rf docs/_build
	OMP_NUM_THREADS=1 $(BIN)/python docs/stage.py docs/_staged
	$(BIN)/python -m sphinx -q -W --keep-going -c docs docs/_staged docs/_build/html
	$(BIN)/python -m pytest tests/test_docs.py -k built

# made anew when something that it shows is newer
docs/_build/html/index.html: $(shell find nbs docs fusion_notebooks figures \( -name _build -o -name _staged -o -name __pycache__ -o -name .ipynb_checkpoints \) -prune -o -type f -print)
	$(MAKE) docs

# README.md is nbs/index.ipynb as Markdown, with the outputs saved in it (nbdev-test --save nbs/index.ipynb renews them);
# links start from the notebook's folder there and from the root here, and code cells are marked as Python
readme: .venv/installed
	$(BIN)/nbdev-clean --fname nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown nbs/index.ipynb --stdout \
	    | awk '/^```/ {if (!open && $$0 == "```") $$0 = "```python"; open = !open} {gsub(/\.\.\//, ""); print}' | cat -s > README.md.tmp
	mv README.md.tmp README.md

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/browser: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@
