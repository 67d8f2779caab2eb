# make demo    the whole way on the embedded data set, in minutes, on a CPU
# make test    every test but the hours-long ones      make test-fast   those that start no second process group
# make test-slurm   those that start a two-node Slurm on this machine: root on Debian
# make check   lint, format, types                     make docs        write the generated pages again
# make soak    the hours-long tests                    make chaos       MINUTES=30 of random faults against one run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# DeepSpeed and torch start a thread a core in every rank; two ranks on a small machine then fight for the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast test-slurm soak chaos check format docs clean

demo: $(VENV)/.stamp
	$(BIN)/triptych demo --out runs/demo

# Two files at a time, since most tests wait more than they compute. Those on Slurm are skipped, and say so.
test: $(VENV)/.stamp
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile

# The cluster has the machine to itself. The first line installs Debian's slurm-wlm and munge where they are missing, and
# says so; the tests bring the cluster up and take it down again.
test-slurm: $(VENV)/.stamp
	bash tests/slurm/local-slurm.sh install
	$(BIN)/python -m pytest -m "slurm and not soak"

# Those that start no second process group.
test-fast: $(VENV)/.stamp
	$(BIN)/python -m pytest -m fast -n 2 --dist loadfile

soak: $(VENV)/.stamp
	$(BIN)/python -m pytest -m soak

MINUTES ?= 30
chaos: $(VENV)/.stamp
	$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp
	$(BIN)/python -m launch.config_reference docs/config.md

.venv: $(VENV)/.stamp

# torch comes first and alone: the machine's index decides which build it is, and what needs it later takes what is
# there. The stamp is last, so an interrupted set-up starts again.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Triptych needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Say PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
