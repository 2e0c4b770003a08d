#!/usr/bin/env bash
# Tries this checkout on other versions of Python: docker/pythons.sh [VERSION …]
#
# For each version (3.10 3.11 3.12 3.13), in a fresh virtual environment: `pip install .`, a network is
# compressed, and the tests of `make quick` run. The interpreter is the system's, pyenv's, or one that
# uv finds or downloads. A version that is not to be had is named at the end, and fails the script.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

interpreter() { # $1: a version; prints a path
    local path
    for path in "$(command -v "python$1")" "$(pyenv root 2>/dev/null)/versions/$1".*/bin/python \
        "$(uv python find "$1" 2>/dev/null || { uv python install "$1" && uv python find "$1"; } 2>/dev/null)"; do
        if "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    return 1
}

try() { # $1: a version, $2: its interpreter
    local root=$PWD file
    mkdir "$work/$1"
    cd "$work/$1"
    "$2" -m venv venv
    mkdir checkout
    git -C "$root" ls-files -z | tar c -C "$root" --null --files-from - | tar x -C checkout
    venv/bin/python -m pip install --quiet ./checkout
    venv/bin/trueobs compress rn8 digits quant --wbits 4 --noaug # not in the checkout
    cd checkout
    for file in requirements*.txt; do ../venv/bin/python -m pip install --quiet -r "$file"; done
    OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -m "not gpu" -n 2 @tests/quick.txt
}

results='' failed=0
[ $# -gt 0 ] || set -- 3.10 3.11 3.12 3.13
for version in "$@"; do
    echo "--- Python $version"
    if ! python=$(interpreter "$version"); then
        results+="Python $version: no interpreter to be had"$'\n' failed=1
        continue
    fi
    "$python" --version
    if bash -c "set -euo pipefail; work=$work; $(declare -f try); try $version $python"; then
        results+="Python $version: passed"$'\n'
    else
        results+="Python $version: FAILED"$'\n' failed=1
    fi
    rm -rf "${work:?}/$version"
done
printf '%s' "$results"
exit $failed
