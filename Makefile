# make train   set up .venv and train; ARGS="model=llama_small attn=gqa …" are its options
# make test    set up .venv and run the tests; ARGS_TEST="-k gqa …" are pytest's options
# make lint    ruff and pyright; make pyright the second alone
# make docs    write docs/parts.md from the options, and the site into site/
# make docs-check  run the commands of README.md and docs/
# make bench   speed against peers, on this machine
# make clean   remove .venv

PYTHON ?= python3
ARGS ?= model=llama_small attn=gqa
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test lint pyright docs docs-check bench clean

train: .venv/runtime
	.venv/bin/python src/train.py $(ARGS)

# Each worker computes on one thread: two tests at once then share two cores without waiting for each other.
# One worker more than cores, as some tests mostly wait. Each begins with some of the files, and shares what they build.
test: .venv/development
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal $(ARGS_TEST)

lint: .venv/development
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(MAKE) --no-print-directory pyright

pyright: .venv/development
	.venv/bin/pyright

docs: .venv/development
	PYTHONPATH=src .venv/bin/python -m scantling.cli.parts_table
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

docs-check: .venv/development
	.venv/bin/python tests/docs/docs_check.py $(PAGES)

bench: .venv/development
	.venv/bin/python benchmarks/throughput.py

.venv/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else \
		f"Python 3.11 or 3.12 is needed, and this is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/runtime: requirements.txt | .venv/python
	@echo "installing requirements.txt into .venv, about two minutes"
	$(PIP) -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/runtime
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
