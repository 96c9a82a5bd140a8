# make demo · make test · make bench · make docs    (each sets itself up: Python 3.11 and make are all it needs)

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
# Where the demo writes; everything below it can be deleted.
DEMO ?= demo
# Two test processes, whole files each: most tests keep one core busy.
PARALLEL ?= -n 2 --dist loadfile
# Small computations: TensorFlow's and JAX's start-up messages are noise here.
export TF_CPP_MIN_LOG_LEVEL := 3
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-full lint bench docs install install-dev clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed: set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: install
	$(RUN) -m data_prep.synthetic --out $(DEMO)/world --scenes 200 --keyframes 1 --seed 1 --image_scale 0.25
	$(RUN) -m data_prep.tiny_clip --world $(DEMO)/world --out $(DEMO)/tiny_clip
	$(RUN) -m data_prep.build --source $(DEMO)/world --version v1.0-trainval --split train --out $(DEMO)/records
	$(RUN) -m data_prep.build --source $(DEMO)/world --version v1.0-trainval --split val --out $(DEMO)/records
	$(RUN) -m pop3d_jax.train --config configs/demo.py --workdir $(DEMO)/run \
		--config.data.records=$(DEMO)/records --config.teacher.path=$(DEMO)/tiny_clip
	$(RUN) -m pop3d_jax.query --workdir $(DEMO)/run --sample 2 --text "a tree" --out $(DEMO)/tree.png
	$(RUN) -m pop3d_jax.query --workdir $(DEMO)/run --sample 0 --text "a red car" --out $(DEMO)/red_car.png
	$(RUN) -m pop3d_jax.evaluate --workdir $(DEMO)/run --baselines --retrieval $(DEMO)/world/retrieval --out $(DEMO)/results.json
	@echo
	@echo "numbers:  $(DEMO)/results.json"
	@echo "pictures: $(DEMO)/tree.png $(DEMO)/red_car.png"
	@echo "ask more: $(RUN) -m pop3d_jax.query --workdir $(DEMO)/run --sample 5 --text \"a yellow car\" --out answer.png"

test: install-dev
	$(RUN) -m pytest -m "not slow" $(PARALLEL)

test-full: install-dev
	$(RUN) -m pytest $(PARALLEL)

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The benchmarks of the performance page that run here, a quarter of an hour in all. Records and data set are the demo's
# unless RECORDS, SPLIT, SOURCE, VERSION and SOURCE_SPLIT say otherwise: the page's own were made with nuScenes' files. With
# RESULTS=docs/results the page is made anew. Apart are `python -m benchmarks.topologies` and --topology, which need libtpu
# and hours, `python -m benchmarks.teacher`, and `python -m benchmarks.grid_search`, which needs 14 GB of disk.
RECORDS ?= $(DEMO)/records
SPLIT ?= train
SOURCE ?= $(DEMO)/world
VERSION ?= v1.0-trainval
SOURCE_SPLIT ?= val
REPEAT ?= 1
RESULTS ?= bench
bench: install-dev
	$(RUN) -m benchmarks.labels --json $(RESULTS)
	$(RUN) -m benchmarks.corruptions --json $(RESULTS)
	$(RUN) -m benchmarks.deformable_attention --json $(RESULTS)
	$(RUN) -m benchmarks.deformable_conv --json $(RESULTS)
	$(RUN) -m benchmarks.input_pipeline --records $(RECORDS) --split $(SPLIT) --json $(RESULTS)
	$(RUN) -m benchmarks.neighbors --json $(RESULTS)
	$(RUN) -m benchmarks.record_building --source $(SOURCE) --version $(VERSION) --split $(SOURCE_SPLIT) \
		--repeat $(REPEAT) --json $(RESULTS)
	$(RUN) -m benchmarks.step_shares --config.data.records=$(DEMO)/records \
		--config.teacher.path=$(DEMO)/tiny_clip --json $(RESULTS)
	$(RUN) -m benchmarks.weak_scaling --config.teacher.path=$(DEMO)/tiny_clip --json $(RESULTS)
	$(RUN) -m benchmarks.grid_precision --workdir $(DEMO)/run --retrieval $(DEMO)/world/retrieval --json $(RESULTS)
	$(RUN) -m benchmarks.whole_system --json $(RESULTS)
	@if [ "$(RESULTS)" = docs/results ]; then $(RUN) -m benchmarks.page; fi

# The public Python API, docs/api.md, as HTML.
PUBLIC := pop3d_jax.grids.feature_grids pop3d_jax.data.records
docs: install-dev
	$(VENV)/bin/pdoc --docformat google --output-directory site $(PUBLIC)

clean:
	rm -rf $(VENV) $(DEMO) site
