PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
PEERS := .venv-peers/.installed

.PHONY: help demo test faults bench lab check lint format lock clean

help:
	@echo "make demo    both notebooks on synthetic scans, with a summary (about 10 minutes on two cores)"
	@echo "make test    all tests"
	@echo "make faults  kills, full disks, damaged and hostile files, counted: docs/reliability.md"
	@echo "make bench   segkit beside its peers: docs/benchmarks.md (1.5 to 2 hours on two cores; QUICK=1: 5 minutes)"
	@echo "make lab     JupyterLab with the segkit kernel"
	@echo "make check   versions, device, and what it is fast at"
	@echo "make lint    ruff"
	@echo "make lock    pins and licences of all that is installed, after a change of requirements.txt"

$(READY): requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "segkit needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -c requirements.lock
	touch $@

# without them the page says which peers are missing, and goes on
$(PEERS): benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $$(grep ^torch== $<)
	.venv-peers/bin/python -m pip install --quiet -r $<
	touch $@

demo: $(READY)
	$(BIN)/python -m segkit demo

test: $(READY)
	$(BIN)/python -m pytest

faults: $(READY)
	SEGKIT_FAULTS=docs/reliability.md $(BIN)/python -m pytest tests/test_faults_*.py

bench: $(READY)
	-$(MAKE) $(PEERS)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

lab: $(READY)
	$(BIN)/python -m ipykernel install --prefix .venv --name python3 --display-name "Python 3 (segkit)"
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/train_unet.ipynb

check: $(READY)
	$(BIN)/python -m segkit check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY)
	$(BIN)/python tests/make_lock.py

clean:
	rm -rf .venv .venv-peers
