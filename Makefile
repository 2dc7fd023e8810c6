# make demo   the quick slice of the study, findings and figures      make study   all of settings.ini
# make test   notebook examples and pytest                            make lab     JupyterLab on the notebooks
.PHONY: demo test study lab readme
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/fusion study --quick

study: .venv/installed
	$(BIN)/fusion study

test: .venv/installed
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest

lab: .venv/installed
	$(BIN)/jupyter lab nbs

# README.md is nbs/index.ipynb as Markdown; its pictures are named as seen from the notebook, one folder further down
readme: .venv/installed
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown nbs/index.ipynb --stdout | sed 's|\.\./||g' > README.md.tmp
	mv README.md.tmp README.md

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
