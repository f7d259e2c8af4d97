#!/usr/bin/env bash
# Builds the environment in which mmdet itself runs: bash environments/mmdet.sh FOLDER [PYTHON]
#
# It needs Linux, Python 3.11 with its headers, a C++ compiler and about 6 GB, and no GPU. uv is used where it is
# on the PATH. The operations of mmcv are compiled: about eight minutes on two cores, MAX_JOBS=N bounds how many at once.
set -euo pipefail

folder=${1:?usage: bash environments/mmdet.sh FOLDER [PYTHON]}
python=${2:-python3.11}
list=$(cd "$(dirname "$0")" && pwd)/mmdet.txt

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "torch 2.1.2 is built up to Python 3.11, stage needs 3.11, and '$python' is another: make env-mmdet MMDET_PYTHON=python3.11" >&2
    exit 1
}
command -v "${CXX:-c++}" >/dev/null || {
    echo "mmcv's operations are compiled, and there is no C++ compiler: install g++ or set CXX" >&2
    exit 1
}

if command -v uv >/dev/null; then
    uv venv --quiet --clear --python "$(command -v "$python")" "$folder"
    install=(uv pip install --quiet --python "$folder/bin/python")
else
    "$python" -m venv --clear "$folder"
    install=("$folder/bin/python" -m pip install --quiet)
fi

# setuptools first: what has no wheel is built with the pinned one, not with the newest in isolation. No
# dependencies: the list is complete, and leaves out a package on purpose.
echo "Installing the pinned packages into $folder"
"${install[@]}" --no-deps $(grep -E '^(setuptools|wheel|ninja|packaging)==' "$list")
"${install[@]}" --no-deps --no-build-isolation $(grep -Ev '^(#|mmcv==)' "$list")

echo "Compiling the operations of mmcv: about eight minutes on two cores"
MMCV_WITH_OPS=1 PATH="$folder/bin:$PATH" MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "${install[@]}" --no-deps --no-build-isolation --no-binary mmcv "$(grep '^mmcv==' "$list")"

"$folder/bin/python" - <<'PY'
import mmcv
import mmdet
import mmdet.apis
import torch
from mmcv.ops import MultiScaleDeformableAttention, nms

boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
_, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
assert kept.tolist() == [0, 2], f"the compiled nms keeps boxes 0 and 2 here, and kept {kept.tolist()}"
print(f"mmdet {mmdet.__version__} with mmcv {mmcv.__version__} and torch {torch.__version__} works")
PY
