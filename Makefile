# make demo   set up, then grow networks on two tasks and write a report
# make test   set up, then run the tests
# make up     set up, then a lab on this machine: PostgreSQL, Redis, S3, Urza, two workers; Ctrl-C
#             ends it. LAB="--workers 4 --port redis=6400" gives it options
# make down   end a lab that runs elsewhere, or what is left of one that was killed
# make logs   follow what its servers say
# make CUDA=1 ... installs jax's CUDA build as well

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := all,dev$(if $(CUDA),$(comma)cuda)
comma  := ,
STAMP  := $(VENV)/.installed$(if $(CUDA),-cuda)

.PHONY: setup demo test check up down logs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Esper needs Python 3.11 to 3.13; this is %d.%d: try make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/python -m experiments.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

up: setup
	@exec $(BIN)/python -m esper.lab up $(LAB)

down: setup
	@$(BIN)/python -m esper.lab down

logs:
	@test -d runs/lab/logs || { echo "there is no lab in runs/lab: make up brings one up" >&2; exit 1; }
	@exec tail -n 20 -F runs/lab/logs/*.log

clean:
	rm -rf $(VENV) runs
