"""Write requirements/cpu.txt: every package of the CPU set-up, pinned and hashed, for Linux x86-64 and Python 3.11.

    python tools/lock.py

torchvision, torchaudio and torchcodec are left out on purpose: vLLM's CPU build asks for them, but their ordinary
builds are CUDA builds, which fail to import beside a CPU build of torch, and take vLLM and transformers with them.
torch is pinned by its public version with the hashes of both builds, the CPU one and the ordinary one: pip takes
whichever the machine's package indexes offer, the CPU build first.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements" / "cpu.txt"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "garserve"}
EXTRA_PINS = ["setuptools==78.1.1", "wheel"]

HEADER = """\
# Locked by tools/lock.py for Linux x86-64 and Python 3.11; install with `pip install --no-deps --require-hashes -r`.
# torchvision, torchaudio and torchcodec are left out on purpose (see tools/lock.py).
"""


def resolve(requirements: list[str], *, plain: bool = False) -> list[dict]:
    """Return pip's own resolution. `plain` hides local folders of wheels, so that ordinary builds are found."""
    environment = {**os.environ, "PIP_FIND_LINKS": ""} if plain else dict(os.environ)
    if plain:
        environment["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), *(["--no-deps"] if plain else []), *requirements]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)  # noqa: S603
        return json.loads(report.read_text())["install"]


def sha256(item: dict) -> str:
    """Return the hash of the file that pip chose, reading the file itself where it lies on this machine."""
    info = item["download_info"]
    if known := info.get("archive_info", {}).get("hashes", {}).get("sha256"):
        return known
    return hashlib.sha256(Path(unquote(urlparse(info["url"]).path)).read_bytes()).hexdigest()


def main() -> None:
    """Resolve, and write the lock."""
    pins: dict[str, tuple[str, set[str]]] = {}
    for item in resolve([".[cpu,dev]", *EXTRA_PINS]):
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in LEFT_OUT:
            pins[name] = (item["metadata"]["version"].split("+")[0], {sha256(item)})
    version, hashes = pins["torch"]
    hashes |= {sha256(item) for item in resolve([f"torch=={version}"], plain=True)}
    lines = [HEADER]
    for name, (version, hashes) in sorted(pins.items()):
        options = " \\\n".join(f"    --hash=sha256:{value}" for value in sorted(hashes))
        lines.append(f"{name}=={version} \\\n{options}\n")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("".join(lines))
    print(f"{TARGET.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
