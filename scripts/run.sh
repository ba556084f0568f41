#!/usr/bin/env bash
# Run a recipe: scripts/run.sh RECIPE_DIR [rlfr|rlvr|flowrl|flow] [--dry-run] [a.b=c ...]
# rlfr (the default) fits the flow field first where flow.checkpoint is not there yet, flow fits it alone, into flow.checkpoint=DIR/flow where
# that is given. Overrides go to every command that is run. Relative paths, the recipe's own too, start where this is called. Run it again to
# go on: training resumes from its newest checkpoint; a fit that was stopped goes on where it last looked, one that has finished is kept until its folder is gone.
set -euo pipefail

usage() { sed -n '2,5s/^# //p' "$0"; }
refuse() { echo "run.sh: $1" >&2; exit 2; }

recipe='' method='' dry=() overrides=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit ;;
    --dry-run) dry=(--dry-run) ;;
    rlfr | rlvr | flowrl | flow) [ -z "$method" ] || refuse "both $method and $argument: name one"; method=$argument ;;
    -*) usage >&2; refuse "unknown option $argument" ;;
    [a-z]*=*) overrides+=("$argument") ;;
    *) [ -z "$recipe" ] || { usage >&2; refuse "$argument is no method and no a.b=c, and the folder is $recipe"; }; recipe=$argument ;;
  esac
done
[ -n "$recipe" ] || { usage >&2; exit 2; }
recipe=${recipe%/} method=${method:-rlfr} elsewhere=''
[ -d "$recipe" ] || refuse "no folder $recipe"
[ -f "$recipe/$method.yaml" ] || refuse "$recipe has no $method.yaml"
for override in ${overrides[@]+"${overrides[@]}"}; do
  case $method:$override in
    rlvr:flow=null | flowrl:flow=null) ;;
    rlvr:flow[.=]* | flowrl:flow[.=]*) refuse "$override: $method has no flow field; leave it out, or run rlfr" ;;
    flow:output_dir=*) elsewhere=$override ;;
  esac
done

root=$(cd "$(dirname "$0")/.." && pwd) python=python
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
run() { # VERB CONFIG [a.b=c ...]
  if [ ${#dry[@]} -gt 0 ]; then echo "--- # rlfr-vlm $1"; else echo "run.sh: rlfr-vlm $1 --config $2${3:+ ${*:3}}" >&2; fi
  "$python" -m rlfr_vlm.cli "$1" --config "$2" ${dry[@]+"${dry[@]}"} "${@:3}"
}
field_of() { # CONFIG [a.b=c ...]: its flow.checkpoint and, as an override that brings a fit there, output_dir=...; empty where it is unset
  "$python" - "$@" <<'EOF'
import json, sys
from pathlib import Path
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import UserError
try:
    flow = load_config(sys.argv[1], tuple(sys.argv[2:])).flow
    field = flow and flow.checkpoint
    if field and Path(field).name != "flow" and not Path(field, "flow_config.json").exists():
        raise UserError(f"flow.checkpoint={field} is not there, and cannot be fitted: it must end in /flow")
except UserError as error:
    print(f"run.sh: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
if field:
    print(field, f"output_dir={json.dumps(str(Path(field).parent))}", sep="\n")
EOF
}

place=()
if [ "$method" = flow ] || [ "$method" = rlfr ]; then
  found=$(field_of "$recipe/$method.yaml" ${overrides[@]+"${overrides[@]}"})
  [ -z "$found" ] || place=("${found##*$'\n'}")
fi
if [ "$method" = flow ]; then
  [ -z "$found" ] || [ -z "$elsewhere" ] || refuse "both flow.checkpoint and $elsewhere say where the field goes: name one"
  run flow "$recipe/flow.yaml" ${overrides[@]+"${overrides[@]}"} ${place[@]+"${place[@]}"}
  exit
fi
if [ ${#place[@]} -gt 0 ] && [ ! -f "${found%$'\n'*}/flow_config.json" ]; then
  "$python" -m rlfr_vlm.cli train --config "$recipe/rlfr.yaml" --dry-run ${overrides[@]+"${overrides[@]}"} >/dev/null # what would stop it later
  run flow "$recipe/flow.yaml" ${overrides[@]+"${overrides[@]}"} "${place[@]}"
fi
run train "$recipe/$method.yaml" ${overrides[@]+"${overrides[@]}"}
