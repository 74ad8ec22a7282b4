#!/bin/bash
# Train on the GPUs of one or more nodes, and go on where a job was cut off:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh --config configs/cartpole.yaml
#
# One task is one rank with environments of its own. The run directory bears the name of the job; a job that
# SLURM puts back into the queue finds its checkpoint there. To go on by hand after the job's death, submit
# the same command with RUN_DIR set to that directory.
#SBATCH --job-name=esper
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=esper-%j.log
# SLURM tells a job that its time is up 90 s before it kills it: SIGTERM lets every rank save its evidence.
#SBATCH --signal=TERM@90
set -euo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

exec srun --kill-on-bad-exit=1 esper fit "$@" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
    --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" \
    --trainer.strategy ddp \
    --run_dir "${RUN_DIR:-runs/slurm_$SLURM_JOB_ID}" \
    --ckpt_path last
