#!/usr/bin/env bash
exec "${PYTHON:-python}" "$(dirname "$0")/__main__.py" deploy "$@"
