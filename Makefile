# make demo | test | check | up | bench. Everything is installed into .venv; nothing else is needed but Python 3.11+.
PYTHON ?= python3
HOME_DIR ?= workspace
PORT ?= 3000
MLFLOW_PORT ?= 5000
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-all check format up bench wheel
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## The whole graph on drawn pictures and tiny models: about four minutes on two cores, after setting up.
	test -f $(HOME_DIR)/foundry.toml || $(BIN)/foundry init $(HOME_DIR) --preset demo
	$(BIN)/foundry run --home $(HOME_DIR)

# Three thirds side by side, since each waits half of its time: the walk of kills with the pages, the rest of the graph's
# tests, and all others, whose output comes first.
define run_tests
	@$(BIN)/python -m pytest -q $(1) tests/graph/test_kill.py tests/graph/test_ui.py > .venv/kill-tests.log 2>&1 & kills=$$!; \
	$(BIN)/python -m pytest -q $(1) tests/graph --ignore tests/graph/test_kill.py --ignore tests/graph/test_ui.py \
		> .venv/graph-tests.log 2>&1 & graph=$$!; \
	trap "kill $$kills $$graph" INT TERM; \
	$(BIN)/python -m pytest -q $(1) --ignore tests/graph; others=$$?; \
	wait $$graph; graph=$$?; wait $$kills; kills=$$?; \
	cat .venv/graph-tests.log .venv/kill-tests.log; exit $$((graph | kills | others))
endef

test: $(STAMP)  ## The tests, without the long proofs.
	$(call run_tests,)

test-all: $(STAMP)  ## The tests with the long proofs.
	$(call run_tests,-m 'not gpu and not weights')

check: $(STAMP)  ## Format, lint and types, then the tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: $(STAMP)  ## Dagster and MLflow on 127.0.0.1 until Ctrl-C.
	@exec $(BIN)/foundry up --home $(HOME_DIR) --port $(PORT) --mlflow-port $(MLFLOW_PORT)

bench: $(STAMP)  ## Every benchmark; each prints its ratios.
	@for file in benchmarks/bench_*.py benchmarks/train_throughput.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

wheel: $(STAMP)  ## The wheel that a training bundle needs, in dist/.
	$(BIN)/pip wheel --quiet --no-deps -w dist .
