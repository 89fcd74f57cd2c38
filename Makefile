# Two commands: `make run` and `make test`.  Both make .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PORT ?= 5000
LORAT_HOME ?= $(HOME)/.lorat
export LORAT_HOME
export RAY_AUTH_MODE ?= disabled
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: run test lint ui stop lock

$(READY): infra/requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r infra/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

run: $(READY)  ## Train the small tracker on this machine and register it
	@PATH="$(CURDIR)/$(BIN):$$PATH" infra/local_run.sh $(ARGS)

test: $(READY) lint  ## Run every check
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: $(READY)  ## Open the MLflow UI on the local store
	@mkdir -p "$(LORAT_HOME)"
	@echo "MLflow UI: http://127.0.0.1:$(PORT)  (models: http://127.0.0.1:$(PORT)/#/models)"
	$(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri "sqlite:///$(LORAT_HOME)/mlflow.db" \
	  --default-artifact-root "$(LORAT_HOME)/mlartifacts"

stop:  ## Stop the Ray that `make run` started
	@infra/local_run.sh --stop

lock:  ## Write infra/requirements.lock from pyproject.toml (ARGS=--upgrade for newer versions)
	$(PYTHON) infra/lock.py $(ARGS)
