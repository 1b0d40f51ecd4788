#!/usr/bin/env bash
# Two "machines" on one: a training over two network namespaces, one of which is cut off for a while (root needed).
#
#     tests/bench/two_nodes.sh PYTHON FOLDER [SECONDS]
#
# Each is a node of torchrun's rendezvous with a rank and two games; both write to FOLDER, as machines with a shared file
# system would. After ten iterations the cable is pulled for SECONDS (default 60) and plugged in again; the run must come
# to its end with every iteration in metrics.jsonl, once.
set -euo pipefail
python=$1 folder=$(realpath "$2") seconds=${3:-60} script=$(realpath "$(dirname "$0")/../../ppo_tuxkart.py")
cd "$folder"
[ ! -e runs/two-nodes ] || { echo "$folder/runs/two-nodes is there already: type another folder."; exit 2; }
for node in 1 2; do
    ip netns add "node$node"
    ip -n "node$node" link set lo up
done
trap 'ip netns pids node1 | xargs -r kill -9; ip netns pids node2 | xargs -r kill -9; ip netns del node1; ip netns del node2' EXIT
ip link add cable1 netns node1 type veth peer name cable2 netns node2
for node in 1 2; do
    ip -n "node$node" address add "10.77.0.$node/24" dev "cable$node"
    ip -n "node$node" link set "cable$node" up
done
for node in 1 2; do
    GLOO_SOCKET_IFNAME="cable$node" ip netns exec "node$node" "$python" -m torch.distributed.run --nnodes 2 \
        --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500 --rdzv-id two \
        --rdzv-conf "is_host=$((node == 1)),read_timeout=900" --local-addr "10.77.0.$node" \
        --max-restarts 5 "$script" --num-envs 2 --num-steps 32 --num-minibatches 2 --eval-interval 0 \
        --total-timesteps $((128 * 40)) --name two-nodes >"node$node.log" 2>&1 &
done
iterations() { grep -c . runs/two-nodes/metrics.jsonl 2>/dev/null || true; }
until [ "$(iterations)0" -ge 100 ]; do
    [ -n "$(jobs -r)" ] || { tail -n 5 node1.log node2.log; exit 1; }
    sleep 1
done
echo "$(date +%T) after $(iterations) iterations: cable out"
ip -n node2 link set cable2 down
sleep "$seconds"
echo "$(date +%T) after $(iterations) iterations: cable in"
ip -n node2 link set cable2 up
wait
numbers=$(sed 's/^{"iteration": \([0-9]*\).*/\1/' runs/two-nodes/metrics.jsonl | tr '\n' ' ')
[ "$numbers" = "$(seq -s ' ' 40) " ] || { echo "iterations: $numbers"; exit 1; }
echo "$(date +%T) done: 40 iterations, each once; restarts: $(grep -c 'driving the games back' node1.log node2.log || true)"
