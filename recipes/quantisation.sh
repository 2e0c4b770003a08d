#!/usr/bin/env bash
# Uniform quantisation, weights only (OBC, table 4): asymmetric per-channel weights, all layers, then
# batch-norm tuning; beside it symmetric weights without any correction.
# Usage: recipes/quantisation.sh MODEL DATASET [common options]
source "$(dirname "$0")/common.sh"

for bits in 4 3 2; do
    file=$OUT/${TAG}_${bits}w_asym.pth
    run main_trueobs.py quant --wbits $bits --wasym --save "$file"
    record "asymmetric, BN-tuned" $bits "$bits bits" "$(run post_proc.py "$file" --bnt | top1)"
    record "symmetric" $bits "$bits bits" "$(run main_trueobs.py quant --wbits $bits | top1)"
done
report
