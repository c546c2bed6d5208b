"""What `mgpu init` finds: answers of each known service, and stand-ins for the host of the design.

`ANSWERS` restates what the services were recorded, or are documented, to answer to GETs. The
stand-ins are a process each, as `python -m tests.support.discovered NAME PORT`:

    with design_host(tmp_path) as host:
        host.ports["comfyui"]
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from mgpu_effects.discovery import Answer

ROOT = Path(__file__).parents[2]
READY_S = 20

# ------------------------------------------------------------------------------- what they answer

LLAMA = {"server": "llama.cpp", "content-type": "application/json; charset=utf-8"}
UVICORN = {"server": "uvicorn", "content-type": "application/json"}
WHISPER = {"server": "whisper.cpp", "content-type": "text/plain"}
FLASK = {"server": "Werkzeug/3.1.9 Python/3.11.7", "content-type": "application/json"}
AIOHTTP = {"server": "Python/3.11 aiohttp/3.14.5", "content-type": "application/json"}
DETAIL = {"detail": "Not Found"}
NO_FILE = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
ONE_MODEL = {
    "models": [{"name": "gemma.gguf", "model": "gemma.gguf", "type": "model"}],
    "object": "list",
    "data": [
        {
            "id": "gemma.gguf",
            "object": "model",
            "owned_by": "llamacpp",
            "meta": {"n_ctx": 1024, "size": 246587904},
        }
    ],
}
ROUTED = {
    "data": [
        {
            "id": "broken",
            "object": "model",
            "owned_by": "llamacpp",
            "status": {"value": "unloaded"},
        },
        {"id": "gemma-a", "object": "model", "owned_by": "llamacpp", "status": {"value": "loaded"}},
    ],
    "object": "list",
}
COMFYUI = {
    "system": {"os": "posix", "comfyui_version": "0.3.64", "pytorch_version": "2.13.0+cpu"},
    "devices": [{"name": "cpu", "type": "cpu", "vram_total": 25276502016}],
}
OPTIONS = {"samples_save": True, "samples_format": "png", "sd_model_checkpoint": "v1-5.safetensors"}


def openapi(title: str, version: str, *paths: str) -> dict[str, Any]:
    return {
        "info": {"title": title, "version": version},
        "paths": {path: {"get": {}} for path in paths},
    }


def entry(name: str, owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner}]}


@dataclass
class Known:
    """What a service answers by path; to all others `missing`, with 404."""

    preset: str
    headers: dict[str, str]
    answers: dict[str, Any] = field(default_factory=dict)
    missing: Any = ""
    status: int = 404
    version: str | None = None
    models: tuple[str, ...] = ()

    def answer(self, path: str) -> "Answer":
        from mgpu_effects.discovery import Answer  # the stand-ins start without it

        found = path in self.answers
        body = self.answers[path] if found else self.missing
        return Answer(status=200 if found else self.status, headers=self.headers, body=body)


ANSWERS = {
    "comfyui": Known(
        "comfyui",
        AIOHTTP,
        {"/system_stats": COMFYUI, "/": "<html>", "/models": []},
        version="0.3.64",
    ),
    "llama-server": Known(
        "llama-server",
        LLAMA,
        {"/health": {"status": "ok"}, "/models": ONE_MODEL, "/v1/models": ONE_MODEL},
        NO_FILE,
        models=("gemma.gguf",),
    ),
    "llama-server that loads": Known("llama-server", LLAMA, {}, LOADING, 503),
    "llama-server with a key": Known(
        "llama-server", LLAMA, {"/health": {"status": "ok"}}, {"error": {"code": 401}}, 401
    ),
    "llama-router": Known(
        "llama-router",
        LLAMA,
        {"/health": {"status": "ok"}, "/models": ROUTED, "/v1/models": ROUTED},
        NO_FILE,
        models=("broken", "gemma-a"),
    ),
    "llama-router without models": Known(
        "llama-router", LLAMA, {"/models": {"data": [], "object": "list"}}, NO_FILE
    ),
    "whisper-server": Known(
        "whisper-server",
        WHISPER,
        {"/health": {"status": "ok"}, "/": "<html><title>Whisper.cpp Server</title>"},
        "File Not Found (/health)",
    ),
    "whisper-server that loads": Known("whisper-server", WHISPER, {}, "File Not Found (/health)"),
    "faster-whisper-server": Known(
        "faster-whisper-server",
        UVICORN,
        {
            "/health": {"status": "ok"},
            "/openapi.json": openapi(
                "faster-whisper-server", "0.0.3", "/health", "/v1/audio/transcriptions"
            ),
        },
        DETAIL,
        version="0.0.3",
    ),
    "piper": Known(
        "piper",
        FLASK,
        {
            "/": "<!DOCTYPE html><title>Piper Web Server</title>",
            "/info": {
                "last": None,
                "voice": {"language": "en-us", "name": "joe", "num_speakers": 1},
            },
            "/voices": {"joe": {}},
        },
        "<!doctype html><title>404 Not Found</title>",
    ),
    "ollama": Known(
        "ollama",
        {"content-type": "text/plain; charset=utf-8"},
        {
            "/": "Ollama is running",
            "/api/version": {"version": "0.12.3"},
            "/api/tags": {"models": [{"name": "qwen3:8b", "size": 5225388164}]},
            "/v1/models": entry("qwen3:8b", "library"),
        },
        "404 page not found",
        version="0.12.3",
        models=("qwen3:8b",),
    ),
    "koboldcpp": Known(
        "koboldcpp",
        {"server": "ConcedoLlamaForKoboldServer", "content-type": "application/json"},
        {
            "/": "<!DOCTYPE html><title>KoboldAI Lite</title>",
            "/api/extra/version": {"result": "KoboldCpp", "version": "1.102"},
            "/api/version": {"version": "0.7.0"},
            "/api/tags": {"models": [{"name": "koboldcpp", "model": "koboldcpp/gemma:latest"}]},
            "/sdapi/v1/options": {"samples_format": "png", "sd_model_checkpoint": "none"},
            "/v1/models": entry("koboldcpp/gemma", "koboldcpp"),
            "/health": {"status": "ok"},
        },
        {"detail": {"error": "Not Found"}},
        version="1.102",
        models=("koboldcpp/gemma",),
    ),
    "lm-studio": Known(
        "lm-studio",
        {"x-powered-by": "Express", "content-type": "application/json; charset=utf-8"},
        {
            "/api/v1/models": {
                "models": [
                    {
                        "type": "llm",
                        "key": "google/gemma-3-12b",
                        "size_bytes": 8152040448,
                        "loaded_instances": [],
                    }
                ]
            },
            "/v1/models": entry("google/gemma-3-12b", "organization_owner"),
        },
        {"error": "Unexpected endpoint or method. (GET /health)"},
        200,
        models=("google/gemma-3-12b",),
    ),
    "vllm": Known(
        "vllm",
        UVICORN,
        {
            "/health": "",
            "/v1/models": entry("Qwen/Qwen3-8B", "vllm"),
            "/version": {"version": "0.11"},
        },
        DETAIL,
        version="0.11",
        models=("Qwen/Qwen3-8B",),
    ),
    "tabbyapi": Known(
        "tabbyapi",
        UVICORN,
        {
            "/openapi.json": openapi("TabbyAPI", "0.1.0", "/v1/model/load"),
            "/health": {"status": "healthy", "issues": []},
            "/v1/model": {"id": "gemma-exl3", "object": "model", "owned_by": "tabbyAPI"},
        },
        DETAIL,
        models=("gemma-exl3",),
    ),
    "kokoro": Known(
        "kokoro",
        UVICORN,
        {
            "/openapi.json": openapi(
                "Kokoro TTS API", "0.2.4", "/v1/audio/speech", "/dev/captioned_speech"
            ),
            "/health": {"status": "healthy"},
            "/v1/models": entry("kokoro", "kokoro"),
        },
        DETAIL,
        version="0.2.4",
    ),
    "speaches": Known(
        "speaches",
        UVICORN,
        {
            "/openapi.json": openapi("Speaches", "0.8.3", "/api/ps", "/v1/audio/speech"),
            "/health": "OK",
            "/v1/models": entry("Systran/faster-whisper-small", "Systran"),
        },
        DETAIL,
        version="0.8.3",
        models=("Systran/faster-whisper-small",),
    ),
    "speaches, an older one": Known(
        "speaches",
        UVICORN,
        {"/openapi.json": openapi("FastAPI", "0.1.0", "/api/ps", "/v1/audio/speech")},
        DETAIL,
        version="0.1.0",
    ),
    "automatic1111": Known("automatic1111", UVICORN, {"/sdapi/v1/options": OPTIONS}, DETAIL),
    "forge": Known(
        "forge", UVICORN, {"/sdapi/v1/options": {**OPTIONS, "forge_preset": "sd"}}, DETAIL
    ),
}
# Close to a known service, and none.
OTHERS = {
    "another speech server": Known("", UVICORN, {"/health": {"status": "ok"}}, DETAIL),
    "another voice of the same title": Known(
        "", UVICORN, {"/openapi.json": openapi("Kokoro TTS API", "1.0", "/tts")}, DETAIL
    ),
    "another server of models": Known(
        "", UVICORN, {"/v1/models": entry("m", "sglang"), "/models": entry("m", "sglang")}, DETAIL
    ),
    "one that imitates Ollama": Known(
        "", {}, {"/": "", "/api/version": {"version": "0.5"}, "/api/tags": {"models": []}}
    ),
    "a page that answers to everything": Known("", {}, {}, "<!doctype html><div id=root>", 200),
    "JSON of another shape": Known("", {}, {}, [1, "two", None], 200),
    "a number": Known("", {}, {}, 7, 200),
}


# ------------------------------------------------------------------------------ the tests' side

SERVICES = ("mvoice", "whisper-server", "ollama", "comfyui")
MODELS = ("qwen3:8b", "llama3.2:latest")
SS = "LISTEN 0 128 127.0.0.1:{port} 0.0.0.0:* cgroup:/system.slice/whisper-server.service"
DOCKER = """\
#!/bin/sh
case "$1" in
ps) printf '%s\\tpictures\\t127.0.0.1:{port}->8188/tcp, 9000/tcp\\n' {id};;
container) echo running;;
*) echo pictures;;
esac
"""


@dataclass
class DesignHost:
    """`environment` is what `mgpu` is to be run with."""

    directory: Path
    ports: dict[str, int] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """What `--ports` says of it; nothing in mVoice's answers tells that it is one."""
        mvoice = f"mvoice:{self.ports['mvoice']}"
        others = (str(port) for name, port in self.ports.items() if name != "mvoice")
        return ",".join((mvoice, *others))

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "MGPU_SIMULATED_GPU": str(self.directory / "card.json"),
            "STATE_DIRECTORY": str(self.directory / "state"),
        }

    def has_card(self, **holds: int) -> None:
        """Give the host a card of 16 GB on which these services hold so many MiB."""
        used = sum(holds.values())
        card = {"index": 0, "total_mib": 16384, "used_mib": used, "free_mib": 16384 - used}
        rows = [{"index": 0, "pid": self.pids[name], "mib": mib} for name, mib in holds.items()]
        content = {"gpus": [card], "processes": rows}
        (self.directory / "card.json").write_text(json.dumps(content))

    def has_no_card(self) -> None:
        (self.directory / "card.json").write_text(json.dumps({"error": "no_gpu"}))

    def _tool(self, name: str, script: str) -> None:
        file = self.directory / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)

    def has_tools(self) -> None:
        """whisper-server runs as a unit, ComfyUI in a container."""
        listening = SS.format(port=self.ports["whisper-server"])
        self._tool("ss", f"#!/bin/sh\necho '{listening}'\n")
        self._tool("docker", DOCKER.format(port=self.ports["comfyui"], id="c0de" * 16))
        self._tool("podman", "#!/bin/sh\nexit 125\n")


