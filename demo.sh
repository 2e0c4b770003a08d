#!/usr/bin/env bash
# Compress rn8, a small network that ships with its weights, on digits: `make demo`.
# Writes checkpoints, with a record of each run, to demo/. No download, no GPU.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
mkdir -p demo

dense() {
    "$PYTHON" - <<'END'
import torch
from datautils import load_data, test_batches
from modelutils import evaluate, get_model

digits = load_data("digits")
model = get_model("rn8", "digits")
print(f"top-1 {evaluate(model, test_batches(digits), torch.device('cpu')):.2f}")
END
}

row() { # description, then the command; the last word of its output is the accuracy
    local description=$1 result
    shift
    echo "$ $*" >&2
    result=$("$@")
    table+=$(printf '%-24s %6s' "$description" "${result##* }")$'\n'
}

compress() { row "$1" "$PYTHON" main_trueobs.py rn8 digits "${@:2}" --noaug; }

table=$(printf '%-24s %6s' "rn8 on digits" "top-1")$'\n'
row "dense, 32 bits" dense
compress "4-bit weights" quant --wbits 4 --save demo/rn8_4w.pth
compress "2:4 sparsity" nmprune --prunen 2 --prunem 4 --save demo/rn8_24.pth
printf '\n%s' "$table"
