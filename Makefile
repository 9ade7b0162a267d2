# make demo and make test do all the set-up they need; both run from a clean clone.
PYTHON ?= python3
BIN := .venv/bin
# xformers' kernels are for CUDA cards only.
EXTRAS := test,dev$(if $(shell command -v nvidia-smi 2>/dev/null),$(comma)cuda)
comma := ,

NOTEBOOKS := generate_fictives_notes prepare_data_for_generative_finetuning mistral_finetune_7b

.PHONY: help setup demo test notebooks check format clean
help:
	@echo "make demo    train a tiny model on fictional notes, on the CPU, from nothing to a fine-tuned adapter"
	@echo "make test    run the tests"
	@echo "make notebooks  execute the tutorials; what they show is in runs/tutorials"
	@echo "make check   lint and format check;  make format  mend what can be mended"
	@echo "make setup   only install into .venv;  make clean  remove what make demo wrote"

setup: .venv/installed
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 ..."'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	rm -rf demo
	$(BIN)/python -m utils.make_demo_model --out demo/model
	$(BIN)/python -m utils.generate_notes --out demo/data --n 600 --length short
	$(BIN)/torchrun --nproc-per-node 1 -m train example/demo.yaml

test: setup
	$(BIN)/python -m pytest

# Without a key: executing a tutorial must not be charged to anybody.
notebooks: setup
	mkdir -p runs/tutorials
	env -u MISTRAL_API_KEY $(BIN)/jupyter-execute --output='../runs/tutorials/{notebook_name}' \
		$(NOTEBOOKS:%=tutorials/%.ipynb)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo
