#!/usr/bin/env bash
# Unstructured sparsity at 2×, 3× and 4× fewer FLOPs (OBC, figure 2 and table 1).
# Usage: recipes/unstructured.sh MODEL DATASET [common options]      SEARCH=0: without the search
source "$(dirname "$0")/common.sh"
source "$ROOT/recipes/nonuniform.sh"

KIND=unstr CONSTR=flops TARGETS=${TARGETS:-"2 3 4"}
make_file main_trueobs.py unstr --sparse-dir "$PREFIX/models_unstr" $GRID
nonuniform
