#!/usr/bin/env bash
# Mixed quantisation and 2:4 sparsity at 5× to 15× fewer BOPs (OBC, figure 2): each layer at 8w8a or
# 4w4a, dense or 2:4.
# Usage: recipes/mixed.sh MODEL DATASET [common options]             SEARCH=0: without the search
source "$(dirname "$0")/common.sh"
source "$ROOT/recipes/nonuniform.sh"

KIND=mixed CONSTR=bops TARGETS=${TARGETS:-"5 6 8 10 12 14 15"}
nm=$PREFIX/models_nm/${TAG}_24.pth
make_file main_trueobs.py nmprune --save "$nm"
for bits in 8 4; do
    level=${bits}w${bits}a
    quantise=(main_trueobs.py quant --wbits $bits --abits $bits)
    make_file "${quantise[@]}" --save "$PREFIX/models_quant/${TAG}_$level.pth"
    make_file "${quantise[@]}" --load "$nm" --save "$PREFIX/models_nm_quant/${TAG}_24_$level.pth"
done
nonuniform
