#!/usr/bin/env bash
# Uniform quantisation, weights only (OBC, table 4): asymmetric per-channel weights, all layers, then
# batch-norm tuning, or sequentially without tuning; for comparison, symmetric weights without any
# correction.
# Usage: recipes/quantisation.sh MODEL DATASET [common options]
source "$(dirname "$0")/common.sh"

dense
for bits in 4 3 2; do
    file=$OUT/${TAG}_${bits}w_asym.pth
    make_file main_trueobs.py quant --wbits $bits --wasym --save "$file"
    top=$(tuned "$file")
    record "asymmetric, BN-tuned" $bits "$bits bits" "$top"
    top=$(top1 main_trueobs.py quant --wbits $bits --wasym --sequential)
    record "asymmetric, sequential" $bits "$bits bits" "$top"
    top=$(top1 main_trueobs.py quant --wbits $bits)
    record "symmetric" $bits "$bits bits" "$top"
done
report
