PYTHON ?= python3

.PHONY: test test-slow test-gpu lint type bench

test:
	$(PYTHON) -m pytest

test-slow:
	$(PYTHON) -m pytest -m "slow and not gpu"

test-gpu:
	$(PYTHON) -m pytest -q -p no:cacheprovider -m gpu --continue-on-collection-errors tests/gpu tests/kernels

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type:
	$(PYTHON) -m mypy

# Results go to the folder OUT; DATA is a folder with mnist.h5 and cms_zmumu.h5, for the parts that need them.
OUT ?= bench-results
DATA ?= $(NICECP_DATA)

bench:
	$(PYTHON) benchmarks/suite.py --out $(OUT) $(if $(DATA),--data $(DATA))
	$(PYTHON) benchmarks/report.py $(OUT) --out $(OUT)/benchmarks.md
