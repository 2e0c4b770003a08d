#!/usr/bin/env bash
# Runs every tool that has no record yet, each in an environment of its own.
#   benchmarks/peers/run.sh WEIGHTS CIFAR10 WORKFOLDER [PATTERN]
# WEIGHTS: the dense ResNet-20; CIFAR10: as --datapath of the toolkit; WORKFOLDER: for environments,
# the problem and logs; PATTERN: only methods that match, as in 'brevitas-*'. The toolkit's own
# environment must exist (make). A tool that fails leaves a log and no record; the others go on.
set -euo pipefail
weights=$(realpath "$1") images=$(realpath "$2") pattern=${4:-*}
mkdir -p "$3" && work=$(realpath "$3")
cd "$(dirname "$0")/../.."
here=benchmarks/peers own=.venv/bin/python
export OMP_NUM_THREADS=1

[ -e "$work/problem.pt" ] || $own -m benchmarks.peers.problem \
  --weights "$weights" --datapath "$images" --out "$work/problem.pt"

$own -m benchmarks.peers.table --todo | while read -r package method cell; do
  [[ $method == $pattern ]] || continue
  python=$own
  where=(--weights "$weights" --datapath "$images")
  if [ "$package" != trueobs ]; then
    where=() python=$work/$package/bin/python
    if [ ! -e "$work/$package/.installed" ]; then
      python3 -m venv --clear "$work/$package"
      "$python" -m pip install --quiet -r "$here/$package.txt" && touch "$work/$package/.installed"
    fi
  fi
  echo "$method $cell"
  nice -n 19 "$python" -m benchmarks.peers.compress "$method" "$cell" --problem "$work/problem.pt" \
    --out "$here/records" "${where[@]}" < /dev/null > "$work/${method}_${cell/:/}.log" 2>&1 ||
    echo "  failed, see $work/${method}_${cell/:/}.log"
done
$own -m benchmarks.peers.table
