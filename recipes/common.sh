# Sourced by the recipes: sets MODEL, DATASET, the common options and a folder for the results.
# Only the table goes to standard output; what the commands print goes to standard error.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL DATASET [common options, see main_trueobs.py --help]" >&2
    exit 2
fi
MODEL=$1 DATASET=$2
shift 2
OPTIONS=("$@")
TUNING=()  # the same, but with augmented images
for word in "$@"; do
    [ "$word" = --noaug ] || TUNING+=("$word")
done
PYTHON=${PYTHON:-python}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RECIPE=$(basename "$0" .sh)
TAG=${MODEL##*:}
OUT=${OUT:-results/$TAG-$DATASET}
mkdir -p "$OUT"
RESULTS=$OUT/$RECIPE.tsv
: > "$RESULTS"

run() {  # run SCRIPT ARGS…: one of our commands on MODEL DATASET, with the common options
    local script=$1
    shift  # ${OPTIONS[@]+…}: to bash 3 an empty array is "unbound"
    "$PYTHON" "$ROOT/$script" "$MODEL" "$DATASET" "$@" ${OPTIONS[@]+"${OPTIONS[@]}"}
}

make_file() {  # the same, for a command whose result is a file
    run "$@" >&2
}

# A command that fails inside $(…) stops the recipe only if $(…) is assigned to a variable: never use
# it as an argument.

top1() {  # top1 SCRIPT ARGS…: run, and print top-1, KL and agreement (the dense model: top-1 only)
    run "$@" | awk '$1 == "KL" { rest = "\t" $2 "\t" $4 } $1 == "top-1" { print $2 rest }'
}

tuned() {  # tuned FILE ARGS…: the accuracy after batch-norm tuning. Its images are augmented, as those
    # that networks are trained on, even if the layers are compressed with --noaug; unless TUNE=--noaug
    local OPTIONS=(${TUNING[@]+"${TUNING[@]}"})
    top1 post_proc.py "$@" --bnt ${TUNE:-}
}

record() {  # record METHOD TARGET REACHED TOP1: a line of the table, TOP1 as `top1` prints it
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$RESULTS"
}

dense() {  # the first line of the table
    local top
    top=$(top1 main_trueobs.py dense)
    record dense - - "$top"
}

report() {  # print the table, write the plots next to the results
    "$PYTHON" "$ROOT/recipes/report.py" "$RECIPE" "$MODEL" "$DATASET" "$RESULTS" "$@"
}
