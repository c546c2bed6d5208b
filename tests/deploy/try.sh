#!/usr/bin/env bash
# `make try-deploy`: deploys to a Debian 12 of its own, booted with systemd in a container, by ssh.
# It needs root, network (Debian's packages, Python's packages), the Debian packages debootstrap,
# systemd-container, openssh-client, rsync, git, and the ports 2222 and 18770 to 18773 of loopback.
# The system is made once, in TRY_DIR; each run works on a copy in memory that is gone afterwards.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=${TRY_DIR:-/var/tmp/mgpu-try}
root=$dir/root
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checks=0

ssh_command="ssh -q -p 2222 -i $dir/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
on_host() { $ssh_command root@127.0.0.1 "$@"; }

make_root() {
    [ ! -e "$root/.made" ] || return 0
    mkdir -p "$dir"
    rm -rf "$root"
    local packages="ca-certificates dbus libpam-systemd openssh-server polkitd procps python3-venv"
    packages="$packages rsync systemd-sysv"
    debootstrap --variant=minbase --include="${packages// /,}" bookworm "$root"
    printf 'Port 2222\nListenAddress 127.0.0.1\n' >"$root/etc/ssh/sshd_config.d/try.conf"
    [ -e "$dir/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
    install -D -m 0600 "$dir/key.pub" "$root/root/.ssh/authorized_keys"
    # How this machine reaches the index of packages: whom it trusts, and what pip was told.
    for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
        [ ! -e "$file" ] || install -D -m 0644 "$file" "$root$file"
    done
    touch "$root/.made"
}

boot() {
    for port in 2222 18770 18771 18772 18773; do
        ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "port $port is taken"; exit 2; }
    done
    systemd-nspawn --quiet --directory="$root" --volatile=overlay --boot --machine=mgpu-try \
        --register=no --keep-unit </dev/null >"$work/boot.log" 2>&1 &
    machine=$!
    trap 'kill $machine; wait $machine || :; rm -rf "$work"' EXIT # nspawn shuts it down in order
    until_true 60 on_host true
}

until_true() { # until_true SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || { echo "never came true: $*" >&2; return 1; }
        sleep 0.5
    done
}

check() { # check WHAT COMMAND...
    local what=$1
    shift
    "$@" >"$work/saying" 2>&1 || { cat "$work/saying"; echo "FAILED: $what"; exit 1; }
    mv "$work/saying" "$work/said"
    checks=$((checks + 1))
    echo "ok: $what"
}

refuses() { ! "$@"; }
said() { grep -- "$1" "$work/said"; } # did the command of the last check say that?

deploy() { make -s -C "$work/clone" deploy HOST=root@127.0.0.1 SSH="$ssh_command" "$@"; }
rollback() { make -s -C "$work/clone" rollback HOST=root@127.0.0.1 SSH="$ssh_command"; }
commit() { git -C "$work/clone" -c user.name=try -c user.email=try@localhost commit -qam "$1"; }
runs() { # runs COMMIT: is it the one that answers?
    on_host "readlink /opt/mgpu/current; systemctl is-active mgpu" >"$work/runs"
    grep -q -- "-$(git -C "$work/clone" rev-parse --short=10 "$1")$" "$work/runs" &&
        on_host "/opt/mgpu/current/venv/bin/mgpu status --url http://127.0.0.1:18770"
}
show() { on_host "systemctl show --value --property=$1 mgpu"; }
broker() { on_host "/opt/mgpu/current/venv/bin/mgpu $* --url http://127.0.0.1:18770"; }

child() { on_host "pgrep -u mgpu -f -- '127.0.0.1.$1'"; } # does the broker's child with that port live?

services() { # what a unit of systemd is made of, and the key of a service
    on_host 'cat >/etc/systemd/system/whisper-server.service
        install -d /etc/mgpu && echo TRY_KEY=secret >/etc/mgpu/environment
        chmod 600 /etc/mgpu/environment && systemctl daemon-reload' <<'EOF'
[Service]
ExecStart=python3 -m http.server --bind 127.0.0.1 18771
EOF
}

