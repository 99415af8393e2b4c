# From a fresh clone: `make demo` trains on the embedded data, `make test` runs every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
STAMP := $(VENV)/.installed
# What a compiled or declared part depends on; Python sources are read in place.
BUILD_FILES := pyproject.toml CMakeLists.txt $(wildcard tools/*.py) \
               $(wildcard csrc/* csrc/*/*)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cpp csrc/*/*.cu \
               csrc/*/*.cuh tests/ops/cuda_emulator/*.h tests/ops/cuda_emulator/*.cpp)

.PHONY: help install demo test lint format clean

help:
	@echo "make demo    set up $(VENV), train on the embedded digits, write $(OUT)/report.html"
	@echo "make test    set up $(VENV), run every test"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make clean   remove $(VENV), build/ and $(OUT)/"

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: the package then compiles against it instead of fetching a second copy.
$(STAMP): $(BIN)/python $(BUILD_FILES)
	$(BIN)/python -m pip install --quiet "torch>=2.11" torchvision
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

demo: $(STAMP)
	$(BIN)/fastscarce doctor
	$(BIN)/fastscarce selftrain --out $(OUT) --overwrite --threads 1

# A process a core; a file's tests stay together, with what they share.
test: $(STAMP)
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build $(OUT)
