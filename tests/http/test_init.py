"""`mgpu init` on the host of the design, and the whole broker with what it wrote, unedited."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu_effects.config_file import load_settings
from mgpu_effects.units import units
from mgpu_http.cli import main
from tests.support.dev_http import free_port
from tests.support.discovered import DesignHost, design_host
from tests.support.facade import LIMIT_S, Address

JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=x"
SOUND = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
HEARD = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'


def init(host: DesignHost, file: Path):
    """Run `mgpu init` as a user does."""
    ports = ("--ports", host.asked, "--listen", "127.0.0.1:0")
    return subprocess.run(
        [sys.executable, "-m", "mgpu_http.cli", "init", str(file), *ports],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **host.environment},
        check=False,
    )


@contextlib.contextmanager
def served(host: DesignHost, file: Path):
    """Run `mgpu serve` with the file as it is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mgpu_http.cli", "serve", "--config", str(file)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **host.environment, "PYTHONUNBUFFERED": "1"},
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)$", line.strip())
            if found and int(found[1]) - 10_000 not in host.ports.values():
                yield Address(int(found[1]))
                return
        raise AssertionError(lines)
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with design_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def run(host, monkeypatch, capsys):
    """Run it in this process: gives its exit code and what it printed."""
    for name, value in host.environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str):
        code = main(["init", "--ports", host.asked, "--listen", "127.0.0.1:0", *arguments])
        return code, capsys.readouterr()

    return run


# --------------------------------------------------------------------------- the file, and with it


def test_what_was_seen_stands_in_the_file(host, tmp_path, capsys):
    host.has_card(**{"mvoice": 2345, "whisper-server": 2100, "comfyui": 480})
    file = tmp_path / "new" / "consumers.yaml"
    told = init(host, file)
    assert told.returncode == 0, told.stderr
    assert f"mgpu serve --config {file}" in told.stderr
    rows = [line.split() for line in told.stdout.splitlines()]
    assert [row[0] for row in rows[1:]] == ["mvoice", "comfyui", "ollama", "whisper-server"]
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: in order, 4 consumers\n"

    settings, text = load_settings(file), file.read_text()
    consumers = settings.consumers
    assert settings.routing == {
        "tts": "mvoice",
        "stt": "mvoice",
        "llm": "ollama",
        "image": "comfyui",
    }
    assert "stt: mvoice # or whisper-server" in text
    assert settings.audio_proxy == "mvoice"
    assert settings.gpus[0].total_mib == 16384
    assert {name: consumer.vram_resident_mib for name, consumer in consumers.items()} == {
        "mvoice": 2345,
        "whisper-server": 2100,
        "comfyui": "auto",  # no more than its context: nothing is loaded
        "ollama": 0,  # its models have footprints
    }
    assert consumers["whisper-server"].driver.systemd.unit == "whisper-server.service"
    assert consumers["comfyui"].driver.container.name == "pictures"
    assert consumers["whisper-server"].models == ("whisper-1",)
    assert consumers["comfyui"].front == host.ports["comfyui"] + 10_000
    assert "Answers as ComfyUI 0.3.64, runs in the docker container pictures" in text
    assert {"ollama/qwen3:8b", "ollama/llama3.2:latest"} < units(settings).keys()
    assert consumers["ollama"].models["llama3.2:latest"].aliases == ("llama3.2",)
    assert "OLLAMA_KEEP_ALIVE" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("card", [True, False])
async def test_every_endpoint_of_what_was_found_works_without_an_edit(host, run, tmp_path, card):
    if card:
        host.has_card(**{"mvoice": 2345, "whisper-server": 2100, "comfyui": 480})
    else:
        host.has_no_card()
    file = tmp_path / "consumers.yaml"
    code, told = await asyncio.to_thread(run, str(file))
    assert code == 0, told.err
    with served(host, file) as broker:
        await broker.until(
            "probed", lambda s: all(one["healthy"] for one in s["consumers"].values())
        )
        for path, body, content_type, expected in requests():
            answer = await broker.ask("POST", path, content_type, body=body)
            assert (answer.status, expected in answer.body) == (200, True), (path, answer)
        for path, expected in (
            ("/audio/hello.wav", b"RIFF"),
            ("/v1/models", b'"llama3.2"'),
            ("/upstream/comfyui/", b"<title>ComfyUI"),
            ("/upstream/ollama/api/tags", b"qwen3:8b"),
            ("/upstream/mvoice/health", b"ok"),
            ("/upstream/whisper-server/health", b"ok"),
        ):
            answer = await broker.ask("GET", path)
            assert (answer.status, expected in answer.body) == (200, True), (path, answer)
        await fronts_work(host)
        status = await broker.status()
        assert {name for name, one in status["consumers"].items() if one["error"]} == set()


