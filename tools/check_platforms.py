"""Check that all of the base can be installed on every platform and Python that it is for, from here.

    python tools/check_platforms.py                       all of them (minutes each)
    python tools/check_platforms.py --python 3.13 --platform macos-arm64

For each, pip resolves the extra ``dev``, which holds all others but ``neuralmagic``, with the versions of
constraints.txt, and takes only what has a wheel for it. Nothing is installed or run. The one package without
a wheel (ANTLR's runtime, pure Python) is built first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_GLIBC = range(17, 40)  # 2.35 is Ubuntu 22.04's, from which on OpenVINO has wheels for aarch64
_MACOS = range(11, 16)
PLATFORMS = {
    "linux-x86_64": [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC],
    "linux-aarch64": [f"manylinux_2_{minor}_aarch64" for minor in _GLIBC],
    "macos-arm64": [f"macosx_{major}_0_{kind}" for major in _MACOS for kind in ("arm64", "universal2")],
}
_PURE = "antlr4-python3-runtime==4.9.3"


def resolve(python: str, platform: str, wheels: Path) -> str:
    """How many packages pip would install; or, after ``cannot``, its reasons.

    Args:
        python: version, such as ``3.13``.
        platform: one of `PLATFORMS`.
        wheels: folder with wheels of what has none on the index.
    """
    report = wheels / f"{platform}-{python}.json"
    tags = [word for tag in PLATFORMS[platform] for word in ("--platform", tag)]
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check",
            "--ignore-installed", "--target", str(wheels / "none"), "--only-binary=:all:", *tags,
            "--python-version", python, "--find-links", str(wheels), "--report", str(report),
            "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[dev]",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        return "cannot: " + " ".join(" ".join(lines).split())
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    return f"{len(installed)} packages"


def main() -> int:
    """Print a line for each platform and Python; 1 where one cannot have all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--platform", nargs="+", choices=PLATFORMS, default=list(PLATFORMS))
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, _PURE]
        subprocess.run(pip, check=True)
        for platform in options.platform:
            for python in options.python:
                found = resolve(python, platform, Path(folder))
                failed |= found.startswith("cannot")
                print(f"{platform} {python}: {found}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
