# make demo   environment, then TwistNet-18 and ResNet-18 on procedural textures: a table and a picture
# make test   environment, then every test
# make lint   style

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test lint

demo: $(VENV)/run
	$(VENV)/bin/python train.py --model twistnet18 --run_dir runs/demo
	$(VENV)/bin/python train.py --model resnet18 --run_dir runs/demo
	@echo
	$(VENV)/bin/python summarize_runs.py --run_dir runs/demo
	$(VENV)/bin/python plot_results.py --run_dir runs/demo --save_dir figures --plot curves

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# An empty file in the environment marks that the packages of a list are in.
$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(PIP) -r requirements-dev.txt
	touch $@
