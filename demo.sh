#!/usr/bin/env bash
# Compress rn8, a small network that ships with its weights, on digits: `make demo`. First uniformly,
# to 4 bits and to 2:4; then with a sparsity level for each layer, for 4× fewer FLOPs.
# Writes checkpoints, records of the runs, tables and plots to demo/. No download, no GPU.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
mkdir -p demo

compress() { # compress NAME OPTIONS…: add a line to the table
    local name=$1 result
    shift
    result=$("$PYTHON" main_trueobs.py rn8 digits "$@" --noaug)
    table+=$(printf '| %-22s | %s |' "$name" "${result##* }")$'\n'
}

table=$'| rn8 on digits          | top-1 |\n|------------------------|-------|\n'
compress "4-bit weights" quant --wbits 4 --save demo/rn8_4w.pth
compress "2:4 sparsity" nmprune --prunen 2 --prunem 4 --save demo/rn8_24.pth
nonuniform=$(PYTHON=$PYTHON OUT=demo GRID="--delta-sparse 0.2" TARGETS="4" SEARCH=0 \
    recipes/unstructured.sh rn8 digits --noaug)
printf '\n%s\n%s\n\nplots and checkpoints: demo/\n' "$table" "$(grep '^|' <<< "$nonuniform")"
