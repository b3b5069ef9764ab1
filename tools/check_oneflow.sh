#!/usr/bin/env bash
# diffattn's processors in a graph of OneFlow 0.9.0, what OneDiff runs on. Needs Python 3.10 and 2 GB of disk; not part
# of CI. 0.9.0 is PyPI's newest and built for CUDA 11: on a CPU it imports once cuBLAS and cuDNN lie in its path.
#
#     PYTHON=python3.10 tools/check_oneflow.sh [folder of the environment]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-${TMPDIR:-/tmp}/diffattn-oneflow}"
if [ ! -e "$folder/installed" ]; then
    "${PYTHON:-python3.10}" -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check \
        oneflow==0.9.0 nvidia-cublas-cu11==11.10.3.66 nvidia-cudnn-cu11==8.5.0.96 "numpy<2"
    touch "$folder/installed"
fi
packages="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
export LD_LIBRARY_PATH="$packages/nvidia/cublas/lib:$packages/nvidia/cudnn/lib"
GLOG_minloglevel=3 PYTHONPATH="$here/.." "$folder/bin/python" "$here/check_oneflow.py"
