# make run · test · lab · bench · notebooks · site · clean; each sets up .venv with all extras by itself.
# PYTHON=python3.12 chooses an interpreter; pip's own environment variables choose where packages come from.
# make run ARGS="…" passes other words to `python -m mslib run`; without any it runs the lessons up to 05.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?= --only 00-05
# glibc keeps memory that a training step freed for the next one; other systems do not look at this
KEEP_MEMORY := GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: run test lab bench notebooks site clean

run: .venv/ready
	$(BIN)/python -m mslib run $(ARGS)

# two processes with a thread each: of all ways to use two cores, the one that spends least on waiting
# torch.compile's cache is new: an old one may hold code for instructions that are switched off now
test: .venv/ready
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	MSLIB_RUNS=$$runs MSLIB_PRESET=quick $(KEEP_MEMORY) OMP_NUM_THREADS=1 \
	TORCHINDUCTOR_CACHE_DIR=$$runs/compiled \
	$(BIN)/python -m pytest -q -n 2 -p no:cacheprovider --nbval notebooks tests

lab: .venv/ready
	$(KEEP_MEMORY) $(BIN)/jupyter lab $(ALLOW_ROOT) --notebook-dir=. notebooks/00_start_here.ipynb

bench: .venv/ready
	$(BIN)/python -m mslib bench

notebooks: .venv/ready  # execute the stored lessons anew, at quick, and keep their outputs
	MSLIB_PRESET=quick $(BIN)/python -m mslib store

site: .venv/site  # build/site, from the stored lessons
	$(BIN)/python -m tools.pages

clean:
	rm -rf runs .venv build *.egg-info .mypy_cache .ruff_cache

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]" || { echo "installation failed: see the lines above"; exit 1; }
	@touch $@

.venv/site: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[site]" || { echo "installation failed: see the lines above"; exit 1; }
	@touch $@
