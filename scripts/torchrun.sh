#!/bin/bash
# Train on one or more hosts with torchrun, which starts the ranks again after a death:
#
#   scripts/torchrun.sh --config configs/cartpole.yaml                                    # one host
#   NODES=2 NODE_RANK=0 HEAD=host0:29500 scripts/torchrun.sh --config configs/cartpole.yaml  # on each of two, NODE_RANK 0 and 1
#
# RANKS: ranks on each host (default: the number of GPUs, else 2). RESTARTS: starts after the first (default 3). RUN_DIR: run
# directory (default runs/torchrun). Every attempt resumes from the last checkpoint in the run directory; the first rank sends it
# to the others, so that the hosts need share no disk. A death that repeats itself has exit status 65 in each rank
# (esper crash --attempts RUN_DIR), but torchrun cannot be told to stop then.
set -euo pipefail

ranks="${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$ranks" -gt 0 ] || ranks=2

# Without this variable torchrun has one store for all attempts, in which ranks find addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id "${RUN_ID:-esper}" \
    -m esper_lightning.cli.main fit "$@" \
    --trainer.num_nodes "${NODES:-1}" --trainer.devices "$ranks" --trainer.strategy ddp \
    --run_dir "${RUN_DIR:-runs/torchrun}" --ckpt_path last
