# Loraport. `make train serve` does everything on a fresh machine; `make help` lists the rest.
#   MODEL=<folder or hub id> DATA=<rows.jsonl> NAME=<adapter> CONFIG=<run.yaml> PRESET=<preset> PORT=<port>
#   ARGS="<further flags>"         of the one command called; with `make train serve`: of train
#   SERVE_ARGS="<further flags>"   of serve, whatever else is called
#   PYTHON=python3.11 DEVICE=cpu|cuda choose the environment.
# `make serve` answers with the adapter NAME on the base it was trained on. `make serve MODEL=...` answers with that
# base alone; with NAME too, it says where NAME's base lies now. Values may hold blanks: DATA="my rows.jsonl".

PYTHON ?= python3
VENV ?= .venv
LORAPORT := $(VENV)/bin/loraport
IN := $(VENV)/bin/python -m

# The demo, unless MODEL or DATA say otherwise.
CONFIG ?= $(if $(MODEL)$(DATA),,examples/demo/train.yaml)
TRAINS := $(filter train,$(MAKECMDGOALS))
SERVED := $(if $(NAME),$(NAME),$(if $(TRAINS),demo,$(if $(MODEL),,demo)))
NAME ?= demo
PORT ?= 8000

# A value as one word of the shell, whatever is in it; and a flag with its value, where it has one.
quoted = '$(subst ','\'',$(1))'
flag = $(if $(2),$(1) $(call quoted,$(2)))

.PHONY: help setup train serve eval test lint docs lock links clean
.NOTPARALLEL:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup:  ## make .venv for this machine (CPU or CUDA, uv or pip); nothing to do the second time
	@$(PYTHON) requirements/install.py $(VENV)

train: setup  ## train the adapter NAME; nothing to do while data, configuration and base are unchanged
	@$(LORAPORT) train $(call flag,--name,$(NAME)) $(call flag,--config,$(CONFIG)) $(call flag,--model,$(MODEL)) \
	  $(call flag,--data,$(DATA)) $(call flag,--preset,$(PRESET)) $(ARGS)

serve: setup  ## answer with base and adapter NAME on one OpenAI-compatible URL, until Ctrl-C
	@$(LORAPORT) serve $(if $(SERVED),$(call quoted,$(SERVED))) $(if $(TRAINS),,$(call flag,--model,$(MODEL))) \
	  --port $(PORT) $(if $(TRAINS),,$(ARGS)) $(SERVE_ARGS)

eval: setup  ## success and stop rate of base and adapter on the demo's held-out rows, against a running `make serve`
	@$(LORAPORT) eval --base-url http://127.0.0.1:$(PORT)/v1 --data examples/demo/heldout.jsonl --model base \
	  $(call flag,--model,$(NAME)) $(ARGS)

test: setup links  ## unit tests, fake-engine tests and the integration tests on the real vLLM
	@$(PYTHON) requirements/install.py $(VENV) --test
	@# Tests of processes and clocks may fail on a machine that is busy: such a one is told, and a bug to be mended.
	@$(IN) pytest --reruns 1 -rR $(ARGS)

lint: setup links  ## ruff and mypy
	@$(PYTHON) requirements/install.py $(VENV) --test
	@$(IN) ruff check . && $(IN) ruff format --check . && $(IN) mypy

docs: setup  ## make docs/configuration.md and its JSON schema anew from train/config.py
	@$(IN) loraport.train.reference docs

links:  ## a link tree that maps loraport.* to the rooms, for mypy and for use without an install (PYTHONPATH=.links:.)
	@mkdir -p .links/loraport
	@for room in bench clients serve train; do ln -sfn ../../$$room .links/loraport/$$room; done

UV_COMPILE = uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_35
NO_CPU_BUILD := triton torchvision torchaudio torchcodec
NOT_NEEDED := fastapi-cloud-cli sentry-sdk rignore fastar detect-installer agent-detector
# cuda.txt without UV_FIND_LINKS: torch's CPU build there counts as newer than the one for CUDA, and would be pinned.
lock:  ## make requirements/*.txt anew (needs uv, and torch's CPU build where uv looks: UV_FIND_LINKS)
	cd requirements && $(UV_COMPILE) --no-emit-index-url $(foreach p,$(NO_CPU_BUILD) $(NOT_NEEDED),--no-emit-package $(p)) \
	  cpu.in base.in -o cpu.txt
	cd requirements && env -u UV_FIND_LINKS $(UV_COMPILE) $(foreach p,$(NOT_NEEDED),--no-emit-package $(p)) cuda.in base.in -o cuda.txt
	cd requirements && $(UV_COMPILE) -c cpu.txt test.in -o test.txt

clean:  ## remove the environment and what was built
	rm -rf $(VENV) .venv-* .links build dist *.egg-info
