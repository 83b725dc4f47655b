# make demo    train, sample and evaluate on the digits: a few minutes on two CPU cores
# make test    style, then every test
# make quick   style, then the tests that take seconds
# make faults  kill runs, damage their files, fill their disks: 20 minutes, not part of the tests
# make format  put the source into the house style
# make clean   remove caches (never runs or the environment)
#
# The first call makes an environment in $(VENV) with $(PYTHON), 3.10 or newer, and installs the
# pinned requirements there.  `make test PY=python3` takes the packages that python3 has instead.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
endif

.PHONY: demo test quick faults style format clean

demo: $(INSTALLED)
	$(PY) -m examples.digits --workdir runs/demo

test: style
	$(PY) -m pytest -n $(WORKERS)

quick: style
	$(PY) -m pytest -n $(WORKERS) -m "not slow"

faults: $(INSTALLED_DEV)
	PYTHONPATH=tests $(PY) -m faults
	PYTHONPATH=tests $(PY) -m faults.damaged_inputs

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
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "Python 3.10 or newer is needed, and '$(PYTHON)' is not:" \
	    "$$($(PYTHON) --version 2>&1).  Name another one: make PYTHON=python3.12"; exit 1; }
	@echo "Making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A stamp is newer than the files that it was installed from; what is there already stays.
$(VENV)/.installed: requirements.txt requirements-core.txt | $(VENV)/bin/python
	@echo "Installing $< into $(VENV) (2 to 4 minutes the first time)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Installing $< into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
