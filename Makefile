# Each target sets up what it needs. PYTHON=python3.11 chooses an interpreter; TESTS holds arguments for pytest.
export PYTHON
TESTS ?=
SEEDS ?= 300
UV ?= uv
# Tests of one file share a daemon; tests/conftest.py sorts files and counts workers.
PARALLEL = --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: check test test-all programs test-wheels fast lint fmt demo simulate bench docs lock vendor setup clean

check: lint fast ## What each commit has to pass: format, lint, types, import contracts, fast tests

test: programs ## Each promise once, on all cores, with real guests
	@.ci/test $(PARALLEL) -m "not full" $(TESTS)

test-all: export VOLANT_TEST_FULL = 1
test-all: programs ## All tests, with full loads, rounds and matrices; goes on where it was interrupted
	@.ci/test -p tests.resume $(PARALLEL) $(TESTS)

programs:
	@.ci/system-packages python qemu images ext4
	@[ "$$(id -u)" != 0 ] || .ci/system-packages systemd || echo "Without it, tests under systemd are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages network || echo "Without it, tests of networks are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages oci || echo "Without it, tests of OCI images are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages virtiofsd || echo "Without it, tests of directories of the host are skipped" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages testssl || echo "Without it, TLS is not scanned for weaknesses" >&2
	@[ "$$(id -u)" != 0 ] || .ci/system-packages chromium || echo "Without it, tests with a browser are skipped" >&2

test-wheels: ## Install everything with pip; test volant-actors and volant-client in environments without the daemon
	@.ci/test-install
	@.ci/test-wheel actors $(TESTS)
	@.ci/test-wheel client $(TESTS)

fast: ## Tests that run no guests, no other programs and no simulation, and are quick
	@.ci/test $(PARALLEL) -m fast -q $(TESTS)

lint: ## Format, lint, types, import contracts
	@.ci/in-venv ruff check .
	@.ci/in-venv ruff format --check .
	@.ci/in-venv mypy
	@.ci/in-venv lint-imports
	@.ci/in-venv python .ci/check_repository.py
	@.ci/in-venv python .ci/check_lock.py

fmt:
	@.ci/in-venv ruff check --fix .
	@.ci/in-venv ruff format .

demo: ## Builds an image, boots a VM, uses it, deletes it; leaves nothing behind
	@.ci/system-packages python qemu images oci
	@.ci/in-venv python examples/demo.py

simulate: ## SEEDS runs of a daemon on a simulated host, with faults and kills
	@.ci/in-venv python -m tests.simulation --seeds $(SEEDS)

bench: ## Measure against the bare hypervisor and an empty route
	@.ci/system-packages python qemu images
	@.ci/in-venv python -m tests.bench
	@.ci/in-venv python -m tests.bench.actors_bench
	@.ci/in-venv python -m tests.bench.simulation_bench

docs: ## Write the generated pages of docs/, and the reference of the Python API in docs/site
	@.ci/in-venv python docs/build.py

lock: ## Resolve the dependencies again; needs uv
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--no-emit-package volant-actors --no-emit-package volant-client --group dev pyproject.toml --output-file requirements.lock >/dev/null
	@.ci/in-venv python .ci/check_lock.py --stamp

vendor: ## Fetch the libraries of the console again, as volant/web/static/vendor/vendor.json pins them
	@.ci/in-venv python .ci/vendor.py

setup: ## The virtual environment
	@.ci/system-packages python qemu images oci
	@.ci/in-venv true

clean: ## Remove what can be made again, but not the images in the cache
	rm -rf .venv-*/ .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis docs/site
	find . -name __pycache__ -type d -not -path './.venv*' -exec rm -rf {} +