@contextlib.contextmanager
def design_host(directory: Path) -> Iterator[DesignHost]:
    """Run the four services of config/consumers.yaml, on ports that leave room for front ports."""
    host = DesignHost(directory)
    with contextlib.ExitStack() as stack:
        processes = []
        for name in SERVICES:
            host.ports[name] = _port()
            command = [sys.executable, "-m", "tests.support.discovered", name]
            process = subprocess.Popen(
                [*command, str(host.ports[name])], cwd=ROOT, stdout=subprocess.PIPE
            )
            stack.callback(_end, process)
            host.pids[name] = process.pid
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline(), "a stand-in did not start"
        host.has_tools()
        host.has_no_card()
        yield host


def _port() -> int:
    """Give a port that is free, as is the one 10000 above it, and that nobody gets by chance."""
    while True:
        port = random.randrange(11_000, 22_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for one in (port, port + 10_000):
                stack.enter_context(socket.create_server(("127.0.0.1", one)))
            return port


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(READY_S)
    assert process.stdout is not None
    process.stdout.close()


# --------------------------------------------------------------------------- the services' side


def mvoice(app: web.Application) -> None:
    async def speak(request: web.Request) -> web.Response:
        text = (await request.json())["text"]
        return web.json_response({"audio": f"/audio/{text}.wav"})

    async def hear(request: web.Request) -> web.Response:
        return web.json_response({"text": f"{len(await request.read())} bytes"})

    async def sound(request: web.Request) -> web.Response:
        return web.Response(body=b"RIFF", content_type="audio/wav")

    app.add_routes(
        [
            web.get("/health", _says({"status": "ok"})),
            web.post("/tts", speak),
            web.post("/stt", hear),
            web.post("/load", _says({})),
            web.post("/unload", _says({})),
            web.get("/audio/{name}", sound),
        ]
    )


def whisper_server(app: web.Application) -> None:
    async def hear(request: web.Request) -> web.Response:
        form = await request.post()
        sound = form["file"]
        assert isinstance(sound, web.FileField)
        return web.json_response({"text": f" {len(sound.file.read())} bytes\n"})

    async def signed(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "whisper.cpp"

    app.on_response_prepare.append(signed)
    app.add_routes([web.get("/health", _says({"status": "ok"})), web.post("/inference", hear)])


def ollama(app: web.Application) -> None:
    loaded: set[str] = set()

    async def running(_request: web.Request) -> web.Response:
        rows = [{"name": name, "size_vram": 100 << 20} for name in sorted(loaded)]
        return web.json_response({"models": rows})

    async def generate(request: web.Request) -> web.Response:
        order = await request.json()
        (loaded.discard if order.get("keep_alive") == 0 else loaded.add)(order["model"])
        return web.json_response({"model": order["model"], "response": "", "done": True})

    async def chat(request: web.Request) -> web.Response:
        order = await request.json()
        loaded.add(order["model"])
        told = {"role": "assistant", "content": "hello"}
        return web.json_response({"model": order["model"], "message": told, "done": True})

    async def openai(request: web.Request) -> web.Response:
        order = await request.json()
        told = {"message": {"role": "assistant", "content": "hello"}}
        return web.json_response({"model": order["model"], "choices": [told]})

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    tags = {"models": [{"name": name, "size": 5 << 30} for name in MODELS]}
    app.add_routes(
        [
            web.get("/", hello),
            web.get("/api/version", _says({"version": "0.12.3"})),
            web.get("/api/tags", _says(tags)),
            web.get("/api/ps", running),
            web.post("/api/generate", generate),
            web.post("/api/chat", chat),
            web.post("/v1/chat/completions", openai),
        ]
    )


def comfyui(app: web.Application) -> None:
    history: dict[str, Any] = {}

    async def draw(request: web.Request) -> web.Response:
        assert (await request.json())["prompt"]
        identity = f"prompt-{len(history)}"
        image = {"filename": "cat.png", "subfolder": "", "type": "output"}
        history[identity] = {"outputs": {"9": {"images": [image]}}}
        return web.json_response({"prompt_id": identity, "number": 0, "node_errors": {}})

    async def one(request: web.Request) -> web.Response:
        identity = request.match_info["id"]
        return web.json_response({identity: history[identity]} if identity in history else {})

    async def picture(_request: web.Request) -> web.Response:
        return web.Response(body=b"PNG", content_type="image/png")

    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<title>ComfyUI</title>", content_type="text/html")

    app.add_routes(
        [
            web.get("/", page),
            web.get("/system_stats", _says(COMFYUI)),
            web.get("/queue", _says({"queue_running": [], "queue_pending": []})),
            web.get("/prompt", _says({"exec_info": {"queue_remaining": 0}})),
            web.post("/prompt", draw),
            web.get("/history/{id}", one),
            web.get("/view", picture),
            web.post("/free", _says({})),
        ]
    )


def _says(body: Any) -> Any:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


async def main(name: str, port: int) -> None:
    app = web.Application()
    {"mvoice": mvoice, "whisper-server": whisper_server, "ollama": ollama, "comfyui": comfyui}[
        name
    ](app)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
