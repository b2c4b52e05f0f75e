#!/usr/bin/env bash
# Everything CI checks, on a clean checkout: environment, lint, types, tests. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
ruff format --check --quiet .
mypy
# Two tests at a time on one core each, which is quicker than one on two, and as quick as three at a time.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal "$@"
