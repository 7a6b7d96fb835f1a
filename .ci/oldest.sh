#!/usr/bin/env bash
# The tests with the oldest supported versions (constraints-oldest.txt), in an environment that is thrown away: `bash .ci/oldest.sh`;
# `bash .ci/oldest.sh install FOLDER` makes the environment alone, and `bash .ci/oldest.sh test FOLDER` has the tests.
# PYTHON=… picks the Python; without it that is the oldest that settings.ini allows, if it is there, or else that of .venv; 3.10 and 3.11 have builds of all.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# == 0 ]]; then
  oldest=$(mktemp -d); trap 'rm -rf "$oldest"' EXIT
  bash .ci/oldest.sh install "$oldest"
  bash .ci/oldest.sh test "$oldest"
  exit
fi
oldest=$2

if [[ $1 == test ]]; then
  [[ -x $oldest/bin/python ]] || exit 0 # the installation said why
  # what stands on files, processes and whole experiments does not depend on the versions of torch and numpy
  left=(tests/test_{experiments,checkpoint,sweep,memory,cli,site,frameworks,real_networks}.py)
  files=(); for file in tests/test_*.py; do [[ " ${left[*]} " == *" $file "* ]] || files+=("$file"); done
  exec "$oldest/bin/python" -m pytest -n auto --dist worksteal -q -p no:cacheprovider -W ignore::DeprecationWarning "${files[@]}"
fi

least=$(sed -n 's/^min_python *= *//p' settings.ini)
export PYENV_VERSION=$least # where pyenv keeps the Pythons
works() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
python=${PYTHON:-python$least}
works "$python" || python=.venv/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info[:2] > (3, 11))' || { echo "no test of the oldest versions: they have no builds for $("$python" -V)"; exit 0; }

"$python" -m venv "$oldest"
install() { "$oldest/bin/python" -m pip install -q --no-compile --no-cache-dir --disable-pip-version-check -c "$1" -e . pytest pytest-xdist hypothesis; }
# torch's old releases carry CUDA, 3 GB: where those cannot be had, the rest is tested with the torch of constraints.txt, and that is said
if ! install constraints-oldest.txt; then
  { grep -v '^torch==' constraints-oldest.txt; grep '^torch==' constraints.txt; } >"$oldest/constraints.txt"
  install "$oldest/constraints.txt"
  echo "NOT TESTED: the oldest torch, which could not be installed"
fi
"$oldest/bin/python" - <<'EOF2'
import re, sys
from configparser import ConfigParser
from importlib.metadata import version
# settings.ini must not allow what was not tested: each lower bound is the version that is installed here
settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
strip = lambda v: re.sub(r"(\.0)+$", "", v.partition("+")[0])
found = {name: version(name) for name, _ in re.findall(r"(\S+?)>=([\d.]+)", settings["DEFAULT"]["requirements"])}
print("oldest versions: Python", sys.version.split()[0], *(f"{name} {v}" for name, v in found.items()))
for name, least in re.findall(r"(\S+?)>=([\d.]+)", settings["DEFAULT"]["requirements"]):
    if strip(found[name]) != strip(least) and name != "torch": raise SystemExit(f"settings.ini allows {name} {least}, but {found[name]} was installed")
EOF2
