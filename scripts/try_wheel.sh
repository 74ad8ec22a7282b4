#!/usr/bin/env bash
# Build the wheel and the source archive into a folder, install the wheel with its core dependencies into a new
# environment, and use it outside the repository: scripts/try_wheel.sh dist
set -euo pipefail
output=$(realpath -m "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m build --outdir "$output" .

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet -c constraints.txt "$(ls -t "$output"/esper_lightning-*.whl | head -1)"
cd "$scratch"
PATH="$scratch/venv/bin:$PATH"

esper --version
esper list > /dev/null
esper doctor
esper fit --config cartpole --model.total_env_steps 100_000
esper report runs/cartpole/version_0
esper report runs/cartpole/version_0 --html
test -s runs/cartpole/version_0/report.html
esper evaluate --ckpt_path runs/cartpole/version_0
esper export --ckpt_path runs/cartpole/version_0 --output policy.pt2 --format torch

esper fit --config cartpole --model.total_env_steps 1_000_000_000 & # a run that is killed
history=runs/cartpole/version_1/rank0/history.jsonl
for _ in $(seq 300); do test -s "$history" && break || sleep 1; done
kill -9 $!
wait $! || true
sleep 3
esper crash runs/cartpole/version_1 | tee crash.txt
grep -q "The process vanished" crash.txt
esper replay runs/cartpole/version_1 | tee replay.txt || test $? -eq 3 # nothing in the program killed it
grep -q "Did not happen again" replay.txt

# What an extra is needed for says so in one line.
for command in "fit --config hopper" "compare runs" "sweep --config cartpole --search model.ppo.clip=0.1..0.3 --output sweep" "export --ckpt_path runs/cartpole/version_0 --output policy.onnx --format onnx"; do
    if esper $command 2> error.txt; then echo "esper $command works without its extra" && exit 1; fi
    test "$(wc -l < error.txt)" -le 1 || { cat error.txt && exit 1; }
    grep -q "pip install" error.txt || { cat error.txt && exit 1; }
done
esper init project && cd project && esper fit --config config.yaml --model.total_env_steps 20_000
echo "The wheel works."
