#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds mmcv's operators for the installed torch and installs them: scripts/build_mmcv.sh [PYTHON]
#
# For machines without a prebuilt wheel (detection/README.md). Building takes about a quarter of an hour on two cores, so the wheel is
# cached in ~/.cache/litv2 under the version of torch that it was built for, and the next call only installs it.
# CUDA operators are built where torch sees a GPU, or with FORCE_CUDA=1.
set -euo pipefail

python=${1:-python}
version=$(sed -n 's/^onedl-mmcv==//p' "$(dirname "$0")/../requirements-mm.txt")
tag=$("$python" -c 'import torch; print(f"torch-{torch.__version__}" + ("-gpu" if torch.cuda.is_available() else ""))')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/litv2/${tag}${FORCE_CUDA:+-gpu}
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

install() { pip install --quiet --no-index --no-deps --find-links "$cache" "onedl-mmcv==$version"; }
if [ -d "$cache" ] && install 2>/dev/null; then
    exit 0
fi

echo "building mmcv $version for $tag: about 15 minutes on two cores, once"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# No build isolation: the operators must be compiled against the torch that will load them.
pip download --quiet --no-deps --no-build-isolation --no-binary onedl-mmcv --dest "$work" "onedl-mmcv==$version"
tar -xzf "$work"/*.tar.gz -C "$work"
# mmcv compiles as C++17, but the headers of torch 2.10 and newer need C++20. Its flag comes last and cannot be overridden.
if "$python" -c 'import torch; raise SystemExit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))'; then
    sed -i 's/-std=c++1[47]/-std=c++20/' "$work/onedl_mmcv-$version/setup.py"
fi
MAX_JOBS=${MAX_JOBS:-$(nproc)} CFLAGS="-g0 ${CFLAGS:-}" \
    pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$work/onedl_mmcv-$version"
mkdir -p "$cache"
mv "$work"/wheel/*.whl "$cache"/
install
