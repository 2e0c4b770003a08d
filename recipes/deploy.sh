#!/usr/bin/env bash
# A smaller and faster network, measured: 8-bit weights and activations, and channels cut until it is
# 1.5, 2 and 3 times faster than 8 bits alone. Levels are chosen by seconds measured on this machine,
# solved anew, exported, and measured again in the same runtime. "exported" in the table is the ONNX
# file there, "solved anew" the same network in PyTorch, at the speed that was predicted. A target
# that is out of reach is skipped with a line that says so.
# Usage: recipes/deploy.sh MODEL DATASET [common options]
# RUNTIME=openvino: instead of ONNX Runtime, whose integer layers need residual sums rounded, too.
# SEARCH=1: with the search; GRID has options of the sparsity grid.
source "$(dirname "$0")/common.sh"

KIND=struct_8w8a RUNTIME=${RUNTIME:-ort} TARGETS=${TARGETS:-"1.5 2 3"} GRID=${GRID:---delta-sparse 0.15}
SUMS=--int8-sums NAME="ONNX Runtime"
if [ "$RUNTIME" = openvino ]; then
    SUMS= NAME=OpenVINO
fi
STORE=(--prefix "$OUT" --score_path "$OUT/scores")
TIMINGS=$OUT/scores/${TAG}_${KIND}_timings.txt
PROFILES=()

deploy() {  # deploy METHOD TARGET SCRIPT OPTIONS…: choose levels, solve anew, export, measure, record
    local output profile file predicted top speed
    output=$(run "$3" "$2" "$KIND" --constr timingsq --timings "$TIMINGS" "${@:4}") || {
        echo "$1, ${2}x: skipped" >&2
        return 0
    }
    profile=$(sed -n 's/^profile //p' <<< "$output")
    predicted=$(sed -n 's/^reached //p' <<< "$output")
    file=${profile%.txt}
    top=$(top1 post_proc.py "$profile" --database "$KIND" --prefix "$OUT" --resolve --save "$file.pth")
    record "$1, solved anew" "$2" "$predicted" "$top"
    output=$(run export.py "$file.pth" --to "$file.onnx" $SUMS --measure)
    echo "$output" >&2
    speed=$(awk -F ' *[|] *' -v name="$NAME, exported" '$2 == name && $3 == 1 && $4 == 1 { print $6 + 0 }' <<< "$output")
    top=$(awk -F ' *[|] *' -v name="$NAME" '$2 == name { print $3 + 0 }' <<< "$output")
    record "$1, exported" "$2" "$speed" "$top"
    PROFILES+=("$profile")
}

make_file main_trueobs.py struct --sparse-dir "$OUT/models_struct" $GRID
for level in "$OUT/models_struct/${TAG}"_[0-9][0-9][0-9][0-9].pth; do  # 8 bits lose nothing to OBQ
    make_file main_trueobs.py quant --wbits 8 --abits 8 --order nearest --load "$level" \
        --save "$OUT/models_$KIND/$(basename "$level")"
done
make_file database.py "$KIND" squared "${STORE[@]}"
make_file database.py "$KIND" timings "${STORE[@]}" --runtime "$RUNTIME" $SUMS
dense
for times in $TARGETS; do
    target=$(awk -v times="$times" '$2 == "dense" { dense += $1 } $2 == "0000" { bits += $1 }
        END { printf "%.3g", times * dense / bits }' "$TIMINGS")
    deploy uniform "$target" recipes/uniform.py --prefix "$OUT"
    deploy DP "$target" spdy.py --dp --errors squared "${STORE[@]}"
    if [ "${SEARCH:-0}" = 1 ]; then
        deploy search "$target" spdy.py --errors squared "${STORE[@]}"
    fi
done
report --no-paper --cost timingsq ${PROFILES[@]+--profiles "${PROFILES[@]}"}
