# Everything is set up on first use. PYTHON=python3.11 chooses an interpreter; TESTS="-m 'not system'" what pytest runs.
export PYTHON
TESTS ?=
UV ?= uv

.PHONY: demo test bench lint fmt docs lock setup clean

demo: ## A VM from nothing to nothing: build, boot, use, delete
	@tools/system-packages python qemu
	@tools/run python examples/demo.py

test: ## All tests, real guests included
	@tools/system-packages python qemu
	@tools/test $(TESTS)

bench: ## Measure against the bare hypervisor and an empty route
	@tools/system-packages python qemu
	@tools/run python -m tests.bench

lint:
	@tools/run ruff check .
	@tools/run ruff format --check .
	@tools/run mypy
	@tools/run lint-imports
	@tools/run python tools/check_repository.py
	@tools/run python tools/check_lock.py

fmt:
	@tools/run ruff check --fix .
	@tools/run ruff format .

docs: ## The reference of commands, which is kept, and that of the Python API, in docs/site
	@tools/run python docs/build.py

lock: ## Resolve the dependencies anew; needs uv
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--group dev pyproject.toml --output-file requirements.lock >/dev/null
	@tools/run python tools/check_lock.py --stamp

setup:
	@tools/system-packages python qemu
	@tools/run true

clean: ## Remove what can be made again, but for the images in the cache
	rm -rf .venv-*/ .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis docs/site
	find . -name __pycache__ -type d -not -path './.venv*' -exec rm -rf {} +
