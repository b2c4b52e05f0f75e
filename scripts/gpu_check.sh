#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: the gpu-marked tests of operator and trainer, the operator's
# benchmark and the training step's. First line: device, versions, commit; last lines: every claim, its value and its
# bar. The log and the records go to FOLDER; each part writes as it goes, and has its time whatever the others do.
#
#   bash scripts/gpu_check.sh FOLDER [--only PART ...] [--seconds 590]
#   bash scripts/gpu_check.sh --download_wheels     # packages for a machine without a network, Python 3.12, to wheels/
#   bash scripts/gpu_check.sh --compile             # those, and the kernels of everything for sm_90, without a GPU
#   bash scripts/gpu_check.sh --rehearse [--small]  # all of it here, on a device that computes nothing
#
# It takes the Python at hand (PYTHON chooses another), with the torch and triton it has, and the packages in wheels/
# before those that are installed. Where git cannot say which commit this is, set GIT_COMMIT.
set -euo pipefail
started="$(date +%s)"
calling_folder="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
most_bytes=$((64 * 2 ** 20)) # of tree, wheels and kernels together, which is what a device machine takes
# What images that have torch, accelerate, rich and pytest tend to lack, and what is to be the same there: hypothesis
# draws the same cases in one version alone, and so kernels that are compiled. What these packages require is named too,
# because --no-deps, which leaves the image's torch alone, fetches none of it.
wheels=(diffusers importlib-metadata lazy-importer datasets dill multiprocess tyro docstring-parser typeguard pydantic
    pydantic-core annotated-types typing-inspection typing-extensions hjson hypothesis liger-kernel)

usage() {
    echo "usage: bash scripts/gpu_check.sh FOLDER [--only PART ...] [--seconds 590] |" \
        "--download_wheels | --compile | --rehearse [--small]" >&2
    exit 2
}

download_wheels() {
    local wanted
    wanted="$(sha256sum scripts/constraints.txt scripts/gpu_check.sh)"
    [ "$(cat wheels/wanted 2>/dev/null)" = "$wanted" ] && return
    rm -rf wheels
    # Published as source, of Python alone.
    "$python" -m pip wheel --quiet --no-deps --constraint scripts/constraints.txt --wheel-dir wheels deepspeed
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --constraint scripts/constraints.txt --dest wheels "${wheels[@]}"
    printf '%s' "$wanted" >wheels/wanted
}

# Makes and enters an environment with that machine's versions, whose CUDA computes nothing.
enter_fake_machine() {
    local venv="$PWD/.venv-gpu_check" wanted libraries
    wanted="$(sha256sum scripts/gpu_check/machine.txt scripts/gpu_check/fake_cuda.*)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (a minute or two the first time)"
        if python3.12 --version >/dev/null 2>&1; then
            python3.12 -m venv --clear "$venv"
        else # pyenv may have it, but for other programs
            PYENV_VERSION="$(pyenv latest 3.12)" python3.12 -m venv --clear "$venv"
        fi
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
            -r scripts/gpu_check/machine.txt
        "$venv/bin/python" scripts/gpu_check/fake_cuda.py >/dev/null
        printf '%s' "$wanted" >"$venv/installed"
    fi
    python="$venv/bin/python"
    libraries="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia/cu13/lib"
    export PATH="$venv/bin:$PATH" LD_LIBRARY_PATH="$libraries" TRITON_LIBCUDA_PATH="$libraries"
    # So that all memory is zero when it is taken, which torch's own allocator, reusing it, knows nothing of.
    export PYTORCH_ALLOC_CONF=backend:cudaMallocAsync TORCH_CPP_LOG_LEVEL=ERROR
}

check() { # FOLDER [OPTION ...], as gpu_check/__main__.py takes them
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "gpu_check.sh needs a GPU: torch.cuda.is_available() is not true in $python" >&2
        exit 2
    fi
    # Tests set the first where there is no GPU; with the second every process would compile what it imports.
    unset TRITON_INTERPRET PYTHONDONTWRITEBYTECODE
    # Asked in the usual way whether there is a GPU, CUDA starts, and then not once more in a forked process.
    export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_NVML_BASED_CUDA_CHECK=1
    if compgen -G "wheels/*.whl" >/dev/null; then
        site="$(mktemp -d)"
        trap 'rm -rf "$site"' EXIT
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
        export PYTHONPATH="$site:$PYTHONPATH"
    fi
    "$python" -m gpu_check "$@" --started "$started"
}

compile() { # ARCHIVE [--small]
    local out
    out="$(mktemp -d)" # which stays, with the log, where something fails
    check "$out" --compile "$1" --seconds 3600 "${@:2}"
    rm -rf "$out"
}

rehearse() { # [--small]: some of each part, and with what travels along the operator's benchmark alone
    local bytes archive=wheels/kernels.tar.xz again=(--seconds 1800)
    download_wheels
    enter_fake_machine
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/tree" "$work/out"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create | tar -x -C "$work/tree"
    if [ $# -gt 0 ]; then
        archive="$work/kernels.tar.xz" # not in the place of what was compiled for a real machine
        again=(--small --only operator --seconds 600)
    fi
    echo "== compiling"
    (compile "$archive" "$@")
    mkdir "$work/tree/wheels"
    cp wheels/*.whl "$archive" "$work/tree/wheels"
    bytes="$(du --summarize --bytes "$work/tree" | cut -f1)"
    echo "== $bytes bytes travel along, of $most_bytes at most"
    if [ "$bytes" -gt "$most_bytes" ]; then
        echo "too much: move out of the tree what can be rebuilt, or carry fewer kernels" >&2
        exit 1
    fi
    (cd "$work/tree" && GIT_COMMIT=rehearsal PYTHON="$python" bash scripts/gpu_check.sh "$work/out" "${again[@]}")
    if [ "$(find "$work/out" -type f | wc -l)" -gt 8 ] || [ -n "$(find "$work/out" -type f -size +16M)" ]; then
        echo "more than 8 files, or one of more than 16 MiB, would come back:" >&2
        ls -l "$work/out" >&2
        exit 1
    fi
    echo "rehearsed: everything ran"
}

case "${1:-}" in
--download_wheels) [ $# -eq 1 ] || usage; download_wheels ;;
--compile)
    [ $# -eq 1 ] || usage
    download_wheels
    enter_fake_machine
    compile wheels/kernels.tar.xz
    ;;
--rehearse) [ $# -eq 1 ] || [ "$*" = "--rehearse --small" ] || usage; rehearse "${@:2}" ;;
"" | -*) usage ;;
*)
    folder="$(cd "$calling_folder" && realpath -m -- "$1")"
    check "$folder" "${@:2}"
    ;;
esac
