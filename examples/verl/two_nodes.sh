#!/usr/bin/env bash
# The run of one_node.sh on two nodes with eight GPUs each, over Ray. On the first node, then on the second:
#
#   bash examples/verl/two_nodes.sh head                 # any flag of verl may follow
#   bash examples/verl/two_nodes.sh join FIRST_NODE      # its name or address, as the second node sees it
#
# The first waits until both are there. Environment, this repository, MODEL, DATA and RUNS must be the same on both, at the
# same paths. Ray's workers load the plug-in by its entry point; nothing is to be set for them. Untested on GPUs.
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
