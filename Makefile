# The only entry point. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := src/myelin/native
# The other CPU levels take one of these runtimes (src/myelin/cpu.py).
RUNTIMES := x86-64-v3 x86-64-v4
RUST := $(shell find enclave cell -name '*.rs' -o -name '*.toml' -o -name '*.lock' -o -name '*.sh' -o -name '*.ld' -o -name '*.s' 2>/dev/null | grep -v /target/)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-kernels bench-scaling bench-threads bench-records bench-load bench-noise bench-inference bench-accuracy size wheel docs clean vectors

help:
	@echo "make setup           virtual environment, enclave runtime and cell"
	@echo "make demo            three hospitals train one private model (simulated TEE)"
	@echo "make test            all quick tests; SLOW=1 adds the slow ones"
	@echo "make check           formatters, linters, types, import rules"
	@echo "make bench           examples per second beside PyTorch and Opacus; MODELS=all, PAGE=1"
	@echo "make bench-kernels   each kernel against the machine's limits; MODELS=mlp,vgg9"
	@echo "make bench-scaling   examples per second and memory over batch and width"
	@echo "make bench-threads   one thread against two; how long helping threads wait"
	@echo "make bench-records   parts of a step, over the number of records it draws from"
	@echo "make bench-load      a sealed file on its way into enclave memory"
	@echo "make bench-noise     samples of noise a second"
	@echo "make bench-inference predictions beside PyTorch and ONNX Runtime"
	@echo "make bench-accuracy  loss curves beside PyTorch's, without noise"
	@echo "make size            lines of trusted Rust, against their limit"
	@echo "make wheel           a wheel that carries the prebuilt runtime and cell"
	@echo "make docs            check that links and commands in the documents are real"
	@echo "make clean           remove what was built"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Myelin needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[compile,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[compile,onnx,torch,demo,bench,dev]'
	@touch $@

$(NATIVE)/cell: $(RUST)
	@mkdir -p $(NATIVE)
	sh cell/build.sh $(NATIVE)
	@touch $@

$(NATIVE)/libmyelin_enclave-%.a: $(RUST)
	@mkdir -p $(NATIVE) build/enclave
	sh enclave/build.sh $* build/enclave/$*
	cp build/enclave/$*/libmyelin_enclave.a $@
	cp enclave/image.ld $(NATIVE)/image.ld

setup: $(VENV)/.demo $(NATIVE)/cell $(RUNTIMES:%=$(NATIVE)/libmyelin_enclave-%.a)

demo: $(VENV)/.demo $(NATIVE)/cell $(NATIVE)/libmyelin_enclave-x86-64-v3.a
	@$(BIN)/myelin demo

test: setup $(VENV)/.dev
	cd enclave && cargo test --locked --quiet
	cd cell && cargo test --locked --quiet
	$(BIN)/pytest $(if $(SLOW),,-m 'not slow')

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd enclave && cargo fmt --check && cargo clippy --locked --all-targets --quiet -- -D warnings
	cd cell && cargo fmt --check && cargo clippy --locked --all-targets --quiet -- -D warnings
	$(MAKE) --no-print-directory size

bench: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks $(if $(MODELS),--models $(MODELS)) $(if $(PAGE),--page)

bench-kernels: $(VENV)/.dev
	$(BIN)/python -m benchmarks.kernels $(if $(MODELS),--models $(MODELS))

bench-scaling: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks.scaling

bench-threads: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks.threads $(if $(MODELS),--models $(MODELS))

bench-records: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks.records $(if $(MODELS),--models $(MODELS))

bench-load: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks.load

bench-noise: $(VENV)/.dev
	$(BIN)/python -m benchmarks.noise

bench-inference: $(VENV)/.dev
	$(BIN)/python -m benchmarks.inference $(if $(MODELS),--models $(MODELS))

bench-accuracy: $(VENV)/.dev
	$(BIN)/python -m benchmarks.accuracy $(if $(MODELS),--models $(MODELS))

size:
	@sh enclave/size.sh

wheel: setup $(VENV)/.dev
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel -C--build-option=--plat-name=manylinux2014_x86_64 .

docs: $(VENV)/.dev
	$(BIN)/pytest tests/test_docs.py

clean:
	rm -rf build dist $(NATIVE) enclave/target cell/target
