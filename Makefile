# One command each, the same for a person and for CI.

PYTHON ?= python3
BIN := .venv/bin
# Programs that tests work with: ACLs, errors of a given system call, the SQLite shell, HTTP by hand, a browser, a
# clock that jumps.
PROGRAMS := acl strace sqlite3 curl chromium faketime

MINUTES := 30
# Tests that do a share of what has a command for the whole.
SWEPT := deaths errors power mutants soak

# The build of the package itself is held to the same versions.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test sweep soak quick bench format wheel constraints programs clean

demo: .venv/complete ## serve a small laboratory, on a free port
	$(BIN)/exlab-sessions serve --demo

test: programs .venv/complete ## everything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n logical --dist loadfile -m 'not sweep'

sweep: programs .venv/complete ## the whole of what `test` does a share of; hours
	$(BIN)/python -m tests.survival deaths
	$(BIN)/python -m tests.survival errors
	$(BIN)/python -m tests.survival power
	$(BIN)/python -m tests.survival mutants
	SURVIVAL_SHARE=1 $(BIN)/pytest -s tests/survival $(SWEPT:%=--ignore tests/survival/test_%.py)

soak: programs .venv/complete ## everything at once for half an hour; `make soak MINUTES=480` for longer
	$(BIN)/python -m tests.survival soak --minutes $(MINUTES)

quick: .venv/complete ## the tests that take less than a minute each
	$(BIN)/pytest -n logical --dist loadfile -m 'not slow and not sweep'

bench: .venv/complete ## creation beside a bare render, replay beside a bare send loop
	$(BIN)/python -m benchmarks.compare

format: .venv/complete
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: .venv/complete
	$(BIN)/python -m hatchling build -t wheel

constraints: ## the newest versions that pyproject.toml allows
	rm -rf .venv/renewing
	$(PYTHON) -m venv .venv/renewing
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT \
		.venv/renewing/bin/pip install --quiet --editable '.[dev]' colorama editables tzdata
	sed -n '/^#/p' constraints.txt > .venv/constraints
	.venv/renewing/bin/pip freeze --exclude-editable | LC_ALL=C sort -f >> .venv/constraints
	mv .venv/constraints constraints.txt
	rm -rf .venv/renewing

.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

programs:
	@missing=; \
	for package in $(PROGRAMS); do \
		dpkg-query --show --showformat='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
			|| missing="$$missing $$package"; \
	done; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update --quiet \
			&& DEBIAN_FRONTEND=noninteractive \
			apt-get install --quiet --yes --no-install-recommends $$missing; \
	else \
		echo "tests need these Debian packages, or what your system has instead:$$missing" >&2; \
	fi

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
