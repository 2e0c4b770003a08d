# Sourced by the non-uniform recipes, which set KIND, CONSTR and TARGETS. For each target: the
# uniform level, the dynamic programme and the SPDY search; each batch-norm tuned, as in the paper,
# and with all layers solved anew in order of execution instead. SEARCH=0 leaves out the search,
# RESOLVE=0 what is solved anew; GRID has options of the sparsity grid, as in
# GRID="--delta-sparse 0.2"; TIMINGS is the file for CONSTR=timingsq.
PREFIX=$OUT
SCORES=$OUT/scores
GRID=${GRID:-}
PROFILES=()

nonuniform() {
    local budget=(--constr "$CONSTR" --prefix "$PREFIX") target
    if [ -n "${TIMINGS:-}" ]; then
        budget+=(--timings "$TIMINGS")
    fi
    make_file database.py "$KIND" loss --prefix "$PREFIX" --score_path "$SCORES"
    dense
    for target in $TARGETS; do
        choose uniform "$target" recipes/uniform.py
        choose DP "$target" spdy.py --dp --score_path "$SCORES"
        if [ "${SEARCH:-1}" = 1 ]; then
            choose search "$target" spdy.py --score_path "$SCORES"
        fi
    done
    report ${NO_PAPER:-} --cost "$CONSTR" --scores "$SCORES/${TAG}_${KIND}_loss.txt" --profiles "${PROFILES[@]}"
}

choose() {  # choose METHOD TARGET SCRIPT OPTIONS…: make a profile, stitch, tune or solve anew, record
    local output profile reached stitched top
    output=$(run "$3" "$2" "$KIND" "${@:4}" "${budget[@]}")
    echo "$output" >&2
    profile=$(sed -n 's/^profile //p' <<< "$output")
    reached=$(sed -n 's/^reached //p' <<< "$output")
    stitched=("$profile" --database "$KIND" --prefix "$PREFIX")
    top=$(tuned "${stitched[@]}")
    record "$1" "$2" "$reached" "$top"
    if [ "${RESOLVE:-1}" = 1 ]; then
        top=$(top1 post_proc.py "${stitched[@]}" --resolve --remask)
        record "$1, solved anew" "$2" "$reached" "$top"
    fi
    PROFILES+=("$profile")
}
