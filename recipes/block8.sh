#!/usr/bin/env bash
# 4-block sparsity with 8-bit weights and activations at 4× and 5× (OBC, table 2). The database is a
# 4-block one, each level of it quantised. The paper's targets are measured time: put a file of
# seconds at $OUT/scores/<model>_4block_8w8a_timings.txt (format: README) and set CONSTR=timingsq.
# Usage: recipes/block8.sh MODEL DATASET [common options]            SEARCH=0: without the search
source "$(dirname "$0")/common.sh"
source "$ROOT/recipes/nonuniform.sh"

KIND=4block_8w8a CONSTR=${CONSTR:-bops} TARGETS=${TARGETS:-"4 5"}
run main_trueobs.py blocked --sparse-dir "$PREFIX/models_4block"
for level in "$PREFIX/models_4block/${TAG}"_*.pth; do
    run main_trueobs.py quant --wbits 8 --abits 8 --load "$level" \
        --save "$PREFIX/models_4block_8w8a/$(basename "$level")"
done
nonuniform
