#!/bin/bash
# A synthetic set on one machine, in as many jobs of limited time as needed: each goes on where the last one was cut off,
# and those that find the set complete end at once.
#
#   sbatch --array=1-10%1 examples/slurm/generate_chain.sh my_set.yaml
#
#SBATCH --job-name=generate --output=%x-%A-%a.log
#SBATCH --nodes=1 --ntasks=1 --gpus=4 --cpus-per-gpu=4 --time=04:00:00
set -euo pipefail

# All processes end when one dies; torchrun then starts them again, and finished shards are kept.
exec torchrun --standalone --nproc_per_node "${SLURM_GPUS:-4}" --max_restarts 3 -m diffusers_dino synthesise "$@"
