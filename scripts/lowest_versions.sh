#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml allows into a temporary environment; trains, samples and evaluates
# with them, and runs the tests of the operator, the norms, the U-Net and the configuration. PYTHON chooses the
# interpreter (default python3), TORCH another version than the lowest, for instance 2.13.0+cpu. assets/LOG.md has runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
. "$work/venv/bin/activate"
python - "${TORCH:-}" >"$work/lowest.txt" <<'EOF'
import sys
from pip._vendor import tomli

project = tomli.load(open("pyproject.toml", "rb"))["project"]
named = ("efficientnet", "hypothesis", "pytest")  # of the test extra, what the commands below need
needed = [*project["dependencies"], *(line for line in project["optional-dependencies"]["test"] if line.startswith(named))]
lowest = [line.replace(">=", "==") for line in needed]
print(*(f"torch=={sys.argv[1]}" if sys.argv[1] and line.startswith("torch==") else line for line in lowest), sep="\n")
EOF
cat "$work/lowest.txt"
python -m pip install --quiet --only-binary :all: --requirement "$work/lowest.txt"
export PYTHONPATH=$PWD GNUNET_CACHE=$work/cache HF_HUB_OFFLINE=1
run=$work/run
flags=(--data.source noto_emoji --data.resolution 16 --model.block_out_channels 16 32
    --model.down_block_types DownBlock2D AttnDownBlock2D --model.up_block_types AttnUpBlock2D UpBlock2D
    --model.norm.groups 4 --train.batch_size 8 --train.total_images 64 --validation.num_examples 16
    --validation.num_bins 4 --sampling.num_inference_steps 2)
python -m gnunet train "${flags[@]}" --run_dir "$run"
python -m gnunet sample "$run" --num_images 4 --out "$work/samples"
python -m gnunet evaluate "$run" --num_images 64 --out "$work/evaluation"
python -m pytest -q -p no:cacheprovider tests/ops/test_group_norm_silu.py tests/norms tests/models tests/config
python --version
python -m pip freeze | grep -i -e '^torch' -e '^diffusers' -e '^accelerate' -e '^pydantic==' -e '^pyarrow' -e '^numpy'
