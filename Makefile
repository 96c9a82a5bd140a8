# make demo · make demo-scalr · make demo-occupancy · make test · make bench · make docs    (each sets itself up: Python 3.11 and make are all it needs)

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

.PHONY: demo demo-scalr demo-occupancy test test-full lint bench docs install install-dev clean

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

# The demo's network on Occ3D's grid, by every rule, with three lists of prompts, against the world's true labels and
# against labels accumulated from its sweeps: $(DEMO)/occupancy.md. After `make demo`.
demo-occupancy: install
	@test -d $(DEMO)/run || { echo "there is no $(DEMO)/run to score: run make demo first" >&2; exit 1; }
	$(RUN) -m data_prep.dense_labels --world $(DEMO)/world --split val --out $(DEMO)/gts
	$(RUN) -m data_prep.boxes --source $(DEMO)/world --version v1.0-trainval --split val --out $(DEMO)/records
	for prompts in plain pop3d gausstr; do \
		$(RUN) -m pop3d_jax.evaluate_occupancy --ground_truth $(DEMO)/gts --predictions $(DEMO)/run --all \
			--prompts $$prompts --method "demo, $$prompts" --out $(DEMO)/occupancy/$$prompts.json || exit 1; \
	done
	$(RUN) -m pop3d_jax.evaluate_occupancy --ground_truth accumulated --predictions $(DEMO)/run --all \
		--method "demo, plain" --out $(DEMO)/occupancy/accumulated.json
	$(RUN) -m pop3d_jax.occupancy_results --results $(DEMO)/occupancy --out $(DEMO)/occupancy.md

# The second system: one world seen by the sensors of three data sets, each in its own layout on disk. PandaSet's layout is
# of pandas tables.
SCALR ?= demo_scalr
demo-scalr: install
	$(RUN) -m pip install --quiet --disable-pip-version-check "pandas>=2.2"
	$(RUN) -m data_prep.synthetic --out $(SCALR)/nuscenes --scenes 100 --keyframes 1 --seed 1 --image_scale 0.25
	$(RUN) -m data_prep.synthetic --out $(SCALR)/semantic_kitti --layout semantic_kitti --scenes 11 --keyframes 6 \
		--seed 2 --image_scale 0.3
	$(RUN) -m data_prep.synthetic --out $(SCALR)/pandaset --layout pandaset --scenes 20 --keyframes 2 --seed 3 \
		--image_scale 0.2
	$(RUN) -m data_prep.tiny_clip --world $(SCALR)/nuscenes --out $(SCALR)/tiny_clip
	for split in train val; do \
		$(RUN) -m data_prep.build --source $(SCALR)/nuscenes --version v1.0-trainval --split $$split \
			--out $(SCALR)/records/nuscenes || exit 1; \
		$(RUN) -m data_prep.build --dataset semantic_kitti --source $(SCALR)/semantic_kitti --split $$split \
			--out $(SCALR)/records/semantic_kitti || exit 1; \
	done
	for lidar in pandar64 pandar_gt; do \
		$(RUN) -m data_prep.build --dataset $$lidar --source $(SCALR)/pandaset --split train \
			--out $(SCALR)/records/$$lidar || exit 1; \
	done
	$(RUN) -m benchmarks.scalr_study --records $(SCALR)/records --teacher $(SCALR)/tiny_clip --out $(SCALR)/study
	$(RUN) -m pop3d_jax.query --lidar --workdir $(SCALR)/study/one-0 --sample 2 --point 10,5,-1 \
		--out $(SCALR)/like_this_point.png
	$(RUN) -m pop3d_jax.query --lidar --workdir $(SCALR)/study/one-0 --sample 2 --text "a tree" \
		--out $(SCALR)/tree.png
	@echo
	@echo "numbers:  $(SCALR)/study/scalr_study.json"
	@echo "pictures: $(SCALR)/like_this_point.png $(SCALR)/tree.png"

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
	$(RUN) -m benchmarks.accumulated_truth --json $(RESULTS)
	$(RUN) -m benchmarks.deformable_attention --json $(RESULTS)
	$(RUN) -m benchmarks.deformable_conv --json $(RESULTS)
	$(RUN) -m benchmarks.input_pipeline --records $(RECORDS) --split $(SPLIT) --json $(RESULTS)
	$(RUN) -m benchmarks.neighbors --json $(RESULTS)
	$(RUN) -m benchmarks.ray_casting --json $(RESULTS)
	$(RUN) -m benchmarks.occ3d_labels --json $(RESULTS)
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
	rm -rf $(VENV) $(DEMO) $(SCALR) site
