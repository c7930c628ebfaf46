# make demo   sets up and trains a small LITv2 on the embedded data set
# make mm     sets up detection and segmentation; the first time it compiles mmcv, for about 15 minutes on two cores
# make site CHECKPOINT=FILE   writes output/site, a page that runs this classifier in the browser; needs npm
# make test   sets up everything, compiles the native operators and runs the checks (ruff, mypy) and the whole test suite
# make test-core   of the tests those of the core alone: without OpenMMLab's packages, the runtimes of exports and the examples'
# make sanitize    runs the native operators' tests with the compiler's checks of memory and undefined behaviour; needs GCC on Linux
# make locks       renews locks/: every package that each requirements file leads to, with its version and hashes
# make audit       looks for known vulnerabilities of the locked packages, where the data can be had
# make sbom        writes output/sbom.json, what is installed in .venv, in CycloneDX's format
# make paper    writes output/benchmarks/paper.md: the paper's tables and figures beside what is counted and measured here;
#               IMAGES=DIR, of the classes of examples/litv2_imagenette.safetensors, adds figure 5, and make mm before it detectors
# make faults   kills trainings, fills their disks and takes their processes away, hundreds of times, and resumes them; gives damaged files
#               to every reader; watches the memory of long runs: a night
# All reuse what an earlier call has set up. PYTHON=... chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEMO := output/litv2_digits/default
# Files in their order: else those of few tests come last, which are the longest, and one of two processes waits for the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-loadscope-reorder

.PHONY: demo mm site test test-core faults operators checkpoint sanitize locks audit sbom paper

demo: .venv/ready
	@$(BIN)/python -m litv2 build || echo "going on without the native operators: torch's own compute the same, more slowly"
	cd classification && ../$(BIN)/python main.py --cfg configs/litv2-digits.yaml
	@echo
	@echo "Go on from here (in classification/, with ../$(BIN)/python for python):"
	@echo "  python main.py --cfg configs/litv2-digits.yaml --resume $(DEMO)/best.pth --eval"
	@echo "  python main.py --cfg configs/litv2-small.yaml --throughput --batch-size 8"
	@echo "  python main.py --cfg configs/litv2-small.yaml --data-path DIR        # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE"
	@echo "  tensorboard --logdir output"
	@echo "The pictures of this training:"
	@ls classification/$(DEMO)/*.png

mm: .venv/mm

site: checkpoint .venv/export docs/site/node_modules/ready
	$(BIN)/python -m litv2 site --checkpoint "$(CHECKPOINT)" --out output/site

checkpoint:
	@test -n "$(CHECKPOINT)" || { echo "no checkpoint: make site CHECKPOINT=FILE, the weights of a classifier" >&2; exit 1; }

test: .venv/test operators .venv/mm .venv/examples
	@$(MAKE) --no-print-directory docs/site/node_modules/ready || echo "going on without onnxruntime-web: tests of the page that needs it skip"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(PYTEST)

test-core: .venv/test operators
	$(PYTEST) -m "not extra" --ignore=tests/detection --ignore=tests/segmentation --ignore=tests/litv2/test_backbone.py

sanitize: .venv/test
	$(BIN)/python -m tests.sanitizers

# For Linux, where the tests are run. mmcv is built from its source, by scripts/build_mmcv.sh.
LOCK := $(BIN)/python -m uv pip compile --quiet --generate-hashes --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-header --no-annotate
locks: .venv/supply
	mkdir -p locks
	for name in requirements requirements-export requirements-explain requirements-examples requirements-track requirements-test requirements-supply; do \
		$(LOCK) $$name.txt --output-file locks/$$name.txt || exit; done
	VIRTUAL_ENV=.venv $(LOCK) --no-build-isolation requirements-mm.txt -c requirements.txt --output-file locks/requirements-mm.txt

audit: .venv/supply
	$(BIN)/python scripts/audit.py locks/*.txt

sbom: .venv/supply
	mkdir -p output
	$(BIN)/python -m cyclonedx_py environment --output-format JSON --output-file output/sbom.json

paper: .venv/ready
	$(BIN)/python -m benchmarks.paper --quick $(if $(IMAGES),--images "$(IMAGES)")

faults: .venv/test .venv/mm
	mkdir -p output
	$(BIN)/python -m tests.faults --times 20 --json output/faults.json
	$(BIN)/python -m tests.faults.fuzz --inputs 1000000 --seed 1 --json output/fuzz.json
	$(BIN)/python -m tests.faults.long --json output/long.json

# Into the user's cache folder, which knows by itself what is there already: several clones share one build.
operators: .venv/ready
	$(BIN)/python -m litv2 build

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.venv/test: .venv/ready requirements-test.txt requirements-export.txt requirements-explain.txt requirements-track.txt
	$(PIP) install -r requirements-test.txt
	touch $@

.venv/supply: .venv/ready requirements-supply.txt
	$(PIP) install -r requirements-supply.txt
	touch $@

.venv/export: .venv/ready requirements-export.txt
	$(PIP) install -r requirements-export.txt
	touch $@

.venv/mm: .venv/ready requirements-mm.txt scripts/build_mmcv.sh
	scripts/build_mmcv.sh $(BIN)/python
	$(PIP) install --no-build-isolation -r requirements-mm.txt -c requirements.txt
	touch $@

.venv/examples: .venv/ready requirements-examples.txt
	$(PIP) install -r requirements-examples.txt
	touch $@

docs/site/node_modules/ready: docs/site/package.json docs/site/package-lock.json
	cd docs/site && npm ci --ignore-scripts --no-audit --no-fund
	touch $@
