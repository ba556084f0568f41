#!/usr/bin/env bash
# The language suite of the RLFR paper: AIME24, AIME25, AMC, MATH500, Minerva, OlympiadBench.
#   eval/math_suite.sh MODEL OUT [a.b=c ...]     e.g. eval/math_suite.sh runs/x/hf/global_step_330 runs/x/math eval.data_dir=DIR
set -euo pipefail
model=${1:?usage: $0 MODEL OUT [a.b=c ...]} out=${2:?usage: $0 MODEL OUT [a.b=c ...]}
exec rlfr-vlm eval --model "$model" --out "$out" --benchmarks aime24 aime25 amc math500 minerva olympiad_bench -- "${@:3}"
