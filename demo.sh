#!/usr/bin/env bash
# Compress rn8, a small network that ships with its weights, on digits: `make demo`. No download, no GPU.
exec "${PYTHON:-python}" "$(dirname "$0")/recipes/demo.py" "$@"
