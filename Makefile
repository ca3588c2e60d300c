# make demo: train a small model on real text on this machine, export it, read it back, score it, adapt it, audit it.
# make test: the tests, in WORKERS processes. make test-slow: the long tests, including fault injection.
# make example: three short runs become a record folder, which then trains and scores without the rest of the project.
# make rehearse: the nine-minute GPU measurement (tests/benchmarks/gpu_minutes.py), at toy size on a CPU.
# All build .venv first. TORCH_INDEX=URL installs torch from that index, for example a CPU index.
PYTHON ?= python3
SEED ?= 1337
WORKERS ?= 2
PY := .venv/bin/python
STAMP := $(shell date +%Y-%m-%d_%H-%M-%S)
RUN_ID ?= demo_$(STAMP)_seed$(SEED)
TORCH := $(shell grep '^torch==' requirements.txt)

demo: .venv/ready data/demo/manifest.json
	RECIPE=records/recipes/demo.env SEED=$(SEED) RUN_ID=$(RUN_ID) $(PY) -m torch.distributed.run --standalone --nproc_per_node=1 train_gpt.py
	RECIPE=records/recipes/demo.env MODEL_PATH=runs/$(RUN_ID)/final_model.int6.ptz $(PY) eval_ttt.py
	RECIPE=records/recipes/demo.env MODEL_PATH=runs/$(RUN_ID)/final_model.int6.ptz $(PY) eval_ttt.py --audit
	$(PY) records/analyze.py runs/$(RUN_ID)
	RECIPE=records/recipes/demo.env MODEL_PATH=runs/$(RUN_ID)/final_model.int6.ptz $(PY) eval_ttt.py --sample --document 3 --length 64

test: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=15

test-slow: .venv/ready
	$(PY) -m pytest --durations=15 -m slow

example: data/demo/manifest.json
	$(PY) tests/example_record.py

rehearse: .venv/ready
	$(PY) tests/benchmarks/gpu_minutes.py --rehearse --out $$(mktemp -d)

data/demo/manifest.json: data/demo.py data/prepare.py | .venv/ready
	rm -rf data/demo
	$(PY) data/demo.py --out data/demo

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-slow example rehearse
