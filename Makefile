# Each target makes what it needs. `make` alone lists them.

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTHON ?= $(if $(realpath $(BIN)/python),$(BIN)/python,python3)

SRC ?=
OUT ?=
FACES ?= detect
MODEL ?= model_store/agegender.pt
DATA ?=
ARGS ?=
# The recipes take these from the environment, where a quote, a dollar or a backtick means nothing to make or the shell.
$(foreach name,SRC OUT FACES MODEL DATA,$(eval override $(name) := $$(value $(name))))
export SRC OUT FACES MODEL DATA
# What `report` and `app` show by default.
SCORED := $$(test -f out/_SUCCESS && echo out || echo examples/out)
# What was chosen at the first setup stays chosen, until another choice is made.
CHOSEN := $(if $(wildcard $(VENV)/requirements.txt),1)
CPU ?= $(CHOSEN)
override CPU := $(if $(filter-out 0 no,$(CPU)),1)

.DEFAULT_GOAL := help
.PHONY: help setup app batch report train evaluate archive serve stop stubs screenshots test test-slow bench licences check format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		while IFS="$$(printf '\t')" read -r target text; do printf '  make %-11s %s\n' "$$target" "$$text"; done

setup: $(READY) ## Install the locked packages into .venv (other targets do it when needed); CPU=1 leaves CUDA out, CPU=0 does not

# What is installed is told by content, since another branch gives the same files new times.
INSTALLED := $(shell cat requirements.txt pyproject.toml | cmp -s - $(READY) && echo yes)
ifneq ($(CPU) $(INSTALLED),$(CHOSEN) yes)
$(READY): anew
anew:
endif

$(READY):
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "agegender needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv "$(or $(realpath $(VENV)),$(VENV))"
	$(if $(CPU),grep -vE '^(nvidia|cuda|triton)' requirements.txt >,rm -f) $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(if $(CPU),$(VENV)/)requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@test -z "$(CPU)" || ! test -d $(VENV)/lib/python3.*/site-packages/nvidia || \
		echo 'make setup: CUDA came along: no index has torch without it; see README.md, Without CUDA' >&2
	@java=$$($(BIN)/python -m handler java) && ln -sf "$$java" $(BIN)/java
	@cat requirements.txt pyproject.toml > $@

app: $(READY) examples/photos ## Open the app in a browser: OUT=DIR (by default as for report) MODEL=FILE
	@test -f "$$MODEL" || { printf 'make app: there is no model %s; train one with `make train`\n' "$$MODEL" >&2; exit 2; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the app needs Python 3.11 or newer; try rm -r .venv, then make app PYTHON=python3.12")'
	@$(BIN)/python -m streamlit run app/streamlit_app.py $(ARGS) -- --model "$$MODEL" --out "$${OUT:-$(SCORED)}"

examples/photos: | $(READY)
	@$(BIN)/python -c "from pathlib import Path; from batch.samples import write_samples; write_samples(Path('$@'))"

batch: $(READY) ## Score a directory of images into Parquet: SRC=DIR OUT=DIR FACES=detect|whole MODEL=FILE
	@$(BIN)/python -m batch $(if $(SRC),"$$SRC" "$${OUT:-out}",--samples examples/photos "$${OUT:-examples/out}") \
		--faces "$$FACES" --model "$$MODEL" $(ARGS)

report: $(READY) ## Write a page about a batch output: OUT=DIR (by default out where it is finished, else the samples')
	@$(BIN)/python -m batch report "$${OUT:-$(SCORED)}"

train: $(READY) ## Train on a folder of labelled faces: DATA=DIR ARGS="--epochs 20 ..."
	@test -n "$$DATA" || { echo 'make train: say where the labelled faces are: make train DATA=DIR' >&2; exit 2; }
	@$(BIN)/python -m training --data-dir "$$DATA" $(ARGS)

evaluate: $(READY) ## Measure a model on labelled faces: DATA=DIR MODEL=FILE
	@test -n "$$DATA" || { echo 'make evaluate: say where the labelled faces are: make evaluate DATA=DIR' >&2; exit 2; }
	@$(BIN)/python -m training.evaluate --data-dir "$$DATA" --model "$$MODEL" $(ARGS)

archive: $(READY) ## Build the model archive that TorchServe loads: MODEL=FILE
	@$(BIN)/python -m handler archive --model "$$MODEL" $(ARGS)

serve: $(READY) ## Start the server; returns when it answers predictions: MODEL=FILE
	@$(BIN)/python -m handler start --model "$$MODEL" $(ARGS)

# Installs nothing: packages must not be replaced under a server that runs, nor must a lack of network keep it running.
stop: ## Let running requests finish, then stop the server
	@if test -x $(BIN)/python; then $(BIN)/python -m handler stop $(ARGS); \
		else echo 'make stop: there is no $(BIN)/python; if a server runs, call `make setup` first' >&2; exit 2; fi

stubs: $(READY) ## Build the Python stubs of the gRPC API into build/grpc
	@$(BIN)/python -m handler stubs

screenshots: $(READY) ## Take the README's pictures of the app anew, with Chromium
	@SCREENSHOTS=docs/figures $(BIN)/python -m pytest tests/test_app_browser.py -k "screenshots and light-1440" $(ARGS)

test: $(READY) ## Run the tests (ten to fifteen minutes on two cores)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY) ## Run the chaos, soak and long fuzz tests
	@$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(READY) ## Run all that benchmarks/RESULTS.md shows: DATA=DIR ARGS="--quick --only NAME,..."
	@$(BIN)/python -m benchmarks $(if $(DATA),--data-dir "$$DATA") $(ARGS)

check: $(READY) ## Lint, check formatting and types, as the pre-commit hook does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Fix formatting and what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## Write requirements.txt anew from pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --group dev \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		pyproject.toml --output-file requirements.txt

licences: $(READY) ## Write docs/licences.md anew from the lock and what is installed
	@$(BIN)/python docs/licences.py

clean: ## Remove the environment and the caches; trained models (runs) and outputs (out, examples) stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
