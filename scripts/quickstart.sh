#!/usr/bin/env bash
# Environment, a few minutes of training on the embedded portraits, samples: one command on a fresh machine.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" evaluation
gnunet train
gnunet sample runs/noto_portraits32 --num_images 64 --out samples/quickstart \
    --guide runs/noto_portraits32/checkpoints/000004200 --guidance_scale 3  # autoguidance
echo "Look at samples/quickstart/grid.png, and at how the samples came about in runs/noto_portraits32/samples."
