#!/usr/bin/env bash
# Everything CI checks, on a clean checkout: environment, lint, types, tests. Arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
mypy
python -m pytest "$@"
