PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
PEERS := .venv-peers/.installed

.PHONY: help demo docs test coverage faults bench lab check lint format lock clean

help:
	@echo "make demo    both notebooks on synthetic scans, with a summary (about 10 minutes on two cores)"
	@echo "make docs    pictures and rendered notebooks in docs/, from what the demo left in outputs/; needs chromium"
	@echo "make test    all tests"
	@echo "make coverage  all tests, and which lines of segkit/ they run"
	@echo "make faults  kills, full disks, damaged and hostile files, counted: docs/reliability.md"
	@echo "make bench   segkit beside its peers: docs/benchmarks.md (once installed, on two cores, 2.5 hours; QUICK=1: 5 minutes)"
	@echo "make lab     JupyterLab with the segkit kernel"
	@echo "make check   versions, device, and what it is fast at"
	@echo "make lint    ruff, and mypy on segkit/"
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

docs: $(READY)
	$(BIN)/python docs/make_docs.py

test: $(READY)
	$(BIN)/python -m pytest

coverage: $(READY)
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report

faults: $(READY)
	SEGKIT_FAULTS=docs/reliability.md $(BIN)/python -m pytest tests/test_faults_*.py

bench: $(READY)
	-$(MAKE) $(PEERS)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

lab: $(READY)
	$(BIN)/python -m ipykernel install --prefix .venv --name python3 --display-name "Python 3 (segkit)"
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/train_unet.ipynb \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

check: $(READY)
	$(BIN)/python -m segkit check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY)
	$(BIN)/python tests/make_lock.py

clean:
	rm -rf .venv .venv-peers
