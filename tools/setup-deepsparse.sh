#!/bin/sh
# Make an environment of its own for DeepSparse, which needs other versions than the rest and an older Python.
#
#     sh tools/setup-deepsparse.sh FOLDER REQUIREMENT
#
# It does nothing where the folder is whole, and begins anew where an earlier call was interrupted. Where DeepSparse
# cannot be had it says so in one line, and that is no error: it is one engine of several.
folder=$1 requirement=$2 done=$1/.installed
[ "$(cat "$done" 2>/dev/null)" = "$requirement" ] && exit 0
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "DeepSparse is left out: it exists for Linux on x86-64 only. The other engines run without it."
    exit 0
fi
# Of what it needs, current versions exist for 3.11; 3.12 has none of DeepSparse.
if ! python=$(sh "$(dirname "$0")/find-python.sh" "3.11 3.10 3.9 3.8" "${DEEPSPARSE_PYTHON:-}"); then
    echo "DeepSparse is left out: it needs Python 3.8 to 3.11, with its venv module. The other engines run without" \
        "it; to have it, install such a Python, or name it: make setup DEEPSPARSE_PYTHON=/path/to/python3.11"
    exit 0
fi
if command -v flock >/dev/null; then # a second call waits for the first
    exec 9>"$folder.lock"
    flock 9
    [ "$(cat "$done" 2>/dev/null)" = "$requirement" ] && exit 0
fi
echo "Installing DeepSparse into $folder with $python (half a GB)"
rm -rf "$folder"
"$python" -m venv "$folder" || exit 1
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$requirement" || exit 1
echo "$requirement" >"$done"
