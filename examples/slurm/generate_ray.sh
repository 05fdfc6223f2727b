#!/bin/bash
# A synthetic set by Ray on several machines at once: a worker that dies is replaced, the others go on meanwhile.
#
#   sbatch --nodes=8 examples/slurm/generate_ray.sh my_set.yaml
#
#SBATCH --job-name=generate --output=%x-%j.log --requeue --open-mode=append
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 --time=24:00:00
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_USAGE_STATS_ENABLED=0
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" --num-cpus "$SLURM_CPUS_PER_TASK" -- \
    diffusers-dino synthesise "$@" --engine ray --ray_address auto --ray_gpus 1
