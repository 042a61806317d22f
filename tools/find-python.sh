#!/bin/sh
# Print the path of a Python that the project runs on (3.11), or say that one is needed.
# SparseML 1.8 does not run on 3.12 and later; current versions of what constraints.txt holds need 3.11.
for candidate in "${PYTHON:-}" python3.11 python3 python; do
    [ -n "$candidate" ] || continue
    "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' \
        2>/dev/null || continue
    command -v "$candidate"
    exit 0
done
echo "Python 3.11 is needed, with its venv module. Install it, or name it: make PYTHON=/path/to/python3.11" >&2
exit 1
