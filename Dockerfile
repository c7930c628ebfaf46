# syntax=docker/dockerfile:1
# LITv2 for training and inference, with its operators compiled.
#
#   docker build --tag litv2 .                              for CPUs; --build-arg TORCH_INDEX=URL takes torch from another index
#   docker build --tag litv2 --build-arg DEVICE=cu130 .     for NVIDIA GPUs, CUDA kernels included; run it with --gpus all
#   docker run --rm litv2                                   what is in it
#   docker run --rm --volume DIR:/data litv2 sh -c 'cd classification && python main.py --cfg configs/litv2-small.yaml --data-path /data'
#
# scripts/run_dockerfile.py runs its steps without Docker.
ARG DEVICE=cpu

FROM ubuntu:24.04 AS base-cpu
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS base-cu130

FROM base-${DEVICE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/litv2
# The packages, a layer of their own: they change seldom. Without a GPU, the index of torch's builds for CPUs makes the image far smaller.
ARG TORCH_INDEX=""
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv .venv \
    && .venv/bin/python -m pip install --requirement requirements.txt
# The project, with its operators compiled beside their packages.
COPY . ./
RUN LITV2_BUILD=1 .venv/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && rm -rf build

FROM ubuntu:24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home litv2
COPY --from=build --chown=litv2:litv2 /opt/litv2 /opt/litv2
USER litv2
WORKDIR /opt/litv2
ENV PATH=/opt/litv2/.venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -c "import litv2, mm_modules.extension as e; assert not e.load('litv2.ops._C') and not e.load('mm_modules.DCN._C')"
CMD ["python", "-m", "litv2", "env"]
