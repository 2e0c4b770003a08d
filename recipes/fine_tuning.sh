#!/usr/bin/env bash
# Quantised against pruned at equal size, fine-tuned (Kuzmin et al., arXiv 2307.02973, section 5):
# b-bit weights and FP16 weights of sparsity 1 − b/16, first and last layer at 8 bits or half of
# their weights; and, for comparison, OBQ and ExactOBS without training, batch-norm tuned.
# Finished steps are not repeated.
# Usage: recipes/fine_tuning.sh MODEL DATASET [common options]
#   BITS="8 4 3 2"   SEEDS="0"   STUDY=plots_data/fine_tuning, where the trained networks go
#   TRAIN="--max-epochs 20 --batch-size 256 …", options of train-compressed for both
#   TRAIN_QUANTISED, TRAIN_PRUNED, the same for one of them
source "$(dirname "$0")/common.sh"

BITS=${BITS:-"8 4 3 2"} STUDY=${STUDY:-plots_data/fine_tuning}
TRAIN=${TRAIN:-"--max-epochs 3 --batch-size 64"}

study() {  # study COMMAND ARGS…: a command of the study on MODEL DATASET
    PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m pruning_vs_quantization.main "$1" \
        --architecture "${MODEL}_quantized" --dataset "$DATASET" "${@:2}"
}

options="$MODEL $DATASET ${OPTIONS[*]-}"
if [ -e "$OUT/fine_tuning.options" ] && [ "$(cat "$OUT/fine_tuning.options")" != "$options" ]; then
    echo "error: $OUT: made with $(cat "$OUT/fine_tuning.options"); name another folder, OUT=…" >&2
    exit 2
fi
echo "$options" > "$OUT/fine_tuning.options"

seed=0 weights=() training=()  # the common options that training has, too
set -- ${OPTIONS[@]+"${OPTIONS[@]}"}
while [ $# -gt 1 ]; do
    case $1 in
        --weights) weights=("$1" "$2"); shift ;;
        --image-size | --device) training+=("$1" "$2"); shift ;;
        --datapath) training+=(--images-dir "$2"); shift ;;
        --workers) training+=(--num-workers "$2"); shift ;;
        --seed) seed=$2; shift ;;
    esac
    shift
done
training+=(${weights[@]+"${weights[@]}"})

missing() {  # missing FILE: whether it must be made
    if [ -e "$1" ]; then echo "$1: done already" >&2; return 1; fi
}

tuned() {  # tuned METHOD BITS FILE MILD: first and last layer from MILD, tune, record
    local name=${3%.pth} top
    if missing "${name}_bnt.json"; then
        study first-last "$3" "$4" --save "${name}_ends.pth" \
            ${weights[@]+"${weights[@]}"} >&2
        make_file post_proc.py "${name}_ends.pth" --bnt --save "${name}_bnt.pth"
    fi
    top=$(sed -n 's/^  "top1": \([0-9.]*\),\{0,1\}$/\1/p' "${name}_bnt.json")
    record "$1" "$2" "$2 bits" "$top"
}

obq() {  # obq BITS: make the file if it is missing
    local file=$OUT/${TAG}_w$1.pth
    if missing "$file"; then make_file main_trueobs.py quant --wbits "$1" --save "$file"; fi
}

exactobs() {  # exactobs BITS SPARSITY
    local folder=$OUT/models_size$1
    if missing "$folder/$TAG.json"; then
        make_file main_trueobs.py unstr --sparse-dir "$folder" --min-sparsity "$2" --max-sparsity "$2"
    fi
}

level() {  # level BITS: the file of a database with one level
    echo "$OUT/models_size$1/${TAG}_$(awk "BEGIN { printf \"%04.0f\", 1e4 * (1 - $1 / 16) }").pth"
}

for bits in 8 $BITS; do
    obq "$bits"
    exactobs "$bits" "$(awk "BEGIN { print 1 - $bits / 16 }")"
done
for bits in $BITS; do
    tuned OBQ "$bits" "$OUT/${TAG}_w$bits.pth" "$OUT/${TAG}_w8.pth"
    tuned ExactOBS "$bits" "$(level "$bits")" "$(level 8)"
done
for bits in $BITS; do
    for seed in ${SEEDS:-$seed}; do
        common=(train-compressed --no-act-quant --reestimate-bn-stats --seed "$seed" --out "$STUDY")
        study "${common[@]}" --n-bits "$bits" $TRAIN ${TRAIN_QUANTISED:-} \
            ${training[@]+"${training[@]}"} >&2
        study "${common[@]}" --no-weight-quant --prune-method zhu_gupta \
            --s-f "$(awk "BEGIN { print 1 - $bits / 16 }")" $TRAIN ${TRAIN_PRUNED:-} \
            ${training[@]+"${training[@]}"} >&2
    done
done
study table --untrained "$RESULTS" --out "$STUDY"
