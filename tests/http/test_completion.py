"""The scripts of `mgpu completion`, in real shells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mgpu_http.cli import COMMANDS, SHELLS
from tests.http.test_cli import mgpu

LIMIT_S = 30
# Calls what the script registered, as the shell does when the key is pressed after these words.
BASH = """
source "$1"; shift
function=$(complete -p mgpu | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(mgpu "$@"); COMP_CWORD=$#
"$function"
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
compdef() { function=$1 }
compadd() { print -l -- "${@:2}" }
_files() { print FILES }
source "$1"; shift
words=(mgpu "$@"); CURRENT=$(($# + 1))
$function
"""
FISH = 'source $argv[1]; complete -C "mgpu $argv[2..-1]"'
WITHOUT = {"bash": ("--norc", "--noprofile", "-c", BASH, "bash"), "zsh": ("-fc", ZSH, "zsh")}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here")
    return name


@pytest.fixture
def offered(tmp_path: Path):
    """Give what a shell offers where these words stand and the key is pressed after the last."""

    def ask(shell: str, *words: str, folder: Path = tmp_path) -> list[str]:
        script = tmp_path / "script"
        script.write_text(mgpu("completion", shell).stdout)
        options = WITHOUT.get(shell, ("--no-config", "-c", FISH))
        told = subprocess.run(
            [shell, *options, str(script), *words],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        assert told.stderr == ""
        return [line.split("\t")[0] for line in told.stdout.splitlines()]

    return ask


def test_every_command_is_offered(shell, offered):
    commands = {command.name.split()[0] for command in COMMANDS}
    assert set(offered(shell, "")) >= commands
    of_log = {command.name.split()[1] for command in COMMANDS if command.name.startswith("log ")}
    assert set(offered(shell, "log", "")) >= of_log
    assert not commands & set(offered(shell, "log", ""))


def test_options_are_those_of_the_command(shell, offered):
    assert {"--once", "--url"} <= set(offered(shell, "top", "--"))
    assert "--once" not in offered(shell, "status", "--")
    assert {"--at", "--follow"} <= set(offered(shell, "log", "show", "--"))


def test_values_are_those_of_the_option_and_of_the_argument(shell, offered):
    assert {"pytest", "transcript"} <= set(offered(shell, "log", "to-test", "--as", ""))
    assert set(SHELLS) <= set(offered(shell, "completion", ""))
    assert "openai" in offered(shell, "connect", "")
    assert "--json" not in offered(shell, "log", "show", "--consumer", "")


def test_files_are_offered_where_one_is_meant(shell, offered, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "a file.yaml").touch()
    mark = "FILES" if shell == "zsh" else "a file.yaml"
    for words in (("serve", "--config"), ("check",), ("log", "show"), ("log", "minimize", "-o")):
        found = [one.replace("\\", "") for one in offered(shell, *words, "", folder=folder)]
        assert mark in found, words
    assert mark not in offered(shell, "status", "", folder=folder)


def test_bash_offers_what_begins_as_the_word_does(offered):
    assert offered("bash", "sta") == ["status"]
    assert offered("bash", "log", "to") == ["to-test"]
    assert offered("bash", "nonsense", "sta") == ["status"]


def test_another_shell_is_wrong_usage():
    told = mgpu("completion", "tcsh")
    assert (told.returncode, told.stdout) == (2, "")
    assert "invalid choice: 'tcsh'" in told.stderr
