#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] slurm_train.sh PARTITION JOB CONFIG WORK_DIR [FLAGS OF train.py]
GPUS=${GPUS:-8} PER_NODE=${GPUS_PER_NODE:-8}
srun -p "$1" --job-name="$2" --gres="gpu:$PER_NODE" --ntasks="$GPUS" --ntasks-per-node="$PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
