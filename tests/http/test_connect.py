"""`mgpu connect`: the lines that bring a client to the broker, for what the file says."""

import json
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu_effects.settings import AuthKey, AuthSettings, ConsumerSettings, Settings
from mgpu_http.auth import hash_key
from mgpu_http.cli import CLIENTS
from mgpu_http.commands import connect
from mgpu_http.commands.connect import reached, remarks
from tests.http.test_cli import mgpu
from tests.support.facade import config, write_config

CONSUMERS: dict[str, Any] = {
    "ollama": {"url": "http://127.0.0.1:11434", "vram_managed": True},
    "pictures": {"url": "http://127.0.0.1:8188", "preset": "comfyui", "vram_resident_mib": 9_000},
    "chat": {"url": "http://127.0.0.1:9", "models": {"qwen": {}, "gemma": {}, "*": {}}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_config(tmp_path, {"listen": "127.0.0.1:8770", "consumers": CONSUMERS})


def lines_for(client: str, settings: Settings) -> list[str]:
    (found,) = (one for one in connect.CLIENTS if one.name == client)
    return found.lines(reached(settings))


def test_every_client_is_told_its_lines(file: Path) -> None:
    assert tuple(client.name for client in connect.CLIENTS) == CLIENTS
    told = mgpu("connect", "--config", str(file))
    assert (told.returncode, told.stderr) == (0, "")
    for client in connect.CLIENTS:
        assert f"# {client.title}" in told.stdout
    assert told.stdout.splitlines()[-1].startswith("# it listens on loopback")


def test_a_shell_takes_the_lines_as_they_are(file: Path) -> None:
    script = mgpu("connect", "openai", "--config", str(file)).stdout
    told = subprocess.run(
        ["bash", "-c", f"{script}\nenv"], capture_output=True, text=True, check=True, env={}
    )
    assert "OPENAI_BASE_URL=http://127.0.0.1:8770/v1" in told.stdout.splitlines()
    assert "OPENAI_API_KEY=unused" in told.stdout.splitlines()
    assert "# models: qwen, gemma" in script
    assert "ANTHROPIC" not in script


def test_anthropics_clients_add_the_version_themselves(file: Path) -> None:
    document = json.loads(mgpu("connect", "anthropic", "--config", str(file), "--json").stdout)
    assert document["url"] == "http://127.0.0.1:8770"
    (told,) = document["clients"]
    assert told["lines"][0] == "export ANTHROPIC_BASE_URL=http://127.0.0.1:8770"


def test_a_key_is_asked_for_where_the_broker_asks_for_one(tmp_path: Path) -> None:
    keys = [{"name": "laptop", "hash": hash_key("secret")}]
    file = write_config(tmp_path, config(None, auth={"keys": keys}))
    script = mgpu("connect", "openai", "--config", str(file)).stdout
    exported = [shlex.split(line) for line in script.splitlines() if line.startswith("export")]
    assert exported[1] == ["export", "OPENAI_API_KEY=$MGPU_KEY"]
    assert "$MGPU_KEY is a key of this broker (laptop)" in script
    assert hash_key("secret") not in script


def test_secrets_of_the_brokers_own_need_not_be_here(tmp_path: Path) -> None:
    worker = {"headers": {"Authorization": "Bearer ${env:NOT_SET_ANYWHERE}"}}
    file = write_config(tmp_path, config(None, worker=worker, listen="127.0.0.1:8770"))
    assert mgpu("check", str(file)).returncode == 1
    assert mgpu("connect", "openai", "--config", str(file)).returncode == 0


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (("127.0.0.1:8770",), "http://127.0.0.1:8770"),
        (("[::1]:8770",), "http://[::1]:8770"),
        (("127.0.0.1:8770", "10.0.0.7:80"), "http://10.0.0.7:80"),
        (("0.0.0.0:8770",), f"http://{socket.gethostname()}:8770"),
        (("[::]:8770",), f"http://{socket.gethostname()}:8770"),
    ],
)
def test_the_address_is_one_that_clients_reach(listen: tuple[str, ...], url: str) -> None:
    broker = reached(Settings(listen=listen))
    assert broker.url == url
    only_here = any("only this host" in one for one in remarks(broker))
    assert only_here is (listen[-1] in {"127.0.0.1:8770", "[::1]:8770"})


def settings_with_fronts(**ports: int) -> Settings:
    ollama = ConsumerSettings(
        name="ollama", url="http://127.0.0.1:11434", front=ports.get("ollama")
    )
    pictures = ConsumerSettings(
        name="pictures", url="http://127.0.0.1:8188", preset="comfyui", front=ports.get("pictures")
    )
    return Settings(consumers={"ollama": ollama, "pictures": pictures})


def test_clients_of_one_service_are_sent_to_its_port() -> None:
    settings = settings_with_fronts(ollama=11435, pictures=8189)
    front = "http://127.0.0.1:11435"
    assert lines_for("ollama", settings) == [f"export OLLAMA_HOST={front}"]
    assert f"export OLLAMA_BASE_URL={front}" in lines_for("open-webui", settings)
    assert f"#   {front}" in lines_for("home-assistant", settings)
    (page,) = lines_for("comfyui", settings)
    assert "http://127.0.0.1:8189 instead of http://127.0.0.1:8188" in page


def test_without_a_port_of_its_own_it_is_said_how_to_give_it_one() -> None:
    settings = settings_with_fronts()
    for client, port in (("ollama", 11435), ("comfyui", 8189), ("home-assistant", 11435)):
        assert any(f"`front: {port}`" in line for line in lines_for(client, settings)), client
    assert not any("OLLAMA" in line for line in lines_for("open-webui", settings))


def test_a_client_that_can_send_no_key_is_told_so() -> None:
    settings = settings_with_fronts(ollama=11435)
    keys = (AuthKey(name="a", hash="0" * 64),)
    locked = Settings(consumers=settings.consumers, auth=AuthSettings(keys=keys))
    assert "sends no key" in lines_for("ollama", locked)[-1]


def test_what_is_not_here_is_said(tmp_path: Path) -> None:
    for client in ("ollama", "comfyui", "home-assistant"):
        assert any("No consumer" in line for line in lines_for(client, Settings()))
    told = mgpu("connect", "--config", str(tmp_path / "none.yaml"))
    assert (told.returncode, told.stdout) == (2, "")
    assert "none.yaml" in told.stderr
    told = mgpu("connect", "telnet")
    assert (told.returncode, told.stdout) == (2, "")
    assert "'telnet'" in told.stderr
