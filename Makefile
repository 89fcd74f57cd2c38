# `make run` and `make test`, and some more: `make help`.  They make .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PORT ?= 5000
LORAT_HOME ?= $(HOME)/.lorat
export LORAT_HOME
export MLFLOW_DISABLE_TELEMETRY ?= true
# The jobs of MLflow's server are for language models, and take seven processes more.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION ?= false
# Every process of Ray would compile anew what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all style lint ui serve stop lock help

# uv unpacks on all cores; where it cannot have the packages, since it reads nothing of pip's
# settings, pip gets them.  That some files of the packages cannot be compiled is no matter.
$(READY): infra/requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	{ $(PIP) 'uv>=0.9' && \
	  $(BIN)/uv pip install --quiet --native-tls --python $(BIN)/python -r infra/requirements.lock; } \
	  || $(PIP) --no-compile -r infra/requirements.lock
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	$(PIP) --no-deps --editable .
	touch $@

run: $(READY)  ## Train the small tracker on this machine and register it
	@PATH="$(CURDIR)/$(BIN):$$PATH" infra/local_run.sh $(ARGS)

test: $(READY) style  ## Run the checks, on 2 cores in 25 minutes (ARGS="tests/lorat -k lr" for a part)
	$(BIN)/python -m pytest $(ARGS)

test-all: $(READY) style  ## Run these and the exhaustive ones, in about 45 minutes
	$(BIN)/python -m pytest -m "" $(ARGS)

style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

lint: style  ## Check format, rules and types
	$(BIN)/mypy

ui: $(READY)  ## Open the MLflow UI on the local store
	@mkdir -p "$(LORAT_HOME)"
	@echo "MLflow UI: http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	@echo "models:    http://127.0.0.1:$(PORT)/#/models?workflowType=machine_learning"
	$(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri "sqlite:///$(LORAT_HOME)/mlflow.db" \
	  --default-artifact-root "$(LORAT_HOME)/mlartifacts"

serve: $(READY)  ## Serve the champion, or else the candidate, with a page to try it on (ARGS="--port 9000")
	@$(BIN)/python jobs/serve.py $(ARGS)

stop:  ## Stop the Ray that `make run` started
	@infra/local_run.sh --stop

lock:  ## Write infra/requirements.lock from pyproject.toml (ARGS=--upgrade for newer versions)
	$(PYTHON) infra/lock.py $(ARGS)

help:  ## Say what each command does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
	  | awk -F '|' '{printf "make %-9s %s\n", $$1, $$2}'
