#!/usr/bin/env bash
# Runs one_node.sh on two nodes with eight GPUs each, over Ray. Call it on the first node, then on the second:
#
#   bash examples/verl/two_nodes.sh head                 # any flag of verl may follow
#   bash examples/verl/two_nodes.sh join FIRST_NODE      # its name or address, as the second node sees it
#
# The first node waits for the second. The environment, this repository, MODEL, DATA and RUNS must be the same on both,
# at the same paths. Ray's workers load the plug-in by its entry point and need no setting. Untested on GPUs.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PORT=${PORT:-6379}
GPUS=${GPUS:-8}

case ${1:-} in
  head)
    shift
    ray start --head --port="$PORT" --num-gpus="$GPUS"
    echo "waiting for the second node: bash examples/verl/two_nodes.sh join $(hostname)"
    until ray status | grep --quiet "/$((2 * GPUS)).0 GPU"; do sleep 5; done
    NODES=2 bash "$HERE/one_node.sh" +ray_kwargs.ray_init.address=auto "$@"
    ;;
  join)
    ray start --address="${2:?which node is the first?}:$PORT" --num-gpus="$GPUS" --block
    ;;
  *)
    echo "usage: $0 head [FLAG...] | join FIRST_NODE" >&2
    exit 2
    ;;
esac
