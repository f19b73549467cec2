# PYTHON is the interpreter .venv is made from, UV the resolver of `make lock`.
PYTHON = python3
UV = uv

VENV = .venv
BIN = $(VENV)/bin
DEMO_STAMP = $(VENV)/installed-demo
STAMP = $(VENV)/installed
PIP = -m pip --disable-pip-version-check -qq install

.PHONY: help setup same-python demo compare test test-all test-wheel test-tpu-wheel pod-check pod-scaling pod-models prove-resume lint docs notebook lock clean

help:
	@echo "make demo    train a small AlexNet with LARS at batch 8192 on handwritten digits; installs what it needs in .venv"
	@echo "make setup   complete .venv with all that is pinned in requirements/dev.txt"
	@echo "make compare  compare five optimizers over batch sizes on the digits; about half an hour"
	@echo "make test    run the tests"
	@echo "make test-all  run them over the whole of every table"
	@echo "make test-keras-oldest, test-keras-newest, test-torch  run them with other versions (.venv-LANE); TESTS=tests/optimizers"
	@echo "make test-wheel  build sdist and wheel, install and try it in an empty environment, outside the checkout"
	@echo "make test-tpu-wheel  run them with the TPU build of TensorFlow, on the CPU (.venv-tpu; Linux on x86-64 only)"
	@echo "make prove-resume    kill each kind of run 40 times (one device, several, JAX), compare with runs that were not; an hour"
	@echo "make pod-check   compile a recipe for a TPU slice, without a TPU: memory, time at best; FLAGS='...'"
	@echo "make pod-scaling compile what is missing of results/pod_scaling.json; about an hour"
	@echo "make pod-models  compile what is missing of results/pod_models.json; about an hour; needs keras-hub"
	@echo "make lint    check style, docstrings, format, spelling and types"
	@echo "make docs    build the site in build/site, with strict checks of its links (.venv-docs)"
	@echo "make notebook  write docs/*.ipynb from docs/*.py"
	@echo "make lock    resolve requirements/*.txt again (needs uv); LOCK=--upgrade takes newer versions"
	@echo "make clean   remove .venv, .venv-LANE, caches and build output"
	@echo "test, lint and the others run setup first where needed. PYTHON=python3.12 chooses its interpreter."

setup: $(STAMP)

# An environment that is there keeps its interpreter, so another one is refused.
same-python:
	@if [ "$(origin PYTHON)" = "command line" ] && [ -e $(DEMO_STAMP) ] && command -v $(PYTHON) >/dev/null \
	    && [ "$$($(PYTHON) --version)" != "$$($(BIN)/python --version)" ]; then \
	    echo "$(VENV) has $$($(BIN)/python --version), $(PYTHON) is $$($(PYTHON) --version): run make clean first" >&2; exit 1; fi

# The demo needs a part of the packages. What the tests need is put on top, so the order of the two does not matter.
$(DEMO_STAMP): requirements/demo.txt pyproject.toml | same-python
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) is not found; name a Python 3.11 to 3.13: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
	    "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; name another: make setup PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing TensorFlow, Keras and what the demo needs beside them (1.4 GB on disk, takes a minute or two)"
	@$(BIN)/python $(PIP) --no-compile --no-deps --require-hashes -r requirements/demo.txt
	@rm -rf $(VENV)/lib*/python*/site-packages/tensorflow/include  # C++ headers, 290 MB
	@$(BIN)/python $(PIP) --no-compile --no-deps --no-build-isolation --editable .
	@touch $(DEMO_STAMP)

# Compiled here, because the tests turn a warning of a compilation into an error.
$(STAMP): $(DEMO_STAMP) requirements/dev.txt
	@echo "Installing the rest of requirements/dev.txt (2.8 GB on disk in all, takes minutes)"
	@$(BIN)/python $(PIP) --no-compile --require-hashes -r requirements/dev.txt
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(STAMP)
	@echo "$(VENV) is ready"

demo: $(DEMO_STAMP)
	$(BIN)/python -W ignore::SyntaxWarning train.py --flagfile=flags/recipes/demo.flags --noise_scale_every=6
	@echo
	@echo "Open the report in a browser. Then try:"
	@echo "  $(BIN)/python train.py --flagfile=flags/recipes/demo.flags --batch_size=1024 --learning_rate=5   # a smaller batch"
	@echo "  $(BIN)/python train.py --flagfile=flags/recipes/demo.flags --run_dir=runs/mine   # stop it with Ctrl-C; run it again to continue"
	@echo "  $(BIN)/python train.py --help"
	@echo "and in your own model.compile: README.md, docs/optimizers.md"

