#!/usr/bin/env bash
# Run a recipe: scripts/run.sh RECIPE_DIR [rlfr|rlvr|flowrl|flow] [--dry-run] [a.b=c ...]
# rlfr (the default) fits the flow field first where it is missing. Overrides go to every command that is run; safe to run again: it resumes.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
[ -d "$1" ] || { echo "run.sh: no folder $1" >&2; exit 2; }
recipe=$(cd "$1" && pwd); shift
case "${1:-}" in rlfr | rlvr | flowrl | flow) method=$1; shift ;; *) method=rlfr ;; esac
[ -f "$recipe/$method.yaml" ] || { echo "run.sh: $recipe has no $method.yaml" >&2; exit 2; }

cd "$(dirname "$0")/.."
command=rlfr-vlm
[ ! -x .venv/bin/rlfr-vlm ] || command=.venv/bin/rlfr-vlm
dry=()
overrides=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry=(--dry-run); else overrides+=("$argument"); fi
done
run() { # VERB CONFIG [a.b=c ...]
  if [ ${#dry[@]} -gt 0 ]; then echo "--- # rlfr-vlm $1"; else echo "run.sh: rlfr-vlm $1 --config $2${3:+ ${*:3}}" >&2; fi
  "$command" "$1" --config "$2" ${dry[@]+"${dry[@]}"} "${@:3}"
}

if [ "$method" = flow ]; then
  run flow "$recipe/flow.yaml" ${overrides[@]+"${overrides[@]}"}
  exit
fi
if [ "$method" = rlfr ]; then
  resolved=$("$command" train --config "$recipe/rlfr.yaml" --dry-run ${overrides[@]+"${overrides[@]}"})
  field=$(sed -n '/^flow:/,/^[^ ]/s/^  checkpoint: //p' <<<"$resolved")
  if [ ! -f "$field/flow_config.json" ]; then
    [ "$(basename "$field")" = flow ] || { echo "run.sh: flow.checkpoint=$field is not there, and cannot be fitted: it must end in /flow" >&2; exit 2; }
    run flow "$recipe/flow.yaml" ${overrides[@]+"${overrides[@]}"} "output_dir=$(dirname "$field")"
  fi
fi
run train "$recipe/$method.yaml" ${overrides[@]+"${overrides[@]}"}
