#!/bin/sh
# Puts the commit that is checked out on a host and has it run there: `make deploy HOST=...`.
#   deploy.sh install     copy it, then run its systemd/install.sh on the host
#   deploy.sh rollback    have the host go back to the release that ran before
# HOST, SSH, PREFIX, CONFIG and PYTHON come from the environment; docs/operations.md explains them.
set -eu
umask 022
cd "$(dirname "$0")/.."

HOST=${HOST:-} SSH=${SSH:-ssh} PREFIX=${PREFIX:-/opt/mgpu} CONFIG=${CONFIG:-} PYTHON=${PYTHON:-python3}

die() {
    echo "deploy: $*" >&2
    exit 2
}

on_host() {
    # shellcheck disable=SC2086 # $SSH is a command with its options
    if [ "$HOST" = local ]; then sh -c "$1"; else $SSH "$HOST" "$1"; fi
}

as_root() {
    on_host "$sudo env PYTHON='$PYTHON' sh $1"
}

copy_release() { # copy_release DIRECTORY-ON-HOST
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    mkdir "$tree/release"
    git -c tar.umask=0022 archive HEAD | tar -x -C "$tree/release"
    [ -z "$CONFIG" ] || install -m 0600 "$CONFIG" "$tree/release/first.yaml"
    to=$1/
    set -- --archive --no-owner --no-group --delete --exclude=/venv --exclude=/.built --mkpath
    if [ "$HOST" = local ]; then
        $sudo rsync "$@" "$tree/release/" "$to"
    else
        rsync --rsh="$SSH" --rsync-path="$sudo rsync" "$@" "$tree/release/" "$HOST:$to"
    fi
}

[ -n "$HOST" ] || die "which host? HOST=root@gpu-host, or HOST=local for this one"
case $PREFIX in
    *[!A-Za-z0-9/._-]* | [!/]*) die "PREFIX=$PREFIX: an absolute path without special characters" ;;
esac
[ -z "$CONFIG" ] || [ -r "$CONFIG" ] || die "CONFIG=$CONFIG: there is no such file"

# shellcheck disable=SC2016 # for the host's shell
sudo=$(on_host '
    for need in rsync systemctl '"$PYTHON"'; do
        command -v "$need" >/dev/null || { echo "deploy: the host lacks $need" >&2; exit 1; }
    done
    [ "$(id -u)" = 0 ] || echo "sudo -n"
') || die "$HOST is no host that I can deploy to"

case $1 in
    install)
        [ -z "$(git status --porcelain)" ] || echo "deploy: what is not committed stays here" >&2
        version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
        release=$PREFIX/releases/$version-$(git rev-parse --short=10 HEAD)
        copy_release "$release"
        as_root "$release/systemd/install.sh"
        ;;
    rollback) as_root "$PREFIX/current/systemd/install.sh rollback" ;;
    *) die "install or rollback, not $1" ;;
esac
