# Sourced by the non-uniform recipes. KIND, CONSTR, TARGETS: for each target, the uniform level, the
# dynamic programme and the SPDY search, all batch-norm tuned. SEARCH=0 leaves the search out.
PREFIX=$OUT
SCORES=$OUT/scores

nonuniform() {
    run database.py "$KIND" loss --prefix "$PREFIX" --score_path "$SCORES"
    for target in $TARGETS; do
        percent=$("$PYTHON" -c "print(round(100 * $target))")
        profile() { echo "$OUT/${TAG}_${KIND}_${percent}x_$1.txt"; }
        choose uniform "$target" "$(profile uniform)" "$("$PYTHON" "$ROOT/recipes/uniform.py" \
            "$MODEL" "$DATASET" "$target" "$KIND" --constr "$CONSTR" --prefix "$PREFIX" \
            --output "$(profile uniform)" "${OPTIONS[@]}")"
        choose DP "$target" "$(profile dp)" "$(search "$target" --dp)"
        if [ "${SEARCH:-1}" = 1 ]; then
            choose search "$target" "$(profile spdy)" "$(search "$target")"
        fi
    done
    report --scores "$SCORES/${TAG}_${KIND}_loss.txt" --profiles "$OUT/${TAG}_${KIND}_"*x_*.txt
}

search() {  # search TARGET [--dp]
    run spdy.py "$@" "$KIND" --constr "$CONSTR" --prefix "$PREFIX" --score_path "$SCORES"
}

choose() {  # choose METHOD TARGET PROFILE OUTPUT: stitch a profile, tune, evaluate, record
    local reached
    reached=$(sed -n 's/.*reached \([0-9.]*\)x.*/\1/p' <<< "$4")
    record "$1" "$2" "$reached" \
        "$(run post_proc.py "$3" --database "$KIND" --prefix "$PREFIX" --bnt | top1)"
}
