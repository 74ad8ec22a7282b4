#!/bin/bash
# Train on the GPUs of one or more nodes, and resume when the time of a job is up:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh --config configs/cartpole.yaml
#
# One task is one rank with environments of its own. The run directory is named by the number of the job, which stays the
# same when the job is queued again: the run then resumes from its last checkpoint. To resume a run by hand, submit the
# same command with RUN_DIR set to the run directory.
#SBATCH --job-name=esper
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=esper-%j.log
# This script gets a signal two minutes before the end. It has every rank save its evidence, and queues the job again.
#SBATCH --signal=B:USR1@120
set -uo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

srun --kill-on-bad-exit=1 esper fit "$@" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
    --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" \
    --trainer.strategy ddp \
    --run_dir "${RUN_DIR:-runs/slurm_$SLURM_JOB_ID}" \
    --ckpt_path last &
step=$!

time_is_up() {
    kill -TERM "$step"
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap time_is_up USR1

wait "$step"
