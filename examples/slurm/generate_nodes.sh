#!/bin/bash
# A synthetic set on several machines at once. The output folder must be on storage that they share.
#
#   sbatch --nodes=8 examples/slurm/generate_nodes.sh my_set.yaml
#
#SBATCH --job-name=generate --output=%x-%j.log --requeue --open-mode=append
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 --time=24:00:00
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A machine that fails ends the step; the job is then put back into the queue, up to five times, and goes on.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-4}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:29500" --max_restarts 3 \
    -m diffusers_dino synthesise "$@" || {
    [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ] && scontrol requeue "$SLURM_JOB_ID"
}
