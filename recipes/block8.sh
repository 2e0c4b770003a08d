#!/usr/bin/env bash
# 4-block sparsity with 8-bit weights and activations at 4× and 5× (OBC, table 2). The database is a
# 4-block one with every level quantised. The paper's targets are about measured time: set
# TIMINGS=FILE to a file of your own measurements (format: obc/toolkit/costs.py). Without it, they
# are about BOPs.
# Usage: recipes/block8.sh MODEL DATASET [common options]            SEARCH=0: without the search
source "$(dirname "$0")/common.sh"
source "$ROOT/recipes/nonuniform.sh"

KIND=4block_8w8a CONSTR=bops TARGETS=${TARGETS:-"4 5"}
if [ -n "${TIMINGS:-}" ]; then
    CONSTR=timingsq
else
    NO_PAPER=--no-paper  # the paper's numbers are for measured time
fi
make_file main_trueobs.py blocked --sparse-dir "$PREFIX/models_4block" $GRID
for level in "$PREFIX/models_4block/${TAG}"_[0-9][0-9][0-9][0-9].pth; do
    make_file main_trueobs.py quant --wbits 8 --abits 8 --load "$level" \
        --save "$PREFIX/models_4block_8w8a/$(basename "$level")"
done
nonuniform
