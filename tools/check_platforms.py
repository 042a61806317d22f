"""Check that the base can be installed on every platform and Python that it is for, without having them.

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
_OLD = {"x86_64": ["manylinux1", "manylinux2010", "manylinux2014"], "aarch64": ["manylinux2014"]}
PLATFORMS = {
    "linux-x86_64": ("linux", "Linux", "x86_64"),
    "linux-aarch64": ("linux", "Linux", "aarch64"),
    "macos-arm64": ("darwin", "Darwin", "arm64"),
}
_PURE = "antlr4-python3-runtime==4.9.3"
# With --platform pip takes the wheels of another platform, but reads the conditions of requirements as on
# this one. There is no option for that; so the function of its own that says where it is gets another answer.
_PIP = """
import json, sys
from pip._vendor.packaging import markers
own, other = markers.default_environment, json.loads(sys.argv.pop(1))
markers.default_environment = lambda: {**own(), **other}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def tags(platform: str) -> list[str]:
    """The tags of wheels that a platform takes."""
    system, _, machine = PLATFORMS[platform]
    if system == "darwin":
        return [f"macosx_{major}_0_{kind}" for major in _MACOS for kind in (machine, "universal2")]
    return [f"{name}_{machine}" for name in (*_OLD[machine], *(f"manylinux_2_{minor}" for minor in _GLIBC))]


def conditions(python: str, platform: str) -> dict[str, str]:
    """What the conditions of requirements (PEP 508) see."""
    system, name, machine = PLATFORMS[platform]
    return {
        "sys_platform": system, "platform_system": name, "platform_machine": machine,
        "python_version": python, "python_full_version": f"{python}.0",
    }  # fmt: skip


def resolve(python: str, platform: str, wheels: Path) -> str:
    """How many packages pip would install; or, after ``cannot``, its reasons.

    Args:
        python: version, such as ``3.13``.
        platform: one of `PLATFORMS`.
        wheels: folder with wheels of what has none on the index.
    """
    report = wheels / f"{platform}-{python}.json"
    options = [word for tag in tags(platform) for word in ("--platform", tag)]
    done = subprocess.run(
        [
            sys.executable, "-c", _PIP, json.dumps(conditions(python, platform)),
            "install", "--dry-run", "--disable-pip-version-check", "--progress-bar=off",
            "--ignore-installed", "--target", str(wheels / "none"), "--only-binary=:all:", *options,
            "--python-version", python, "--find-links", str(wheels), "--report", str(report),
            "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[dev]",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}".partition("The conflict is caused by:")[2] or done.stderr
        lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
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