compare: setup
	$(BIN)/python compare.py --flagfile=flags/comparisons/digits.flags

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder -m ""

# Lanes are run by hand: the tests with other versions than requirements/dev.txt pins, in an environment on top of .venv.
LANES = keras-oldest keras-newest torch
WITH_keras-oldest = keras==3.10.0 tensorflow-cpu==2.20.0
WITH_keras-newest = --upgrade keras
WITH_torch = --require-hashes -r requirements/torch.txt
TESTS_torch = tests/optimizers/test_backends.py tests/tools/test_benchmarks.py -k torch
$(LANES:%=test-%): test-%: setup
	$(BIN)/python -m venv .venv-$*
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > "$$(echo .venv-$*/lib/python*/site-packages)/base.pth"
	.venv-$*/bin/python $(PIP) $(WITH_$*)
	.venv-$*/bin/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder $(TESTS_$*) $(TESTS)

# In an empty environment, outside the checkout: Keras, one backend and the wheel.
test-wheel: setup
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(PYTHON) -m venv .venv-wheel
	$(BIN)/python -m pip freeze --exclude-editable > .venv-wheel/versions
	.venv-wheel/bin/python $(PIP) --constraint .venv-wheel/versions "$$(echo dist/*.whl)[jax]"
	cd .venv-wheel && KERAS_BACKEND=jax bin/python -I ../tests/wheel.py

# The TPU build runs on the CPU where libtpu is absent, so what it says it requires is not asked.
test-tpu-wheel: setup
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	    echo "SKIPPED: tensorflow-tpu has wheels for Linux on x86-64 only, this is $$(uname -sm)"; exit 0; fi; set -e; \
	$(PYTHON) -m venv .venv-tpu; \
	.venv-tpu/bin/python $(PIP) --no-deps --require-hashes -r requirements/tpu.txt; \
	.venv-tpu/bin/python $(PIP) --no-deps --no-build-isolation --editable .; \
	.venv-tpu/bin/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

# FLAGS are those of train.py and of `python -m tools.pod_check --help`.
FLAGS = --flagfile=flags/recipes/alexnet_bn_32k.flags --topology=v5e:16x16
pod-check: setup
	$(BIN)/python -m tools.pod_check $(FLAGS)

pod-scaling: setup
	KERAS_BACKEND=jax $(BIN)/python -m tools.benchmarks.pod_scaling --out=results/pod_scaling.json --plot=docs/pod_scaling.svg

pod-models: setup
	KERAS_BACKEND=jax JAX_PLATFORMS=cpu $(BIN)/python -m tools.benchmarks.pod_models --out=results/pod_models.json

prove-resume: setup
	$(BIN)/python -m tools.kill_and_resume --kills=40 --out=results/resume.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# mkdocs needs none of the packages of .venv: the API is read from the sources.
docs: .venv-docs/installed
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "build/site/index.html"

.venv-docs/installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) --require-hashes -r requirements/docs.txt
	@touch $@

# The notebooks from their sources, the scripts in docs/.
notebook:
	$(PYTHON) -m tools.notebook

LOCK =
COMPILE = $(UV) pip compile $(LOCK) --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
    --annotation-style line --custom-compile-command "make lock" --quiet
EXTRAS = --extra train --extra augment --extra jax --extra dev
# Required by packages of the demo, and loaded by none of what it does: 300 MB.
UNUSED = pyarrow libclang tensorboard-data-server grpcio array-record
lock:
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	$(COMPILE) pyproject.toml $(EXTRAS) --extra tensorflow --extra pod --output-file requirements/dev.txt
	$(COMPILE) pyproject.toml --extra train --extra tensorflow --constraint requirements/dev.txt \
	    $(UNUSED:%=--no-emit-package %) --output-file requirements/demo.txt
	$(COMPILE) pyproject.toml $(EXTRAS) --extra tensorflow-tpu --no-emit-package libtpu --output-file requirements/tpu.txt
	printf "mkdocs-material\nmkdocstrings[python]\nruff\n" | $(COMPILE) - --constraint requirements/dev.txt --output-file requirements/docs.txt
	echo "torch==2.13.0" | $(COMPILE) - --constraint requirements/dev.txt --output-file requirements/torch.txt

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
