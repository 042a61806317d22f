#!/bin/sh
# Print the path of a Python of one of these versions that can make virtual environments; fail silently where
# there is none.
#
#     sh tools/find-python.sh "3.11 3.12" [PATH]
#
# The versions are tried in this order. Where a PATH is given, only that is tried.
runs() {
    "$1" - "$2" 2>/dev/null <<'CODE'
import ensurepip, sys, venv
sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())
CODE
}

if [ -n "${2:-}" ]; then
    runs "$2" "$1" && command -v "$2"
    exit
fi
for version in $1; do
    for candidate in "python$version" python3 python; do
        if runs "$candidate" "$version"; then
            command -v "$candidate"
            exit 0
        fi
    done
done
exit 1
