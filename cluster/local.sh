#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, to see how a run bears the loss of one:
#   cluster/local.sh [WORKER_NODES=2] [CPUS_EACH=2]
# Ctrl-C ends it, and only what it started.
set -euo pipefail
nodes=${1:-2} cpus=${2:-2}

export RAY_AUTH_MODE=token # nobody without the token gets in
ray get-auth-token --generate >/dev/null 2>&1
chmod 600 ~/.ray/auth_token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=10 # what a node has left after SIGTERM

work=$(mktemp -d /tmp/raybert-XXXX) # short: the path of a socket has 107 bytes at most
pids=()
finish() {
    trap - EXIT
    for pid in "${pids[@]}"; do kill -9 -- "-$pid" 2>/dev/null || true; done
    wait
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

start_node() { # NAME ARGUMENT...: in a process group and a directory of its own
    local log=$work/$1.log
    setsid ray start --block --temp-dir="$work/$1" "${@:2}" >"$log" 2>&1 &
    pids+=($!)
    until grep -q 'Ray runtime started' "$log"; do
        kill -0 $! 2>/dev/null || { cat "$log" && exit 1; }
        sleep 0.2
    done
}

echo "Starting $((nodes + 1)) nodes ..."
start_node head --head --num-cpus=1 --dashboard-host=127.0.0.1
for ((node = 1; node <= nodes; node++)); do
    start_node "node-$node" --address=127.0.0.1:6379 --num-cpus="$cpus" --dashboard-agent-listen-port=$((52365 + node))
    echo "Node $node: 'kill $!' gives it notice, 'kill -9 -$!' takes it at once."
done
cat <<TEXT
The cluster is up; its dashboard is http://127.0.0.1:8265. In another terminal:
  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
  ray job submit --working-dir . -- python run.py train --config sample --run_dir /tmp/raybert-run \\
      --cluster.num_workers=1,$nodes --cluster.cpus_per_worker=$cpus
Ctrl-C here ends the cluster.
TEXT
wait "${pids[0]}"
