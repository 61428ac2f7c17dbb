# Everything that a newcomer needs: make demo, make test. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
# What make demo compresses with: auto, or kron (the method of the ProcrustesGPT paper), gs, pifa, lowrank.
STRUCTURE ?= auto
# Test processes side by side, each on one thread.
WORKERS ?= 2

bin := $(VENV)/bin
lowest := .venv-lowest/bin
# More threads than free cores make small matrix products slower, and paired timings worthless.
one_thread := OMP_NUM_THREADS=1
# All cores for solvers and perplexity. Threads that wait spin for some microseconds, which small matrices need (eigenvalues
# take 1.6 times as long where they sleep at once), and then sleep, since the machine may have other work. What ONNX
# Runtime is timed with has one thread of its own.
patient := GOMP_SPINCOUNT=20000
offline := HF_HUB_OFFLINE=1
pip := $(bin)/python -m pip install --disable-pip-version-check --quiet

.PHONY: help venv demo serve-demo serve-table test test-slow test-lowest quality format docs clean

help:
	@echo 'make demo         set up; compress, export and validate a real model on the CPU; print the summary'
	@echo 'make serve-demo   set up; serve that model by a Triton server on the CPU, until Ctrl-C; another one: OUT=out/mine'
	@echo 'make serve-table  set up; tokens a second of that model and of the dense one, in one server'
	@echo 'make test         set up; lint, format check, types, tests'
	@echo 'make test-slow    set up; the tests that take minutes or the real model'
	@echo 'make test-lowest  set up another environment, with the lowest versions that pyproject.toml allows; the quick tests'
	@echo 'make quality      set up; lint, format check, types'
	@echo 'make format       set up; let ruff format and mend what it can'
	@echo 'make docs         set up; the documents as a site in build/site, its links checked'
	@echo 'make venv         set up: $(VENV) with this project, editable, and its tools'
	@echo 'make clean        remove caches and the output of the demo; the environment stays'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) STRUCTURE=$(STRUCTURE) WORKERS=$(WORKERS)'

venv: $(VENV)/.ready

# Each stamp is as old as the last complete installation of what it depends on.
$(VENV)/.ready: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or later is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(pip) --constraint constraints-cpu.txt --editable '.[dev,eval]'
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready requirements-demo.txt
	$(pip) --no-deps --require-hashes --requirement requirements-demo.txt
	@touch $@

# The compiler of the TensorRT plugins, where NVIDIA has one.
$(VENV)/.ready-plugins: $(VENV)/.ready requirements-plugins.txt
	test "$$(uname -sm)" != 'Linux x86_64' || $(pip) --no-deps --require-hashes --requirement requirements-plugins.txt
	@touch $@

# What serves a model repository on the CPU: a Triton server from a package, whose Python wants a numpy before 2.
$(VENV)/serve/.ready: $(VENV)/.ready requirements-serve.txt
	$(PYTHON) -m venv $(VENV)/serve
	$(VENV)/serve/bin/python -m pip install --disable-pip-version-check --quiet --requirement requirements-serve.txt
	test "$$(uname -sm)" != 'Linux x86_64' || $(VENV)/serve/bin/python -m pip install --disable-pip-version-check --quiet --no-deps nvidia-pytriton==0.7.0
	@touch $@

demo: $(VENV)/.ready-demo
	$(patient) $(bin)/python -m export.build --model smollm2-135m --structure $(STRUCTURE) --ratio 0.75 --calibration-samples 8 --engine ort --out $(OUT)
	$(patient) $(bin)/python -m validate.run $(OUT) --max-windows 16 --prefill 256 --seconds 5

serve-demo: $(VENV)/.ready-demo $(VENV)/serve/.ready
	test -f $(OUT)/triton/launch.sh || $(MAKE) demo
	$(bin)/python -m tests.serve $(OUT)

serve-table: $(VENV)/.ready-demo $(VENV)/serve/.ready
	test -f $(OUT)/triton/launch.sh || $(MAKE) demo
	$(bin)/python -m export.build --model smollm2-135m --structure dense --engine ort --out $(OUT)-dense --serve-as dense
	$(bin)/python -m tests.serve $(OUT) $(OUT)-dense -- $(bin)/python -m validate.serving $(OUT) --baseline $(OUT)-dense

quality: venv
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

test: quality $(VENV)/.ready-plugins $(VENV)/serve/.ready
	$(one_thread) $(offline) $(bin)/python -m pytest -q --numprocesses $(WORKERS)

test-slow: $(VENV)/.ready-demo $(VENV)/.ready-plugins $(VENV)/serve/.ready
	$(one_thread) $(offline) $(bin)/python -m pytest -q -m slow

# The lowest versions that pyproject.toml allows. Not the whole suite: servers, compilers and the plugins are the same.
test-lowest:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13) and "$(PYTHON) is too new for the lowest versions: name Python 3.10 to 3.12 with make test-lowest PYTHON=...")'
	test -x $(lowest)/python || $(PYTHON) -m venv $(dir $(lowest))
	$(lowest)/python -m pip install --disable-pip-version-check --quiet --constraint constraints-lowest.txt --editable '.[dev,eval]'
	$(one_thread) $(offline) $(lowest)/python -m pytest -q --numprocesses $(WORKERS) tests/compress tests/export/graph tests/export/runtime tests/export/test_build.py

format: venv
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

# The documents as a site. Its tools want an environment of their own.
$(VENV)/docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --disable-pip-version-check --quiet --requirement requirements-docs.txt
	@touch $@

docs: $(VENV)/docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build

clean:
	rm -rf out/demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find compress export trt_plugins validate tests -type d -name __pycache__ -exec rm -rf {} +
