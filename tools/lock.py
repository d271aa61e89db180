"""Write the lock of the CPU set-up: every package pinned and hashed, for Linux x86-64 and Python 3.11.

    python tools/lock.py

torchvision, torchaudio and torchcodec are left out on purpose: vLLM's CPU build asks for them, but their ordinary
builds are CUDA builds, which fail to import beside a CPU build of torch, and take vLLM and transformers with them.
requirements/torch-cpu.txt pins the CPU build of torch, to be installed first where it is to be had;
requirements/cpu.txt pins everything, torch by its public version with the hashes of both builds, the CPU one and the
ordinary one. (One file would not do: with hashes, pip prefers a file whose hash its index names over the CPU build.)
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
FOLDER = ROOT / "requirements"
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
    for item in resolve([".[cpu,dev,onnx,parquet]", *EXTRA_PINS]):
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in LEFT_OUT:
            pins[name] = (item["metadata"]["version"].split("+")[0], {sha256(item)})
    version, hashes = pins["torch"]
    write("torch-cpu.txt", {"torch": (f"{version}+cpu", set(hashes))})
    hashes |= {sha256(item) for item in resolve([f"torch=={version}"], plain=True)}
    write("cpu.txt", pins)


def write(name: str, pins: dict[str, tuple[str, set[str]]]) -> None:
    """Write one requirements file."""
    lines = [HEADER]
    for package, (version, hashes) in sorted(pins.items()):
        options = " \\\n".join(f"    --hash=sha256:{value}" for value in sorted(hashes))
        lines.append(f"{package}=={version} \\\n{options}\n")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text("".join(lines))
    print(f"{name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
