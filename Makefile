# SPDX-License-Identifier: Apache-2.0
# make demo       a small model learns mini-MMEB from nothing; ends with scores and a report
# make test       all tests that need neither an accelerator nor real weights
# make test-fast  the same without the slow ones
# make test-long  the same with the repetitions on other kinds of training and other meshes
# make test-torch what needs torch, transformers' models and peft; in an environment of its own
# make test-old-peft  our exports in PEFT 0.11 and 0.13 and the transformers of their time; likewise
# make test-mteb  our exports in sentence-transformers, our models in mteb; likewise
# make test-optional  those that need ray, lancedb and faiss, in an environment of their own
# make bench      measure on the device that is here: a table, and a file in benchmarks/results
# make lint       ruff (lint and format), pyright, shellcheck
# make clean      remove the demonstration's files and caches; the environment stays
#
# Each sets up .venv when there is none, and again when the requirements change.
# ARGS are handed to pytest: make test ARGS="tests/test_config.py -x"; PARALLEL= runs in one process

VENV ?= .venv
VENV_TORCH ?= .venv-torch
VENV_PEFT ?= .venv-peft
VENV_MTEB ?= .venv-mteb
PY := $(VENV)/bin/python
DEMO := runs/demo
DEMO_ENV := JAX_PLATFORMS=cpu
# A process a core; whole files go to one, since what a file's tests share is made once.
PARALLEL := -n auto --dist loadfile
EXCLUDED := not weights and not gpu and not tpu and not torch and not ray
SHORT := $(EXCLUDED) and not long
REQUIREMENTS := pyproject.toml requirements.txt requirements-dev.txt

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

.PHONY: demo test test-fast test-long test-torch test-old-peft test-mteb test-optional \
	bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@echo "== 1/7 drawing mini-MMEB"
	$(DEMO_ENV) $(PY) -m vlm2vec_jax.data.mini_mmeb --output $(DEMO)/data --seed 0
	@echo "== 2/7 writing a small untrained model"
	$(DEMO_ENV) $(PY) -m vlm2vec_jax.models.phi3v.mini --data $(DEMO)/data \
	    --output $(DEMO)/base --seed 0
	@echo "== 3/7 scoring the untrained model"
	$(DEMO_ENV) $(PY) -m vlm2vec_jax.evaluate --model $(DEMO)/base --data $(DEMO)/data/eval \
	    --output $(DEMO)/eval_untrained --dtype float32
	@echo "== 4/7 training on a simulated mesh of two devices"
	$(DEMO_ENV) XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=2" \
	    $(PY) -m vlm2vec_jax.train --config configs/mini.py
	@echo "== 5/7 scoring the trained model"
	$(DEMO_ENV) $(PY) -m vlm2vec_jax.evaluate --model $(DEMO)/train --data $(DEMO)/data/eval \
	    --output $(DEMO)/eval --dtype float32
	@echo "== 6/7 writing the report"
	$(DEMO_ENV) $(PY) -m vlm2vec_jax.evaluation.report --untrained $(DEMO)/eval_untrained \
	    --trained $(DEMO)/eval --train $(DEMO)/train --data $(DEMO)/data/eval \
	    --output $(DEMO)/report.html
	@echo "== 7/7 done"
	@echo "model:  $(DEMO)/train"
	@echo "scores: $(DEMO)/eval_untrained/scores.md and $(DEMO)/eval/scores.md"
	@echo "report: $(DEMO)/report.html"

test: $(VENV)/.installed-dev
	$(PY) -m pytest $(PARALLEL) -m "$(SHORT)" $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(PY) -m pytest $(PARALLEL) -m "$(SHORT) and not slow" $(ARGS)

test-long: $(VENV)/.installed-dev
	$(PY) -m pytest $(PARALLEL) -m "$(EXCLUDED)" $(ARGS)

test-torch: $(VENV_TORCH)/.installed
	$(VENV_TORCH)/bin/python -m pytest -m torch $(ARGS)

empty :=
space := $(empty) $(empty)
OLD_PEFT := $(VENV_PEFT)-0.11 $(VENV_PEFT)-0.13
test-old-peft: $(VENV)/.installed-dev $(OLD_PEFT:%=%/.installed)
	OLD_PEFT=$(subst $(space),:,$(abspath $(OLD_PEFT:%=%/bin/python))) \
	    $(PY) -m pytest -m torch tests/test_old_peft.py $(ARGS)

test-mteb: $(VENV_MTEB)/.installed
	$(VENV_MTEB)/bin/python -m pytest -m "torch or not torch" tests/test_sentence_transformers.py \
	    tests/test_evaluation_mteb.py $(ARGS)

test-optional:
	$(MAKE) VENV=$(VENV)-optional $(VENV)-optional/.installed-optional
	$(VENV)-optional/bin/python -m pytest -m ray $(ARGS)

bench: $(VENV)/.installed
	$(PY) -m benchmarks $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/shellcheck -x -P SCRIPTDIR launch/*.sh launch/*.sbatch launch/gke/*.sh

clean:
	rm -rf $(DEMO) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find vlm2vec_jax tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

# A python of the right version is searched for by running it: a name on the path may be a shim
# that starts nothing.
$(PY):
	@for p in python3.12 python3.11 python3.13 python3.14 python3 python; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "setting up $(VENV) with $$($$p --version)"; \
	        exec $$p -m venv $(VENV); \
	    fi; \
	done; \
	echo "no python 3.11 or newer was found on the path" >&2; exit 1

$(VENV_TORCH)/.installed: pyproject.toml requirements.txt requirements-torch.txt | $(PY)
	@test -x $(VENV_TORCH)/bin/python || $(PY) -m venv $(VENV_TORCH)
	@echo "installing torch and what is compared with it (some minutes)"
	$(VENV_TORCH)/bin/python -m pip install -q -r requirements-torch.txt
	@touch $@

$(VENV_PEFT)-%/.installed: tests/tools/peft-%.txt | $(PY)
	@test -x $(@D)/bin/python || $(PY) -m venv $(@D)
	@echo "installing PEFT $* and what goes with it (some minutes)"
	$(@D)/bin/python -m pip install -q -r $<
	@touch $@

$(VENV_MTEB)/.installed: pyproject.toml requirements.txt tests/tools/mteb.txt | $(PY)
	@test -x $(VENV_MTEB)/bin/python || $(PY) -m venv $(VENV_MTEB)
	@echo "installing sentence-transformers, mteb and torch (some minutes)"
	$(VENV_MTEB)/bin/python -m pip install -q -r tests/tools/mteb.txt
	@touch $@

$(VENV)/.installed: pyproject.toml requirements.txt | $(PY)
	@echo "installing the requirements (a minute or more)"
	$(PY) -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(PY)
	@echo "installing the requirements (a minute or more)"
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-optional: $(REQUIREMENTS) | $(PY)
	@echo "installing the requirements and the optional packages (some minutes)"
	$(PY) -m pip install -q -e ".[dev,ray,lancedb,faiss]"
	@touch $@
