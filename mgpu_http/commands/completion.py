"""`mgpu completion`: scripts for bash, zsh and fish, made from the parser of the command itself.

Each script knows by the words before the cursor which command they are (its path, as `log show`),
and what may follow: commands, options, what an option or an argument takes.
"""

import shlex
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Callable, Iterator, Mapping

from attrs import field, frozen

from mgpu_http.cli import make_parser
from mgpu_http.commands.output import DONE, result

# What takes the name of a file or folder, by how the help calls it.
FILES = frozenset({"FILE", "DIR", "LOG", "CONFIG"})


@frozen(kw_only=True)
class Taken:
    """What an option or an argument takes: one of these words, or a file, or who knows what."""

    words: tuple[str, ...] = ()
    file: bool = False


@frozen(kw_only=True)
class Node:
    """A command, or a group of them. Options that take nothing have None; names go with help."""

    path: str
    commands: Mapping[str, str] = field(factory=dict)
    options: Mapping[str, tuple[str, Taken | None]] = field(factory=dict)
    arguments: tuple[Taken, ...] = ()

    @property
    def first(self) -> Taken:
        """What may stand where an argument does; a file where any of them is one."""
        words = tuple(word for one in self.arguments for word in one.words)
        return Taken(words=words, file=any(one.file for one in self.arguments))


def completion(arguments: Namespace) -> int:
    result(SCRIPTS[arguments.shell](tuple(nodes(make_parser(), ""))))
    return DONE


def nodes(parser: ArgumentParser, path: str) -> Iterator[Node]:
    commands: dict[str, str] = {}
    inner: dict[str, ArgumentParser] = {}
    options: dict[str, tuple[str, Taken | None]] = {}
    arguments: list[Taken] = []
    for action in parser._actions:  # noqa: SLF001 - argparse shows them to nobody otherwise
        if isinstance(action, _SubParsersAction):
            inner = dict(action.choices)
            commands = {one.dest: one.help or "" for one in action._choices_actions}  # noqa: SLF001
            continue
        called = action.metavar or action.dest.upper()
        taken = Taken(words=tuple(map(str, action.choices or ())), file=called in FILES)
        for option in action.option_strings:
            options[option] = (action.help or "", None if action.nargs == 0 else taken)
        if not action.option_strings:
            arguments.append(taken)
    yield Node(path=path, commands=commands, options=options, arguments=tuple(arguments))
    for name, one in inner.items():
        yield from nodes(one, f"{path} {name}".strip())


# ----------------------------------------------------------------------------------- bash and zsh

# `before` are the words up to the cursor without the command's own name, `word` is the one at it.
# Finds the command by its path (in zsh `path` is taken), then `choices` and `files`: what may stand
# at the cursor. Options only where one is begun, or nothing else may stand there.
_FIND = """\
    local at="" last="" choices="" options="" files="" one
    for one in "${before[@]}"; do
        case "$at $one" in
@PATHS@)
            at="${at:+$at }$one" ;;
        esac
        last="$one"
    done
    case "$at $last" in
@VALUES@
    *)
        case "$at" in
@COMMANDS@
        esac ;;
    esac
    if [[ $word == -* || -z $choices$files ]]; then
        choices="$options" files=""
    fi
"""


def _bash(every: tuple[Node, ...]) -> str:
    return f"""\
# Completion of mgpu for bash: eval "$(mgpu completion bash)"
_mgpu() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before=("${{COMP_WORDS[@]:1:COMP_CWORD-1}}")
{_found(every)}\
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [[ -n $files ]]; then
        local IFS=$'\\n'
        compopt -o filenames 2> /dev/null
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
complete -F _mgpu mgpu"""


def _zsh(every: tuple[Node, ...]) -> str:
    return f"""\
#compdef mgpu
# Completion of mgpu for zsh, after compinit: eval "$(mgpu completion zsh)"
_mgpu() {{
    local word="${{words[CURRENT]}}"
    local -a before=("${{(@)words[2,CURRENT-1]}}")
{_found(every)}\
    [[ -n $choices ]] && compadd -- ${{=choices}}
    [[ -n $files ]] && _files
    return 0
}}
compdef _mgpu mgpu"""


def _found(every: tuple[Node, ...]) -> str:
    paths = [shlex.quote(f"{node.path} {name}") for node in every for name in node.commands]
    values = [
        _case(f"{node.path} {option}", taken)
        for node in every
        for option, (_, taken) in node.options.items()
        if taken is not None
    ]
    commands = [
        _case(node.path, Taken(words=(*node.commands, *node.first.words), file=node.first.file))
        + f" options={shlex.quote(' '.join(o for o in node.options if o.startswith('--')))} ;;"
        for node in every
    ]
    parts = {
        "@PATHS@": " |\\\n".join(f"        {path}" for path in paths),
        "@VALUES@": "\n".join(f"    {case} ;;" for case in values),
        "@COMMANDS@": "\n".join(f"        {case}" for case in commands),
    }
    script = _FIND
    for mark, text in parts.items():
        script = script.replace(mark, text)
    return script


def _case(pattern: str, taken: Taken) -> str:
    files = " files=yes" if taken.file else ""
    return f"{shlex.quote(pattern)}) choices={shlex.quote(' '.join(taken.words))}{files}"


# ------------------------------------------------------------------------------------------- fish


def _fish(every: tuple[Node, ...]) -> str:
    paths = [f"{node.path} {name}".strip() for node in every for name in node.commands]
    known = " ".join(shlex.quote(path) for path in paths)
    lines = [
        "# Completion of mgpu for fish: mgpu completion fish | source",
        "function __mgpu_at --description 'Is the command line at this command?'",
        "    set -l path ''",
        "    for word in (commandline -opc)[2..-1]",
        '        set -l longer (string trim -- "$path $word")',
        f"        contains -- $longer {known}; and set path $longer",
        "    end",
        '    test "$path" = "$argv[1]"',
        "end",
        "complete -c mgpu -f",
    ]
    return "\n".join([*lines, *(line for node in every for line in _fish_lines(node))])


def _fish_lines(node: Node) -> Iterator[str]:
    at = f"complete -c mgpu -n {_fish_quoted(f'__mgpu_at {_fish_quoted(node.path)}')}"
    for name, help_text in node.commands.items():
        yield f"{at} -a {name} -d {_fish_quoted(help_text)}"
    if node.first.words:
        yield f"{at} -a {_fish_quoted(' '.join(node.first.words))}"
    if node.first.file:
        yield f"{at} -F"
    for option, (help_text, taken) in node.options.items():
        flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
        takes = "" if taken is None else " -r"
        if taken is not None and taken.words:
            takes = f" -x -a {_fish_quoted(' '.join(taken.words))}"
        elif taken is not None and taken.file:
            takes = " -r -F"
        yield f"{at} {flag}{takes} -d {_fish_quoted(help_text)}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SCRIPTS: Mapping[str, Callable[[tuple[Node, ...]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
