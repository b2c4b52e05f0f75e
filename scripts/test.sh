#!/usr/bin/env bash
# Everything CI checks, on a clean checkout: environment, lint, types, tests. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
ruff format --check --quiet .
mypy
# Two tests at a time on one core each, which is quicker than one on two, and as quick as three at a time.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal "$@"
[ $# = 0 ] || exit 0
# For a few tests alone: where bitsandbytes is installed, diffusers imports it, which takes every test a second, and timm
# requires torchvision, which those layers that are tested against do not need.
if python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --no-deps \
    --upgrade --target "$venv/peers" bitsandbytes timm; then
    PYTHONPATH="$venv/peers" python -m pytest --quiet tests/training/test_optimizer.py tests/norms/test_timm.py
fi
