#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: the gpu-marked tests of operator and trainer, the operator's benchmark
# and the training step's. Logs and records go to the folder given; a part that fails does not stop the others.
#
#   bash scripts/gpu_check.sh FOLDER
#   bash scripts/gpu_check.sh --download_wheels   # with a network: fills wheels/ for a machine without one, Python 3.12
#
# It takes the Python at hand (PYTHON chooses another), with the torch and triton it has, and the packages in wheels/
# before those that are installed. Where git cannot say which commit this is, set GIT_COMMIT.
set -uo pipefail
folder="$(realpath -m -- "${1:-}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
# What images that have torch, accelerate, rich, pytest and hypothesis tend to lack. What these packages require is named
# too, because --no-deps, which leaves the image's torch alone, fetches none of it.
wheels=(diffusers importlib-metadata datasets dill multiprocess tyro docstring-parser typeguard pydantic pydantic-core
    annotated-types typing-inspection typing-extensions hjson)

if [ "${1:-}" = --download_wheels ]; then
    # Published as source, of Python alone.
    "$python" -m pip wheel --quiet --no-deps --constraint scripts/constraints.txt --wheel-dir wheels deepspeed || exit 1
    exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --constraint scripts/constraints.txt --dest wheels "${wheels[@]}"
fi
if [ $# -ne 1 ] || [[ "$1" = -* ]]; then
    echo "usage: bash scripts/gpu_check.sh FOLDER | --download_wheels" >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh needs a GPU: torch.cuda.is_available() is not true in $python" >&2
    exit 2
fi

mkdir -p "$folder" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "wheels/*.whl" >/dev/null; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit 1
    export PYTHONPATH="$site:$PYTHONPATH"
fi

summary=()
failed=0
part() { # NAME SECONDS COMMAND...: runs it, its output also in FOLDER/NAME.log
    local name="$1" limit="$2" start="$SECONDS" status verdict
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
    status="${PIPESTATUS[0]}"
    case "$status" in
    0) verdict=passed ;;
    124 | 137) verdict="stopped after $limit s" ;;
    *) verdict="failed, exit status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    summary+=("$name: $verdict ($((SECONDS - start)) s)")
}

part tests 130 "$python" -m pytest -m "gpu and not slow" -q --durations=5 tests/ops/gpu
part trainer 100 "$python" -m pytest -m gpu -q --durations=5 tests/training
part operator 160 "$python" scripts/benchmark_op.py --seconds_per_case 0.5 --time_limit 130 --out "$folder"
part training 140 "$python" scripts/benchmark_training.py --cases cifar10 --precision bf16 --batch_sizes 8 128 \
    --rounds 8 --out "$folder"
printf '%s\n' "== summary" "${summary[@]}"
exit "$failed"
