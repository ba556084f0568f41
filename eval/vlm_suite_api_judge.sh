#!/usr/bin/env bash
# The multimodal suite through VLMEvalKit, judged by an API. Set OPENAI_API_BASE and OPENAI_API_KEY; the key is written nowhere.
#   eval/vlm_suite_api_judge.sh MODEL OUT JUDGE_NAME [a.b=c ...]     e.g. ... deepseek-v3-0324
set -euo pipefail
model=${1:?usage: $0 MODEL OUT JUDGE_NAME [a.b=c ...]} out=${2:?usage: $0 MODEL OUT JUDGE_NAME [a.b=c ...]}
judge=${3:?usage: $0 MODEL OUT JUDGE_NAME [a.b=c ...]}
: "${OPENAI_API_BASE:?set OPENAI_API_BASE to the API that judges}"
exec rlfr-vlm eval --model "$model" --out "$out" --judge api --judge-model "$judge" \
  --benchmarks mathvista_mini mathvision_mini mathverse_mini wemath logicvista visulogic -- "${@:4}"
