# Sourced by quickstart.sh and test.sh: makes and enters .venv with the tested versions of everything.
# PYTHON chooses the interpreter (default python3); extras to install are the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
[ -f "$venv/bin/activate" ] || "${PYTHON:-python3}" -m venv --clear "$venv"
. "$venv/bin/activate"
wanted="$(sha256sum pyproject.toml scripts/constraints.txt) $*"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $venv (a few minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".${1:+[$1]}"
    printf '%s' "$wanted" >"$venv/installed"
fi
