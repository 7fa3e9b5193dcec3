#!/usr/bin/env bash
# start_node.sh FOLDER NODE: the node is back.
export SLURM_CONF=$1/slurm.conf
cd "$1" && exec slurmd -N "$2"
