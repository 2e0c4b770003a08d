# Sourced by the recipes: MODEL and DATASET, the options passed on, and a folder for the results.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL DATASET [common options, see main_trueobs.py --help]" >&2
    exit 2
fi
MODEL=$1 DATASET=$2
shift 2
OPTIONS=("$@")
PYTHON=${PYTHON:-python}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RECIPE=$(basename "$0" .sh)
TAG=${MODEL##*:}
OUT=${OUT:-results/$TAG-$DATASET}
mkdir -p "$OUT"
RESULTS=$OUT/$RECIPE.tsv
: > "$RESULTS"

run() {  # run() SCRIPT ARGS…: one of our commands on MODEL DATASET, with the common options
    local script=$1
    shift
    "$PYTHON" "$ROOT/$script" "$MODEL" "$DATASET" "$@" "${OPTIONS[@]}"
}

record() {  # record METHOD TARGET COST TOP1: a line of the table; COST is dense / reached
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$RESULTS"
}

top1() {  # the accuracy in a command's last line
    tail -n 1 | sed -n 's/^top-1 //p'
}

report() {  # the table on standard output, the pictures beside it
    "$PYTHON" "$ROOT/recipes/report.py" "$RECIPE" "$MODEL" "$DATASET" "$RESULTS" "$@"
}
