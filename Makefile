# Everything is installed into .venv and nowhere else; Python and make are all that has to be there.
# A stamp in .venv says what is installed, so a second run of any target installs nothing.
# Variables: PYTHON=python3.12 picks the Python, ARGS="…" is handed on to the command, PORT=8000 is preview's.

MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
BIN := .venv/bin
LOG := .venv/install.log
VENV := .venv/.made
RUN := .venv/.run-installed
DEV := .venv/.dev-installed
BENCH := .venv-bench/.installed
FRAMEWORKS := .venv-frameworks/.installed
PORT ?= 8000
comma := ,

# A folder that was moved, or whose Python has gone, is set up again.
$(shell test -x $(BIN)/python && grep -qF "$(CURDIR)/.venv" $(BIN)/pip 2>/dev/null || rm -f $(VENV) $(RUN) $(DEV))

.PHONY: help reproduce test frameworks bench endurance docs preview notebooks sync readme check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

reproduce: $(RUN) ## the main job: how well each SDE tracks its algorithm (ARGS="--quick" for a short one)
	$(BIN)/samsde reproduce $(ARGS)

test: $(DEV) ## run every notebook and tests/ on all cores (ARGS="--slow" for the slow cells too)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

frameworks: $(FRAMEWORKS) ## run the recipes of "SAM in your framework", and real networks, with the real packages
	.venv-frameworks/bin/python -m pytest tests/test_frameworks.py tests/test_real_networks.py $(ARGS)

bench: $(DEV) $(BENCH) ## measure against peers, into benchmarks/ (ARGS="--quick" for a trial)
	$(BIN)/python -c "import sys; from samsde.experiments.bench import main; sys.exit(main())" --jax .venv-bench/bin/python $(ARGS)

endurance: $(DEV) ## measure memory and speed over long runs, into benchmarks/ (ARGS="soak --seconds 600" for a part)
	$(BIN)/python benchmarks/endurance.py $(ARGS) | tee benchmarks/endurance.md

docs: $(DEV) ## build the site into _docs
	$(BIN)/python .ci/docs.py

preview: docs ## build the site and serve it on localhost
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

notebooks: $(DEV) ## execute every notebook in place and clean it (ARGS="nbs/00_objective.ipynb" for some)
	$(BIN)/python .ci/notebooks.py $(ARGS)
	$(BIN)/nbdev_clean

sync: $(DEV) ## export the library, clean the notebooks, write README.md: do it before a commit
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py

readme: $(DEV) ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

check: ## all that continuous integration checks
	bash .ci/run

clean: ## remove what was built (.venv and results stay)
	rm -rf _proc _docs build __pycache__ *.egg-info .pytest_cache nbs/nbdev.yml nbs/sidebar.yml
	find nbs samsde tests .ci -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# --- installation ---

$(VENV):
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10 python); do \
	  version=$$($$python -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
	  found="$$found $$version ($$python)"; \
	  $$python -c 'import sys; sys.exit(sys.version_info < ($(subst .,$(comma),$(MIN_PYTHON))))' || continue; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "samsde: $$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  $$python -m venv --clear .venv && touch $@; exit; \
	done; \
	echo "samsde: needs Python $(MIN_PYTHON) or newer, found:$${found:- none} (make PYTHON=/path/to/python picks one)" >&2; exit 1

# $(call install,WHAT): pip's words go to the log, a failure is told in one line
define install
@echo "installing $(1) into .venv, log in $(LOG)"
@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '$(1)' >$(LOG) 2>&1 || { \
  if grep -q 'connection broken by' $(LOG); then why="no network, the package index was not reached"; \
  else why=$$(grep -m1 '^ERROR' $(LOG) || tail -n1 $(LOG)); fi; \
  echo "samsde: not installed: $$why (all of it: $(LOG))" >&2; exit 1; }
@touch $@
endef

$(RUN): setup.py pyproject.toml settings.ini constraints.txt | $(VENV)
	$(call install,.)

$(DEV): $(RUN)
	$(call install,.[dev])

# the peers on JAX, in an environment of their own
$(BENCH): benchmarks/requirements.txt | $(VENV)
	@echo "installing $(notdir $<) into .venv-bench"
	@$(BIN)/python -m venv --clear .venv-bench
	@.venv-bench/bin/python -m pip install --disable-pip-version-check -q -r $<
	@touch $@

# The frameworks, in an environment of their own. The operators of a torchvision that was built for another torch are missing;
# no test calls them, so they are declared, and its Python code can be imported.
SCHEMA := (Tensor a, Tensor b, float c) -> Tensor
OPERATORS := import torch; from torch.library import define; $(foreach name,nms qnms,define("torchvision::$(name)", "$(SCHEMA)");)
$(FRAMEWORKS): settings.ini constraints.txt | $(VENV)
	@echo "installing the frameworks into .venv-frameworks"
	@$(BIN)/python -m venv --clear .venv-frameworks
	@.venv-frameworks/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[frameworks]'
	@.venv-frameworks/bin/python -c "import torchvision" 2>/dev/null || \
	  echo '$(OPERATORS)' >$$(echo .venv-frameworks/lib/python*/site-packages)/sitecustomize.py
	@touch $@
