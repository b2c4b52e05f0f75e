#!/usr/bin/env bash
# Everything CI checks, on a clean checkout: environment, lint, types, tests. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
ruff format --check --quiet .
mypy
# Two tests at a time on one core each, which is quicker than one on two, and as quick as three at a time.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal "$@"
[ $# = 0 ] || exit 0
# For its own tests alone: where it is installed, diffusers imports it, which takes every test a second.
if python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --no-deps \
    --upgrade --target "$venv/optimizers" bitsandbytes; then
    PYTHONPATH="$venv/optimizers" python -m pytest --quiet tests/training/test_optimizer.py
fi
