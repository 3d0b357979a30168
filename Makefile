# make demo        environment, then TwistNet-18 and ResNet-18 on procedural textures: a table and a picture
# make test        environment, then every test
# make test-fast   the tests without those marked slow: each script at least once, in two to three minutes
# make test-floor  the same in an environment of the oldest packages that requirements.txt allows
# make lint        style
# make results     the tables and figures of RESULTS.md, from the runs that results/ keeps

PYTHON ?= python3
VENV ?= .venv
FLOOR_PYTHON ?= python3.10
FLOOR_VENV ?= .venv-floor
PIP = -m pip install --disable-pip-version-check --quiet
PYTEST = -m pytest -n 2 --dist worksteal

.PHONY: demo test test-fast test-floor lint results

demo: $(VENV)/run
	$(VENV)/bin/python train.py --model twistnet18 --run_dir runs/demo
	$(VENV)/bin/python train.py --model resnet18 --run_dir runs/demo
	@echo
	$(VENV)/bin/python summarize_runs.py --run_dir runs/demo
	$(VENV)/bin/python plot_results.py --run_dir runs/demo --save_dir figures --plot curves

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST)

test-fast: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m 'not slow'

test-floor: $(FLOOR_VENV)/dev
	OMP_NUM_THREADS=1 $(FLOOR_VENV)/bin/python $(PYTEST) -m 'not slow'

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

results: $(VENV)/run
	$(VENV)/bin/python summarize_runs.py --run_dir results/insertion --baseline stci_tf_efficientnet_lite0 \
	    --models tf_efficientnet_lite0,stci_no_spiral_tf_efficientnet_lite0,stci_tf_efficientnet_lite0 \
	    --intervals --markdown > results/insertion.md
	$(VENV)/bin/python summarize_runs.py --run_dir results/scratch --baseline twistnet18 \
	    --models resnet18,twistnet18,twistnet18_no_spiral --intervals --markdown > results/scratch.md
	$(VENV)/bin/python summarize_runs.py --run_dir results/scratch --baseline resnet18_zero_init \
	    --models resnet18_zero_init,resnet18,twistnet18 --intervals --markdown > results/scratch_start.md
	$(VENV)/bin/python summarize_runs.py --run_dir results/insertion --baseline tf_efficientnet_lite0 \
	    --intervals --val --csv > results/insertion.csv
	$(VENV)/bin/python -m results.folds results/scratch > results/scratch_folds.txt
	$(VENV)/bin/python -m results.folds results/insertion > results/insertion_folds.txt
	$(VENV)/bin/python -m results.gates results/scratch results/insertion results/pilot_gates results/pilot_no_decay \
	    results/flowers > results/gates.txt
	$(VENV)/bin/python -m results.start results/flowers --pilots results/pilot_flowers_0.05 results/pilot_flowers_0.1 \
	    results/pilot_flowers_0.2 results/pilot_flowers_0.4 results/pilot_flowers_no_clip > results/flowers.txt
	$(VENV)/bin/python -m results.folds results/flowers > results/flowers_folds.txt
	$(VENV)/bin/python summarize_runs.py --run_dir results/probes --csv > results/probes.csv
	$(VENV)/bin/python summarize_runs.py --run_dir results/shots --csv > results/shots.csv
	$(VENV)/bin/python plot_results.py --run_dir results/insertion --save_dir results --plot curves
	$(VENV)/bin/python plot_results.py --run_dir results/insertion --save_dir results --plot gate
	$(VENV)/bin/python plot_results.py --run_dir results/scratch --save_dir results/scratch --plot curves
	$(VENV)/bin/python plot_results.py --run_dir results/scratch --save_dir results/scratch --plot gate
	$(VENV)/bin/python plot_results.py --run_dir results/flowers --save_dir results/flowers --plot curves \
	    --models resnet18,resnet18_zero_init,twistnet18,twistnet18_zero_init
	$(VENV)/bin/python plot_results.py --run_dir results/flowers --save_dir results/flowers --plot gate

# An empty file in the environment marks that the packages of a list are in.
$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(VENV)/bin/python $(PIP) -r requirements-dev.txt
	touch $@

$(FLOOR_VENV)/dev: requirements.txt requirements-dev.txt
	$(FLOOR_PYTHON) -m venv $(FLOOR_VENV)
	sed 's/>=/==/' requirements.txt > $(FLOOR_VENV)/floors.txt
	$(FLOOR_VENV)/bin/python $(PIP) -r requirements-dev.txt -c $(FLOOR_VENV)/floors.txt
	touch $@
