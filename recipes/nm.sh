#!/usr/bin/env bash
# N:M sparsity (OBC, table 3): 2:4 and 4:8, first and last layer dense, then batch-norm tuning; and
# all layers, each making up for those before it, without tuning.
# Usage: recipes/nm.sh MODEL DATASET [common options]
source "$(dirname "$0")/common.sh"

dense
for pattern in 2:4 4:8; do
    n=${pattern%:*} m=${pattern#*:}
    file=$OUT/${TAG}_$n$m.pth
    make_file main_trueobs.py nmprune --prunen "$n" --prunem "$m" --save "$file"
    top=$(tuned "$file" --skip-firstlast)
    record "first and last dense, BN-tuned" "$pattern" "$pattern" "$top"
    top=$(top1 main_trueobs.py nmprune --prunen "$n" --prunem "$m" --sequential)
    record "sequential" "$pattern" "$pattern" "$top"
done
report
