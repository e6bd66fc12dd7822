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

bench:
	$(PYTHON) benchmarks/train_cpu.py --case mnist
	$(PYTHON) benchmarks/train_cpu.py --case small
	$(PYTHON) benchmarks/latency.py
	$(PYTHON) benchmarks/startup.py
	$(PYTHON) benchmarks/depth.py
	$(PYTHON) benchmarks/streaming.py
	$(PYTHON) benchmarks/scaling.py check
