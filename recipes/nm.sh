#!/usr/bin/env bash
# N:M sparsity (OBC, table 3): 2:4 and 4:8, first and last layer dense, then batch-norm tuning.
# Usage: recipes/nm.sh MODEL DATASET [common options]
source "$(dirname "$0")/common.sh"

for pattern in "2 4" "4 8"; do
    set -- $pattern
    file=$OUT/${TAG}_$1$2.pth
    run main_trueobs.py nmprune --prunen "$1" --prunem "$2" --save "$file"
    top=$(run post_proc.py "$file" --bnt --skip-firstlast | top1)
    record "first and last dense, BN-tuned" "$1:$2" "$1:$2" "$top"
done
report
