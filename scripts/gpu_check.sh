#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: the gpu-marked tests of operator and trainer, the operator's
# benchmark and the training step's. It prints device, versions and commit first, and a verdict for every claim last.
# Log and records are written to FOLDER as it goes, and each part has its own time limit.
#
#   bash scripts/gpu_check.sh FOLDER [--only PART ...] [--seconds 590]
#   bash scripts/gpu_check.sh --download_wheels     # packages for a machine without a network (Python 3.12): wheels/
#   bash scripts/gpu_check.sh --compile             # those, and all kernels compiled for an H100, without a GPU
#   bash scripts/gpu_check.sh --rehearse [--small]  # compile, then run everything on a device that computes nothing
#
# It uses python3 (PYTHON selects another), its torch and triton, and the packages in wheels/ rather than
# those that are installed. Where the tree is a copy, set GIT_COMMIT. On a machine that is lent by a tool that copies
# the tree: carry wheels/, and give the command 10 seconds more than --seconds.
set -euo pipefail
started="$(date +%s)"
calling_folder="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
max_bytes=$((64 * 2 ** 20)) # of tree, wheels and kernels together
# What images with torch, accelerate, rich and pytest tend to lack, and hypothesis, of which another version would draw
# other shapes, whose kernels are not compiled. Requirements of these packages are listed too, since --no-deps, which
# leaves the image's torch alone, fetches none.
wheels=(diffusers importlib-metadata lazy-importer datasets dill multiprocess pydantic
    pydantic-core annotated-types typing-inspection typing-extensions hypothesis liger-kernel)

usage() {
    echo "usage: bash scripts/gpu_check.sh FOLDER [--only PART ...] [--seconds 590] |" \
        "--download_wheels | --compile | --rehearse [--small]" >&2
    exit 2
}

download_wheels() {
    local wanted constraints
    wanted="$(sha256sum scripts/constraints.txt scripts/gpu_check.sh)"
    [ "$(cat wheels/wanted 2>/dev/null)" = "$wanted" ] && return
    mkdir -p wheels
    rm -f wheels/*.whl wheels/wanted
    constraints="$(mktemp)"
    # pip would evaluate the markers for the Python that runs it.
    sed '/python_version < "3.11"/d; s/;.*//' scripts/constraints.txt >"$constraints"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --constraint "$constraints" --dest wheels "${wheels[@]}"
    rm "$constraints"
    printf '%s' "$wanted" >wheels/wanted
}

# Makes and enters an environment with the versions of a device machine and a CUDA that computes nothing.
enter_fake_machine() {
    local venv="$PWD/.venv-gpu_check" wanted libraries
    wanted="$(sha256sum scripts/benchmarks/gpu_check/machine.txt scripts/benchmarks/gpu_check/fake_cuda.*)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (a minute or two the first time)"
        if python3.12 --version >/dev/null 2>&1; then
            python3.12 -m venv --clear "$venv"
        else # pyenv has shims of versions that are not selected
            PYENV_VERSION="$(pyenv latest 3.12)" python3.12 -m venv --clear "$venv"
        fi
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
            -r scripts/benchmarks/gpu_check/machine.txt
        "$venv/bin/python" scripts/benchmarks/gpu_check/fake_cuda.py >/dev/null
        printf '%s' "$wanted" >"$venv/installed"
    fi
    python="$venv/bin/python"
    libraries="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia/cu13/lib"
    export PATH="$venv/bin:$PATH" LD_LIBRARY_PATH="$libraries" TRITON_LIBCUDA_PATH="$libraries"
    # The fake cudaMallocAsync returns zeroed memory; PyTorch's caching allocator would reuse it uncleared.
    export PYTORCH_ALLOC_CONF=backend:cudaMallocAsync TORCH_CPP_LOG_LEVEL=ERROR
}

check() { # FOLDER [OPTION ...], as gpu_check/__main__.py takes them
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "gpu_check.sh needs a GPU: torch.cuda.is_available() is not true in $python" >&2
        exit 2
    fi
    # With the first set, Triton's kernels run on the CPU; with the second, every process compiles the modules it imports.
    unset TRITON_INTERPRET PYTHONDONTWRITEBYTECODE
    # Else torch.cuda.is_available() initializes CUDA, which then cannot be used in forked processes.
    export PYTORCH_NVML_BASED_CUDA_CHECK=1
    export PYTHONPATH="$PWD:$PWD/scripts/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
    if compgen -G "wheels/*.whl" >/dev/null; then
        site="$(mktemp -d)"
        trap 'rm -rf "$site"' EXIT
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
        export PYTHONPATH="$site:$PYTHONPATH"
    fi
    if ! "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, sys.argv[1:])))' \
        diffusers datasets pydantic; then
        echo "gpu_check.sh needs diffusers, datasets and pydantic: install them, or carry wheels/ along" >&2
        exit 2
    fi
    "$python" -m gpu_check "$@" --started "$started"
}

compile() { # ARCHIVE [--small]
    local out
    out="$(mktemp -d)" # which stays, with the log, where something fails
    check "$out" --compile "$1" --seconds 3600 "${@:2}"
    rm -rf "$out"
}

rehearse() { # [--small]: a few tests and cases; of the parts only the operator's is run again with compiled kernels
    local bytes archive=wheels/kernels.tar.xz again=(--seconds 1800)
    download_wheels
    enter_fake_machine
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/tree" "$work/out"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create | tar -x -C "$work/tree"
    if [ $# -gt 0 ]; then
        archive="$work/kernels.tar.xz" # without replacing what --compile has made
        again=(--small --only operator --seconds 600)
    fi
    echo "== compiling"
    (compile "$archive" "$@")
    mkdir "$work/tree/wheels"
    cp wheels/*.whl "$archive" "$work/tree/wheels"
    bytes="$(du --summarize --bytes "$work/tree" | cut -f1)"
    echo "== tree, wheels and kernels: $bytes of at most $max_bytes bytes"
    if [ "$bytes" -gt "$max_bytes" ]; then
        echo "too large: remove from the tree what can be rebuilt, or carry fewer kernels" >&2
        exit 1
    fi
    (cd "$work/tree" && GIT_COMMIT=rehearsal PYTHON="$python" bash scripts/gpu_check.sh "$work/out" "${again[@]}")
    if [ "$(find "$work/out" -type f | wc -l)" -gt 8 ] || [ -n "$(find "$work/out" -type f -size +16M)" ]; then
        echo "more than 8 files, or one of more than 16 MiB, would come back:" >&2
        ls -l "$work/out" >&2
        exit 1
    fi
    echo "rehearsed: everything ran, and nothing was compiled twice"
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
