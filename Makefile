# `make help` lists the targets.
VENV ?= .venv
export DEEPSPARSE_PYTHON
ENV := $(VENV)/bin
RUNTIME := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev
PYTHONS := 3.11 3.12 3.13 3.14
PIP := $(ENV)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
# Of two calls at once the second waits, and finds done what the first has done meanwhile.
define ALONE
if command -v flock >/dev/null; then exec 9>$(VENV).lock; flock -n 9 || { \
	echo "Another make installs into $(VENV); waiting for it to end."; flock 9; }; fi; \
	[ -e $@ ] && [ -z "$$(find $^ -newer $@)" ] && exit 0;
endef
# Whether the Python in .venv is there, has pip, and is one of these versions. What is not so, as after an update of the
# system or an interrupted call, is made anew.
GOOD := -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())'
ifneq ($(wildcard $(RUNTIME)),)
ifneq ($(shell $(ENV)/python $(GOOD) 2>/dev/null && echo good),good)
$(shell rm -f $(RUNTIME) $(TOOLS))
endif
endif
# Tests run in so many processes, each on one thread: threads of several processes slow each other down.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(ENV)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Bytecode is kept, whatever the environment says: each of the many processes of the tests would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(RUNTIME) $(TOOLS) deepsparse ## Install into .venv and .venv-deepsparse; a second call does nothing

# --no-compile: bytecode of the few modules that are used is made when they are first imported.
$(RUNTIME): pyproject.toml constraints.txt
	@$(ALONE) \
	python=$$(sh tools/find-python.sh "$(PYTHONS)" "$(PYTHON)") || { \
	echo "Python $(PYTHONS: =, ) is needed, with its venv module. Install one of these, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1; }; \
	echo "Installing into $(VENV) with $$python (several GB; minutes)"; \
	{ $(ENV)/python $(GOOD) && $(ENV)/python -m pip --version; } >/dev/null 2>&1 || $$python -m venv --clear $(VENV) && \
	$(PIP) pip setuptools && \
	$(PIP) --no-compile --editable '.[train]' && \
	touch $@

$(TOOLS): $(RUNTIME)
	@$(ALONE) \
	$(PIP) --no-compile --editable '.[dev]' && \
	touch $@

.PHONY: deepsparse
deepsparse:
	@sh tools/setup-deepsparse.sh .venv-deepsparse deepsparse==1.8.0

.PHONY: run
run: $(RUNTIME) deepsparse ## Run the main job; overrides go into ARGS, as in make run ARGS="recipe=dense"
	@$(ENV)/python -m sparse_exp $(ARGS)

.PHONY: test
test: setup ## Run the tests (minutes)
	@$(PYTEST) $(ARGS)

.PHONY: test-slow
test-slow: setup ## Run all tests, the long ones too (real weights, real photos)
	@$(PYTEST) -m "slow or not slow" $(ARGS)

.PHONY: lint
lint: setup ## Check style and the laws of the house
	@$(ENV)/ruff check .
	@$(ENV)/ruff format --check .

.PHONY: type
type: setup ## Check types
	@$(ENV)/mypy

.PHONY: dashboard
dashboard: $(RUNTIME) ## Show all runs in MLflow's UI on a free port
	@$(ENV)/python -m sparse_exp.tracking.dashboard $(ARGS)

.PHONY: clean
clean: ## Remove caches and builds; environments and outputs stay
	@rm -rf dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find sparse_exp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
