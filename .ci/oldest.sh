#!/usr/bin/env bash
# The tests with the oldest supported versions (constraints-oldest.txt), in an environment that is thrown away: `bash .ci/oldest.sh [PYTHON 3.11]`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "no test of the oldest versions: they have no builds for this Python"; exit 0; }
oldest=$(mktemp -d); trap 'rm -rf "$oldest"' EXIT

"$python" -m venv "$oldest"
"$oldest/bin/python" -m pip install -q --no-compile --disable-pip-version-check -c constraints-oldest.txt -e . pytest hypothesis
"$oldest/bin/python" - <<'EOF'
import re
from configparser import ConfigParser
from importlib.metadata import version
# settings.ini must not allow what was not tested: each lower bound is the version that is installed here, torch's excepted
settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
for name, least in re.findall(r"(\S+?)>=([\d.]+)", settings["DEFAULT"]["requirements"]):
    found = version(name).partition("+")[0]
    strip = lambda v: re.sub(r"(\.0)+$", "", v)
    if name != "torch" and strip(found) != strip(least): raise SystemExit(f"settings.ini allows {name} {least}, but constraints-oldest.txt has {found}")
EOF
"$oldest/bin/python" -m pytest tests -q -p no:cacheprovider -W ignore::DeprecationWarning
