#!/usr/bin/env bash
# The package as others get it: build the sdist and from that the wheel, install it into an empty environment, and run README.md's example there.
# `bash .ci/package.sh [PYTHON]`; needs the package index, and about 2 GB of disk for a while.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=$(command -v "${1:-.venv/bin/python}")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
case $python in /*) ;; *) python=$root/$python ;; esac

# what git follows or would follow, so that nothing that happens to lie here gets in
git ls-files -z -co --exclude-standard | (while IFS= read -rd '' f; do [[ -e $f ]] && printf '%s\0' "$f"; done) | tar --null -T - -cf - | (mkdir "$work/source" && tar -xf - -C "$work/source")

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q --disable-pip-version-check 'setuptools>=64' wheel
(cd "$work/source" && "$work/build/bin/python" -c 'from setuptools.build_meta import build_sdist; build_sdist("../dist")') >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
"$work/build/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$work/dist" "$work"/dist/*.tar.gz
(cd "$work/dist" && ls -l | awk 'NR > 1 {print "  " $9, $5 " bytes"}')

"$python" - "$work" <<'EOF'
import sys, tarfile, zipfile
from pathlib import Path
work = Path(sys.argv[1])
(sdist,), (wheel,) = ((work/"dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
inside = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
ours = {p.relative_to(work/"source").as_posix() for p in (work/"source"/"samsde").rglob("*") if p.suffix in (".py", ".csv") or p.name == "py.typed"}
if packed != ours: sys.exit(f"the wheel lacks {sorted(ours - packed)}, and has {sorted(packed - ours)} beside the library")
if missing := (ours | {"settings.ini", "constraints.txt", "README.md", "LICENSE", "setup.py", "pyproject.toml"}) - inside: sys.exit(f"the sdist lacks {sorted(missing)}")
EOF

"$python" -m venv "$work/empty"
"$work/empty/bin/python" -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt "$work"/dist/*.whl
cd "$work"  # nothing of the working copy can be imported here
"$work/empty/bin/python" -m pip check --disable-pip-version-check
"$work/empty/bin/samsde" reproduce --list >/dev/null
"$work/empty/bin/python" "$root/.ci/example.py" "$root/README.md"
