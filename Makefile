# make demo   sets up and trains a small LITv2 on the embedded data set
# make mm     sets up detection and segmentation; the first time it compiles mmcv, for about 15 minutes on two cores
# make test   sets up everything, builds the compiled operators and runs the checks and the whole test suite
# make test-core   of the tests those of the core alone: without OpenMMLab's packages and the runtimes of exports
# All reuse what an earlier call has set up. PYTHON=... chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo mm test test-core

demo: .venv/ready
	cd classification && ../$(BIN)/python main.py --cfg configs/litv2-digits.yaml
	@echo
	@echo "Go on from here (in classification/, with ../$(BIN)/python for python):"
	@echo "  python main.py --cfg configs/litv2-digits.yaml --resume output/litv2_digits/default/best.pth --eval"
	@echo "  python main.py --cfg configs/litv2-small.yaml --throughput --batch-size 8"
	@echo "  python main.py --cfg configs/litv2-small.yaml --data-path DIR        # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE"
	@echo "  tensorboard --logdir output"

mm: .venv/mm

test: .venv/ready .venv/dcn .venv/native .venv/mm
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-core: .venv/ready .venv/dcn .venv/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not extra" --ignore=tests/detection --ignore=tests/segmentation --ignore=tests/litv2/test_backbone.py

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/dcn: .venv/ready mm_modules/DCN/setup.py $(wildcard mm_modules/DCN/csrc/*)
	cd mm_modules/DCN && ../../$(BIN)/python setup.py build_ext --inplace
	touch $@

.venv/native: .venv/ready litv2/ops/setup.py $(wildcard litv2/ops/csrc/*) mm_modules/DCN/csrc/sample.h
	cd litv2/ops && ../../$(BIN)/python setup.py build_ext --inplace
	touch $@

.venv/mm: .venv/ready requirements-mm.txt scripts/build_mmcv.sh
	scripts/build_mmcv.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements-mm.txt -c requirements.txt
	touch $@
