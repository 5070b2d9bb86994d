# What people type. `make demo` and `make test` set up .venv where it is missing; later runs start at once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= auto
SOURCES = $(shell find csrc -type f) $(shell grep -rl --include='*.py' '^define\b' fused_cnn/ops) setup.py
CPP = $(shell find csrc examples tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo venv test lint format bench compile-check cuda-check triton-check guard guard-update report install-matrix torch-matrix sanitize gpu-evidence

demo: venv
	$(BIN)/fused-cnn verify

venv: $(VENV)/.built

$(VENV)/.ready: pyproject.toml scripts/make_venv.py examples/torchvision_shim.py
	$(PYTHON) scripts/make_venv.py $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# Passive waiting: two workers whose threads spin for each other's cores take ten times as long.
test: venv
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: venv
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=out/benchmarks.json

compile-check: cuda-check triton-check

# What may not become worse without being asked: launches, traffic, kernels' registers (benchmarks/guard.json).
CHECKS = out/compile-check
guard: compile-check
	$(BIN)/python scripts/guard.py $(CHECKS)/*.json

guard-update: compile-check
	$(BIN)/python scripts/guard.py --update $(CHECKS)/*.json

report: venv
	$(BIN)/fused-cnn report --update README.md --update benchmarks/RESULTS.md --update benchmarks/OPS.md --update benchmarks/KERNELS.md --out benchmarks/plots

cuda-check: venv
	$(BIN)/python scripts/compile_check.py --only cuda --json $(CHECKS)/cuda.json

# With the newest Triton; and for Hopper, in the dtypes that it leaves out or has products of their own for, with the oldest that
# machines with CUDA 13 have (torch 2.11 brings it).
OLD_TRITON = 3.6.0
triton-check: venv $(VENV)/triton-$(OLD_TRITON)
	$(BIN)/python scripts/compile_check.py --only triton --json $(CHECKS)/triton.json
	PYTHONPATH=$(abspath $(VENV)/triton-$(OLD_TRITON)) $(BIN)/python scripts/compile_check.py --only triton --target 90 --dtype fp16 --dtype fp32 --json $(CHECKS)/triton-$(OLD_TRITON).json

$(VENV)/triton-$(OLD_TRITON): | venv
	rm -rf $@.partial
	$(BIN)/python -m pip install -qq --no-deps --target $@.partial triton==$(OLD_TRITON)
	mv $@.partial $@

torch-matrix: venv
	$(BIN)/python scripts/torch_matrix.py

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: five minutes to build, as many to run.
sanitize: venv
	$(BIN)/python scripts/sanitize.py

install-matrix: venv
	$(BIN)/python scripts/install_matrix.py

gpu-evidence: venv
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/gpu.sh quick out/gpu