def requests():
    """Give each endpoint for work with what it is asked and what must be in the answer."""
    chat = json.dumps({"model": "qwen3:8b", "messages": [], "stream": False}).encode()
    short = json.dumps({"model": "llama3.2", "messages": []}).encode()
    later = json.dumps({"model": "gemma3:1b", "messages": []}).encode()
    graph = json.dumps({"prompt": {"9": {"class_type": "SaveImage"}}}).encode()
    return [
        ("/v1/tts", b'{"text": "hello"}', JSON, b"/audio/hello.wav"),
        ("/v1/stt", SOUND + b"--x--\r\n", FORM, b"bytes"),
        ("/v1/llm", chat, JSON, b'"content": "hello"'),
        ("/v1/image", graph, JSON, b"prompt_id"),
        ("/v1/image?wait=1", graph, JSON, b"PNG"),
        ("/v1/chat/completions", chat, JSON, b"choices"),
        ("/v1/chat/completions", short, JSON, b'"llama3.2:latest"'),
        ("/v1/chat/completions", later, JSON, b"choices"),  # one that init did not see
        ("/v1/audio/transcriptions", SOUND + HEARD + b"--x--\r\n", FORM, b" 4 bytes"),
        ("/upstream/ollama/api/chat", chat, JSON, b"hello"),
        ("/upstream/mvoice/tts", b'{"text": "past"}', JSON, b"/audio/past.wav"),
    ]


async def fronts_work(host: DesignHost) -> None:
    """Its page and its own clients find each service at the port of their own."""
    pictures = Address(host.ports["comfyui"] + 10_000)
    page = await pictures.ask("GET", "/")
    assert b"<title>ComfyUI" in page.body
    graph = json.dumps({"prompt": {"1": {}}}).encode()
    queued = await pictures.ask("POST", "/prompt", JSON, body=graph)
    assert queued.json()["prompt_id"]
    ollama = Address(host.ports["ollama"] + 10_000)
    assert (await ollama.ask("GET", "/")).body == b"Ollama is running"
    chat = json.dumps({"model": "qwen3:8b", "messages": []}).encode()
    assert b"hello" in (await ollama.ask("POST", "/api/chat", JSON, body=chat)).body


# ----------------------------------------------------------------------------------- as a command


def test_a_file_that_is_there_is_left_as_it_is(run, tmp_path):
    file = tmp_path / "consumers.yaml"
    file.write_text("# mine\n")
    code, told = run(str(file))
    assert (code, told.out, file.read_text()) == (2, "", "# mine\n")
    assert "--force replaces it" in told.err
    code, told = run(str(file), "--dry-run")
    assert told.out.startswith("# Written by `mgpu init`")
    assert (code, file.read_text()) == (0, "# mine\n")
    assert run(str(file), "--force")[0] == 0
    assert len(load_settings(file).consumers) == 4
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_all_that_was_found_and_the_text(host, run, tmp_path):
    host.has_card(mvoice=2345)
    file = tmp_path / "consumers.yaml"
    code, told = run(str(file), "--dry-run", "--json")
    found = json.loads(told.out)
    assert (code, found["file"], file.exists()) == (0, None, False)
    assert found["services"][0]["name"] == "mvoice"
    assert found["services"][0]["held_mib"] == {"0": 2345}
    assert found["cards"] == [{"index": 0, "total_mib": 16384, "used_mib": 2345}]
    file.write_text(found["config"])
    assert len(load_settings(file).consumers) == 4
    code, told = run(str(file), "--force", "--json")
    assert json.loads(told.out)["file"] == str(file)


def test_where_nothing_is_found_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    file, port = tmp_path / "consumers.yaml", free_port()
    assert main(["init", str(file), "--ports", str(port)]) == 1
    told = capsys.readouterr()
    assert not file.exists()
    assert f"asked at {port}" in told.err
    assert "--ports" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ports", "80x"], "'80x' is no port"),
        (["--ports", "70000"], "'70000' is no port"),
        (["--ports", "comfy:8188"], "there is no preset 'comfy'"),
        (["--listen", "nonsense"], "listen: must be an address"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    ports = [] if "--ports" in more else ["--ports", str(free_port())]
    assert main(["init", str(tmp_path / "c.yaml"), *ports, *more]) in (1, 2)
    assert words in capsys.readouterr().err
