# Everything is set up on first use. PYTHON=python3.11 chooses an interpreter; TESTS="-m 'not system'" what pytest runs.
export PYTHON
TESTS ?=
SEEDS ?= 300
UV ?= uv

.PHONY: demo test test-actors simulate bench lint fmt docs lock setup clean

demo: ## A VM from nothing to nothing: build, boot, use, delete
	@.ci/system-packages python qemu
	@.ci/in-venv python examples/demo.py

test: ## All tests, real guests included
	@.ci/system-packages python qemu ext4
	@[ "$$(id -u)" != 0 ] || .ci/system-packages systemd || echo "Without it the tests under systemd are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages network || echo "Without it the tests of networks are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages chromium || echo "Without it the tests with a browser are skipped" >&2
	@.ci/test $(TESTS)

test-actors: ## Build volant-actors, and run its tests in an environment without volant
	@.ci/test-actors $(TESTS)

simulate: ## SEEDS lives of a daemon on a simulated host, with faults and kills
	@.ci/in-venv python -m tests.simulation --seeds $(SEEDS)

bench: ## Measure against the bare hypervisor and an empty route
	@.ci/system-packages python qemu
	@.ci/in-venv python -m tests.bench
	@.ci/in-venv python -m tests.bench.actors_bench
	@.ci/in-venv python -m tests.bench.simulation_bench

lint:
	@.ci/in-venv ruff check .
	@.ci/in-venv ruff format --check .
	@.ci/in-venv mypy
	@.ci/in-venv lint-imports
	@.ci/in-venv python .ci/check_repository.py
	@.ci/in-venv python .ci/check_lock.py

fmt:
	@.ci/in-venv ruff check --fix .
	@.ci/in-venv ruff format .

docs: ## The reference of commands, which is kept, and that of the Python API, in docs/site
	@.ci/in-venv python docs/build.py

lock: ## Resolve the dependencies anew; needs uv
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--no-emit-package volant-actors --group dev pyproject.toml --output-file requirements.lock >/dev/null
	@.ci/in-venv python .ci/check_lock.py --stamp

setup:
	@.ci/system-packages python qemu
	@.ci/in-venv true

clean: ## Remove what can be made again, but for the images in the cache
	rm -rf .venv-*/ .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis docs/site
	find . -name __pycache__ -type d -not -path './.venv*' -exec rm -rf {} +
