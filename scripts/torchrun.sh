#!/bin/bash
# Train on one or more hosts with torchrun, which starts the ranks again after a death:
#
#   scripts/torchrun.sh --config configs/cartpole.yaml                                       # on one host
#   NODES=2 NODE_RANK=0 HEAD=host0:29500 scripts/torchrun.sh --config configs/cartpole.yaml  # on each of two, with its NODE_RANK
#
# RANKS: ranks on each host (the number of GPUs, else 2). RESTARTS: starts after the first (3). RUN_DIR: run directory
# (runs/torchrun). Every attempt resumes from the last checkpoint of the first rank, which sends it to hosts that do not have it.
# The exit status is that of torchrun, or 65 where another start would end in the same death (esper crash --attempts RUN_DIR).
set -uo pipefail

ranks="${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$ranks" -gt 0 ] || ranks=2
run_dir="${RUN_DIR:-runs/torchrun}"

# Without this variable torchrun has one store for all attempts, in which ranks find addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

torchrun \
    --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${RUN_ID:-esper}" \
    -m esper_lightning.cli.main fit "$@" \
    --trainer.num_nodes "${NODES:-1}" --trainer.devices "$ranks" --trainer.strategy ddp \
    --run_dir "$run_dir" --ckpt_path last &
launcher=$!
trap 'kill -TERM "$launcher"' TERM INT  # a shell does not pass signals on, and the ranks save evidence

wait "$launcher" && exit
status=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal has interrupted the wait
    wait "$launcher"
    status=$?
done
esper crash --attempts "$run_dir" >&2
[ $? -ne 65 ] || exit 65
exit "$status"
