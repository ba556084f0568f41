# Two commands are all a newcomer needs: `make demo` and `make test`. Each installs into .venv what is missing, once.
.PHONY: demo demo-text methods test test-slow bench lint types install test-reliability
SEED ?= 0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

install: .venv/.installed
.venv/.installed: pyproject.toml scripts/install.sh scripts/torchvision_hook.py
	@bash scripts/install.sh

demo: install            ## a vision-language model gets better at reading pictures, in minutes, on CPU
	@.venv/bin/rlfr-vlm demo vision --seed $(SEED)

demo-text: install       ## SmolLM2 gets better at arithmetic
	@.venv/bin/rlfr-vlm demo text --seed $(SEED)

methods: install         ## every method on the same data and seed: do the rewards rise, what does each cost
	@.venv/bin/python scripts/methods.py --seed $(SEED)

test: install            ## the fast lane
	.venv/bin/python -m pytest -m "not slow and not gpu and not reliability"

test-slow: install       ## kills, training curves and figures
	.venv/bin/python -m pytest -m slow

test-reliability: install ## the contract of docs/reliability.md at its full figures, which are written to docs/reliability_results.md
	@rm -f .reliability.jsonl
	RLFR_RELIABILITY_RESULTS=$(CURDIR)/.reliability.jsonl OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m reliability
	.venv/bin/python -m tests.reliability.results .reliability.jsonl docs/reliability_results.md

lint: install
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
	@$(MAKE) --no-print-directory types

# The page's scripts are checked by TypeScript, and by nothing that the package needs: node comes with the `dev` extra.
types node_modules: export PATH := $(CURDIR)/.venv/bin:$(PATH)
types: node_modules      ## the types of the page's scripts
	npx tsc

node_modules: package.json package-lock.json | install
	npm ci --silent
	@touch node_modules
