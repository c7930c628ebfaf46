#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# dist_train.sh CONFIG GPUS [FLAGS OF train.py]; for several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT.
torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$2" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" "$(dirname "$0")/train.py" "$1" "${@:3}"