first_release() {
    check "a first deployment" deploy CONFIG="$PWD/tests/deploy/consumers.yaml"
    check "it runs" runs HEAD
    check "as its own user" test "$(on_host 'ps -o user= -C mgpu')" = mgpu
    check "the same once more" deploy
    check "and that built nothing" refuses said building
    check "there is nothing to roll back to" refuses rollback
    check "which is said" said "no release ran here before"
    check "systemd knows where it listens" \
        test "$(show StatusText)" = "listening on http://127.0.0.1:18770"
}

drivers() {
    check "the broker starts a unit" broker load unit
    check "which systemd runs" until_true 20 on_host "systemctl is-active whisper-server"
    check "and a service of its own" broker load child
    check "as its child" until_true 20 child 18772
    check "one with a JIT" broker load jit
    check "is kept from making code" until_true 20 on_host \
        "journalctl -u mgpu | grep 'PermissionError: .* Operation not permitted'"
    check "the event log is in the state directory" on_host "ls /var/lib/mgpu/events-*"
}

reload() {
    check "a reload" on_host "systemctl reload mgpu"
    check "a bad configuration" on_host "cp -p /etc/mgpu/consumers.yaml /root
        echo nonsense: 1 >>/etc/mgpu/consumers.yaml"
    check "is refused by reload" refuses on_host "systemctl reload mgpu"
    pid=$(show MainPID)
    check "and by deploy" refuses deploy
    check "which names the key" said nonsense
    check "and leaves alone what runs" test "$(show MainPID)" = "$pid"
    check "the good one again" on_host "cp -p /root/consumers.yaml /etc/mgpu"
}

later_releases() {
    echo "one more line" >>"$work/clone/README.md"
    commit "a good change"
    # shellcheck disable=SC2016 # for the host's shell
    on_host 'cd /opt/mgpu/releases && mkdir old-1 old-2 old-3 old-4
        for old in old-*; do touch -d "2020-01-0${old#old-}" "$old/.built"; done'
    check "an upgrade" deploy
    check "runs" runs HEAD
    check "and ended the service of the broker before" refuses child 18772
    check "three releases are kept" \
        test "$(on_host "ls /opt/mgpu/releases | wc -l; ls /opt/mgpu/releases | grep old")" = $'3\nold-4'
    sed -i 's/^async def health(.*/&\n    raise RuntimeError("a bad release")/' \
        "$work/clone/mgpu_http/steer.py"
    commit "a bad change"
    check "a release that is not well" refuses deploy
    check "goes back by itself" said "back to"
    check "to the one before" runs HEAD~1
    check "a rollback" rollback
    check "to the first one" runs HEAD~2
    check "the configuration is the operator's" on_host "cmp /root/consumers.yaml /etc/mgpu/consumers.yaml"
}

drop_in() { # drop_in FILE < TEXT
    on_host "mkdir -p /etc/systemd/system/mgpu.service.d
        cat >/etc/systemd/system/mgpu.service.d/$1; systemctl daemon-reload; systemctl restart mgpu"
}
restarted() { [ "$(show NRestarts)" = 1 ] && broker status; }

process_driver() {
    check "the drop-in for services of the broker" drop_in process-driver.conf <systemd/process-driver.conf
    check "lets the one with a JIT" broker load jit
    check "run" until_true 20 child 18773
    check "a broker that is killed" on_host "systemctl kill --kill-who=main --signal=KILL mgpu"
    check "is started anew" until_true 30 restarted
    check "and its children have gone with it" refuses child 18773
}

watchdog() {
    check "a watchdog of two seconds" drop_in try.conf <<<$'[Service]\nWatchdogSec=2'
    pid=$(show MainPID)
    sleep 5
    check "is content with a healthy broker" test "$(show MainPID)" = "$pid"
    check "not with a stuck one" on_host "kill -STOP $pid"
    check "which is started anew" until_true 30 restarted
    check "because of the watchdog" on_host "journalctl -u mgpu | grep 'Watchdog timeout'"
    check "an end" on_host "systemctl stop mgpu"
    check "in order" test "$(show Result)" = success
}

make_root
git clone -q . "$work/clone"
boot
services
first_release
drivers
reload
later_releases
process_driver
watchdog
echo "$checks passed, 0 failed"
