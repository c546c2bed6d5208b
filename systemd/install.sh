#!/bin/sh
# On the host, as root: makes a release the one that runs. A release is the tree that this script
# lies in, PREFIX/releases/NAME.
#   install.sh             build this release, switch to it; back to the former one if it is not well
#   install.sh rollback    switch to the release that ran before
# It writes to PREFIX, /etc/mgpu, and the files of systemd and polkit that are named below.
set -eu
umask 022

PYTHON=${PYTHON:-python3}
HEALTH_S=30 # from the start that systemd reports until /healthz has to answer
KEEP=3      # releases, beside the current and the former one

release=$(cd "$(dirname "$0")/.." && pwd -P)
prefix=${release%/releases/*}
etc=/etc/mgpu
config=$etc/consumers.yaml
unit=/etc/systemd/system/mgpu.service
sysusers=/etc/sysusers.d/mgpu.conf
rules=/etc/polkit-1/rules.d

say() {
    echo "mgpu: $*" >&2
}

die() {
    say "$@"
    exit 1
}

build() {
    [ ! -e "$release/.built" ] || return 0
    say "building $release"
    rm -rf "$release/venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is older than Python 3.11; PYTHON=... names another one"
    "$PYTHON" -m venv "$release/venv"
    for package in pip "$release"; do
        "$release/venv/bin/pip" install --quiet --disable-pip-version-check \
            --constraint "$release/constraints.txt" "$package"
    done
    touch "$release/.built"
}

prepare_host() {
    install -D -m 0644 "$release/systemd/mgpu.sysusers" "$sysusers"
    systemd-sysusers "$sysusers"
    install -d -m 0750 -o root -g mgpu "$etc"
    first=$release/first.yaml
    [ -e "$first" ] || first=$release/config/consumers.yaml
    if [ ! -e "$config" ]; then
        install -m 0640 -o root -g mgpu "$first" "$config"
        say "$config is new: adapt it, then systemctl reload mgpu"
    elif [ -e "$release/first.yaml" ]; then
        say "$config was there already and stays as it is"
    fi
    rm -f "$release/first.yaml"
    install -m 0644 "$release/config/consumers.yaml" "$etc/consumers.example.yaml"
    install -m 0644 "$release/config/consumers.schema.json" "$etc/consumers.schema.json"
    if [ -d "$rules" ] && [ ! -e "$rules/50-mgpu.rules" ]; then
        install -m 0644 "$release/systemd/50-mgpu.rules" "$rules/50-mgpu.rules"
        say "$rules/50-mgpu.rules is new: name the units that mgpu may start and stop"
    fi
}

# With the broker's rights and environment, before anything is switched.
check_config() {
    systemd-run --quiet --pipe --wait --collect --uid=mgpu \
        --property="EnvironmentFile=-$etc/environment" \
        "$1/venv/bin/mgpu" check "$config" >&2 ||
        die "$1 does not take $config; nothing was switched"
}

activate() {
    sed "s|/opt/mgpu|$prefix|g" "$1/systemd/mgpu.service" >"$unit.new" &&
        mv "$unit.new" "$unit" &&
        link "$1" current &&
        systemctl daemon-reload &&
        systemctl enable --quiet mgpu.service || return 1
    systemctl reset-failed mgpu.service 2>/dev/null || : # a unit that never ran
    systemctl restart mgpu.service && healthy "$1"
}

link() { # in one step: the name is never missing
    ln -sfn "releases/$(basename "$1")" "$prefix/$2.new" && mv -T "$prefix/$2.new" "$prefix/$2"
}

healthy() {
    deadline=$(($(date +%s) + HEALTH_S))
    until answers "$1"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 1
    done
}

# The broker tells systemd where it listens, whatever the configuration says.
answers() {
    url=$(systemctl show --property=StatusText --value mgpu.service |
        sed -n 's|^listening on \([^ ]*\).*|\1|p' |
        sed 's|//0\.0\.0\.0:|//127.0.0.1:|; s|//\[::\]:|//[::1]:|')
    [ -n "$url" ] && "$1/venv/bin/python" - "$url/healthz" <<'EOF'
import sys
from urllib.request import ProxyHandler, build_opener

try:
    build_opener(ProxyHandler({})).open(sys.argv[1], timeout=5)
except OSError as error:
    sys.exit(f"mgpu: {sys.argv[1]}: {error}")
EOF
}

switch_to() {
    former=$(readlink -e "$prefix/current" || :) # none at the first time
    check_config "$1"
    if activate "$1"; then
        if [ -n "$former" ] && [ "$former" != "$1" ]; then link "$former" former; fi
        say "$(basename "$1") runs"
        return
    fi
    say "$(basename "$1") is not well; the last of its log:"
    journalctl --unit=mgpu.service --no-pager --lines=20 >&2 || :
    if [ -z "$former" ] || [ "$former" = "$1" ]; then die "no other release to go back to"; fi
    activate "$former" || die "nor is $(basename "$former"): see journalctl -u mgpu"
    die "back to $(basename "$former"), which runs"
}

prune() {
    # shellcheck disable=SC2012 # names of our own making
    kept=$(ls -1dt "$prefix"/releases/*/.built | head -n "$KEEP")
    for old in "$prefix"/releases/*; do
        case "$kept" in *"$old/.built"*) continue ;; esac
        for link in current former; do
            [ "$(readlink -f "$prefix/$link")" != "$old" ] || continue 2
        done
        say "removing $(basename "$old")"
        rm -rf "$old"
    done
}

[ "$(id -u)" = 0 ] || die "run this as root"
case $prefix in "$release") die "$release is not PREFIX/releases/NAME: use make deploy" ;; esac

if [ "${1:-}" = rollback ]; then
    target=$(readlink -e "$prefix/former") || die "no release ran here before this one"
    switch_to "$target"
else
    build
    prepare_host
    switch_to "$release"
    prune
fi
