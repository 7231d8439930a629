PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: install demo test check size bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install ## see a proxy being overoptimized, end to end, on the embedded toy world
	$(BIN)/pyrite recipe overoptimization --scale toy --out runs/overoptimization

test: install ## everything that fits in 15 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

check: install ## lint, types, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

size: install ## measure the package: files, lines, chains, options
	$(BIN)/python docs/house.py

bench: install ## against the peers, interleaved; JSON on the last line of each (ppo: PPO_PEER=python of an old trl)
	@for b in benchmarks/[a-z]*.py; do \
	  case $$b in *ppo.py) [ -n "$(PPO_PEER)" ] || continue; more="--peer-python $(PPO_PEER)";; *) more=;; esac; \
	  $(BIN)/python $$b --quick $$more || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
