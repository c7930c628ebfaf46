#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# dist_test.sh CONFIG CHECKPOINT GPUS [FLAGS OF test.py]; for several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT.
torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$3" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" "$(dirname "$0")/test.py" "$1" "$2" "${@:4}"
