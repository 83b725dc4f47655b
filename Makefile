# make demo    train, sample and evaluate digits: a few minutes on two CPU cores
# make reproduce  train digits with three seeds; compare with recorded figures: minutes for each
# make test    style, then every test: up to 10 minutes on two idle CPU cores
# make quick   style, then every test that takes seconds: up to 2 minutes
# make faults  kill runs, damage files, fill disks: 20 minutes, not part of `make test`
# make notebooks  execute both notebooks in place: four minutes on two cores
# make benchmark-fashion  train, kill, resume and evaluate Fashion-MNIST: hours on two cores
# make style   check the style
# make format  format the source
# make clean   remove caches, but neither runs nor the environment
#
# The first call creates an environment in $(VENV) with $(PYTHON), 3.10 to 3.13, and installs the
# pinned requirements there.  `make test PY=python3` uses the packages of python3 instead.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
endif

.PHONY: demo reproduce test quick faults notebooks benchmark-fashion style format clean

demo: $(INSTALLED)
	$(PY) -m examples.digits --workdir runs/demo

reproduce: $(INSTALLED)
	$(PY) -m benchmarks.digits_figures --workdir runs/reproduce

test: style
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

quick: style
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

faults: $(INSTALLED_DEV)
	PYTHONPATH=tests $(PY) -m faults
	PYTHONPATH=tests $(PY) -m faults.damaged_inputs

notebooks: $(INSTALLED_DEV)
	$(PY) -m notebooks.run

benchmark-fashion: $(INSTALLED)
	$(PY) -m score_lib.data.prepare fashion_mnist
	$(PY) -m benchmarks.fashion_mnist --workdir runs/fashion

style: $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED_DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))" || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1), but Python 3.10 to 3.13 is needed." \
	    "Type: make PYTHON=python3.12"; exit 1; }
	@echo "Creating an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Stamp files: newer than the requirements that were installed.
$(VENV)/.installed: requirements.txt requirements-core.txt | $(VENV)/bin/python
	@echo "Installing $< into $(VENV) (2 to 4 minutes the first time)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-notebooks.txt $(VENV)/.installed
	@echo "Installing $< into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
