# Every target sets up .venv first if needed. `make demo` and `make test` run from a clean clone.
# PYTHON=3.11 means python3.11.
PYTHON ?= python3
VERSION := $(filter 3.%,$(PYTHON:python%=%))
override PYTHON := $(if $(filter 3.%,$(PYTHON)),python$(PYTHON),$(PYTHON))
BIN := .venv/bin
# xformers' kernels are for NVIDIA GPUs only.
EXTRAS := test,dev,peers$(if $(shell command -v nvidia-smi 2>/dev/null),$(comma)cuda)
comma := ,

.PHONY: help setup demo sample-data test test-fast test-oldest notebooks kill-test fuzz check format docs constraints gpu-bundle clean
help:
	@echo "make setup        create .venv with the versions of constraints.txt"
	@echo "make demo         run the full pipeline on the CPU, 5 to 8 minutes: notes, base model, LoRA, answers, scores"
	@echo "make sample-data  write 1,000 fictional notes and their codes to sample_data: train, eval and test"
	@echo "make notebooks    run the tutorials and save their outputs in them; replaces runs/tutorials"
	@echo "make test         run all tests;  make test-fast  skip the slow ones"
	@echo "make test-oldest  run all tests with the lowest versions that pyproject.toml allows, in .venv-oldest"
	@echo "make kill-test    kill 200 runs at random instants, resume them and compare the results"
	@echo "make fuzz         10,000 random inputs per fuzz target"
	@echo "make check        lint, format, types, spelling, dead code;  make format  apply automatic fixes"
	@echo "make docs         regenerate docs/configuration.md and tables of docs/models.md and docs/hardware.md"
	@echo "make gpu-bundle   collect wheels for a GPU machine without network: PYTHON=3.12 CUDA=130 WITHOUT=\"matplotlib tensorboard\""
	@echo "make constraints  write the versions installed in .venv to constraints.txt, after make test passed"
	@echo "make clean        remove what make demo and make sample-data wrote"

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 ..."'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

# Two seeds of notes share no note. The tests use smaller numbers.
DEMO_NOTES := 3000
DEMO_HELD_OUT := 150
DEMO_BASE_STEPS := 1500
DEMO_SEED := 0
DEMO_CODES := example/demo_cim10.tsv
DEMO_GENERATE := $(BIN)/python -m utils.generate_notes --length short --cim10 $(DEMO_CODES)
# Matrices this small do not benefit from more threads. torchrun would set one.
demo: export OMP_NUM_THREADS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
demo: setup
	rm -rf demo
	$(DEMO_GENERATE) --out demo/data --n $(DEMO_NOTES) --wordings train --split 0.97,0.03
	$(DEMO_GENERATE) --out demo/held_out --n $(DEMO_HELD_OUT) --seed 1 --wordings train --split 1
	$(DEMO_GENERATE) --out demo/unseen --n $(DEMO_HELD_OUT) --seed 1 --wordings unseen --split 1
	$(BIN)/python -m utils.make_demo_model --out demo/model --cim10 $(DEMO_CODES) --steps $(DEMO_BASE_STEPS) --seed $(DEMO_SEED)
	$(BIN)/python -m utils.validate_data example/demo.yaml
	$(BIN)/torchrun --nproc-per-node 1 -m train example/demo.yaml
	$(call demo_score,base,model,held_out)
	$(call demo_score,tuned,run,held_out)
	$(call demo_score,unseen,run,unseen)
	$(BIN)/python -m utils.compare_icd10 "base model=demo/base.json" "fine-tuned=demo/tuned.json"
	@echo "Reports: demo/base.html, demo/tuned.html, demo/unseen.html"

# $(1) name of the scores, $(2) directory of the model or the run, $(3) directory of the notes
define demo_score
$(BIN)/python -m utils.predict_icd10 --run demo/$(2) --notes demo/$(3)/notes_instruct.jsonl \
	--out demo/$(1)_answers.jsonl --batch_size 50 --max_tokens 200
$(BIN)/python -m utils.evaluate_icd10 --gold demo/$(3)/notes_instruct.jsonl --predictions demo/$(1)_answers.jsonl \
	--json demo/$(1).json --html demo/$(1).html --cim10 $(DEMO_CODES) --train demo/data/train_instruct.jsonl
endef

SAMPLE_NOTES := 1000
sample-data: setup
	$(BIN)/python -m utils.generate_notes --out sample_data --n $(SAMPLE_NOTES) --split 0.8,0.1,0.1 --overwrite

# One worker per core, up to four: tests start further processes.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --durations=15

test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --ignore=tests/end_to_end # whose tests are all slow

# uv installs the lowest versions, pip has no such option. UV_TORCH_BACKEND=cpu chooses PyTorch's smaller CPU build.
OLDEST := .venv-oldest/bin
test-oldest: .venv-oldest/installed
	$(OLDEST)/python -m pytest -n $(WORKERS) --durations=15

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/uv pip install --quiet --python $(OLDEST)/python --resolution lowest-direct -e ".[test]"
	touch $@

# Without a key, so that running a tutorial is never charged.
notebooks: setup
	rm -rf runs/tutorials
	env -u MISTRAL_API_KEY -u RECODE_QUICK $(BIN)/python -m tutorials.execute

kill-test: setup
	$(BIN)/python -m tests.end_to_end.kill_runs --kills 200

fuzz: setup
	$(BIN)/python -m pytest tests/end_to_end/test_fuzz.py tests/utils/test_answer_grammar.py --hypothesis-profile=long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/vulture

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build tags (2.13.0+cpu) are left out: they differ between machines.
docs: setup
	$(BIN)/python -m docs.generate_configuration
	$(BIN)/python -m docs.generate_models
	$(BIN)/python -m docs.generate_waits

constraints: setup
	(echo "# Versions that all tests passed with. pyproject.toml has the supported ranges."; \
		$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//') > constraints.txt

# What a GPU machine needs besides PyTorch, transformers and PEFT. CUDA: that of its PyTorch.
CUDA := 126
gpu-bundle: setup
	$(BIN)/python -m benchmarks.acceptance.bundle --out gpu-bundle --cuda $(CUDA) $(if $(VERSION),--python $(VERSION)) \
		$(if $(WITHOUT),--without $(WITHOUT)) $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf demo sample_data
