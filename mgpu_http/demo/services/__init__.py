"""The stand-in services, by the names that `config/consumers.yaml` calls them by."""

from collections.abc import Mapping

from mgpu_http.demo.services.comfyui import ComfyUI
from mgpu_http.demo.services.common import Service
from mgpu_http.demo.services.mvoice import MVoice
from mgpu_http.demo.services.ollama import Ollama
from mgpu_http.demo.services.whisper import WhisperServer

SERVICES: Mapping[str, type[Service]] = {
    "mvoice": MVoice,
    "whisper-server": WhisperServer,
    "ollama": Ollama,
    "comfyui": ComfyUI,
}
