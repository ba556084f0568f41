#!/usr/bin/env bash
# The multimodal suite through VLMEvalKit, judged by a model that is served here on loopback and stopped afterwards.
#   eval/vlm_suite_local_judge.sh MODEL OUT [JUDGE_MODEL] [a.b=c ...]
set -euo pipefail
model=${1:?usage: $0 MODEL OUT [JUDGE_MODEL] [a.b=c ...]} out=${2:?usage: $0 MODEL OUT [JUDGE_MODEL] [a.b=c ...]}
judge=${3:-Qwen/Qwen2.5-7B-Instruct}
exec rlfr-vlm eval --model "$model" --out "$out" --judge local --judge-model "$judge" \
  --benchmarks mathvista_mini mathvision_mini mathverse_mini wemath logicvista visulogic -- "${@:4}"
