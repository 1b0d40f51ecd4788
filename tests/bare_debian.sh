#!/usr/bin/env bash
# shellcheck disable=SC2329 # called through step
# Follows the README on a bare Debian or Ubuntu: a root with its smallest set of packages and certificates, a clone of
# HEAD, the README's two commands inside, and how long it takes from nothing to the first decision of a training. Each is
# timed by the clock, and in seconds of a core (user + system), which other work on the machine hardly changes. By hand,
# as root, with debootstrap and git; needs the network and about 6 GB of disk.
#
#   tests/bare_debian.sh                  everything
#   tests/bare_debian.sh --engine pystk   with the build of the original engine
#   tests/bare_debian.sh --reuse-wheels   with its wheel from this user's cache, or built and put there
#   tests/bare_debian.sh --install-only   without the tests
#   SUITE=trixie tests/bare_debian.sh     another release than bookworm; MIRROR=http://... names another mirror
#   SUITE=noble MIRROR=http://... tests/bare_debian.sh     Ubuntu, which needs the name of a mirror
set -euo pipefail
cd "$(dirname "$0")/.."

wheels='' tests=yes engine=''
for option; do
    case $option in
        --reuse-wheels) engine=' --engine pystk' wheels=${XDG_CACHE_HOME:-$HOME/.cache}/ppo_tuxkart/wheels ;;
        --engine) ;; # and its name comes next
        pystk) engine=' --engine pystk' ;;
        --install-only) tests='' ;;
        *) sed -n '3,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

# This script runs itself in a mount namespace of its own. So no mount outlives it, however it ends, and what deletes
# the root sees nothing that was mounted in it.
if [ -z "${BARE_ROOT:-}" ]; then
    [ "$(id -u)" = 0 ] || { echo "Run this as root." >&2; exit 2; }
    command -v debootstrap >/dev/null || { echo "Type \`apt-get install debootstrap\` first." >&2; exit 2; }
    BARE_ROOT=$(mktemp -d -t bare_debian.XXXXXX)
    export BARE_ROOT
    trap 'rm -rf "$BARE_ROOT"' EXIT
    unshare --mount --propagation private "tests/${0##*/}" "$@"
    exit
fi

root=$BARE_ROOT
suite=${SUITE:-bookworm}
block() { # SECTION: the commands of README.md's first bash block under that heading
    awk -v title="## $1" '/^## / && !c { t = $0 == title } /^```/ { if (c) exit; c = t && /bash/; next } c' README.md
}
start_command=$(block Start) test_command=$(block Test)
start_command=${start_command/install.sh/install.sh$engine} test_command=${test_command/install.sh/install.sh$engine}
if [ -z "$start_command" ] || [ -z "$test_command" ]; then
    echo 'README.md needs a ```bash block under "## Start" and under "## Test".' >&2
    exit 2
fi
[ -z "$(git status --porcelain)" ] || echo "Note: what is not committed is not tested."

debootstrapped() { # releases that are newer than this debootstrap are made as older ones were
    local script=sid components=main
    case $suite in
        jammy | noble | plucky | questing | resolute) script=gutsy components=main,universe ;;
    esac
    debootstrap --variant=minbase --include=ca-certificates --components="$components" \
        "$suite" "$root" "${MIRROR:-}" "$script" >/dev/null ||
        { tail "$root/debootstrap/debootstrap.log"; return 1; }
}

bind() { # FROM TO [MOUNT OPTIONS]
    mkdir -p "$root$2"
    mountpoint -q "$root$2" || mount --bind "${@:3}" "$1" "$root$2"
}

# The root reaches the network as this machine does: name servers, CA bundle, proxies, pip's indexes and folders.
environment=(HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin)
host_network() {
    local name value path
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    # debootstrap leaves this to Debian's installer; torchrun looks both names up
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$(uname -n)" >"$root/etc/hosts"
    apt-config dump --format '%F "%v";%n' Acquire | grep -E '^Acquire::(https?|Check-)' \
        >"$root/etc/apt/apt.conf.d/99host" || true
    for name in SSL_CERT_FILE {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY; do
        [ -z "${!name:-}" ] || environment+=("$name=${!name}")
    done
    [ ! -f "${SSL_CERT_FILE:-}" ] || install -D -m 644 "$SSL_CERT_FILE" "$root$SSL_CERT_FILE"
    while IFS='=' read -r name value; do # global.extra-index-url='...', or :env:.cert='...', which comes last and wins
        value=${value:1:-1} name=${name##*.}
        environment+=("PIP_$(tr 'a-z-' 'A-Z_' <<<"$name")=$value")
        for path in $value; do
            path=${path#file://}
            case $name in
                cert) install -D -m 644 "$path" "$root$path" ;;
                find-links) [ ! -d "$path" ] || bind "$path" "$path" -o ro ;;
                *index-url) # its pages link to files beside it
                    path=${path%/*}
                    [ ! -d "$path" ] || bind "$path" "$path" -o ro
                    ;;
            esac
        done
    done < <(python3 -m pip config list 2>/dev/null | LC_ALL=C sort -r |
        grep -E '(cert|proxy|trusted-host|index-url|find-links)=')
    [ -z "$wheels" ] || { mkdir -p "$wheels" && bind "$wheels" /root/.cache/ppo_tuxkart/wheels; }
}

inside() { chroot "$root" env -i "${environment[@]}" bash -euxo pipefail -c "cd /root/repository; $1"; }

first_decision() { # bench/watch.py, which Python runs before the script, notes when that was
    local hook='import runpy, sys; sys.argv[0] == "ppo_tuxkart.py" and runpy.run_path("bench/watch.py")'
    mkdir "$root/root/hook" && echo "$hook" >"$root/root/hook/sitecustomize.py"
    inside "PYTHONPATH=/root/hook WATCH_LOG=/root/decision ${start_command#*&& } & run=\$!
        until [ -s /root/decision ]; do sleep 0.5; kill -0 \$run; done 2>/dev/null
        kill \$run && { wait \$run || [ \$? = 143 ]; }"
}

results=()
step() { # NAME COMMAND...
    local verdict=PASS TIMEFORMAT='%0R s, of a core %0U + %0S'
    echo "=== $1"
    { time "${@:2}" 2>&3; } 3>&2 2>"$root/took" || verdict=FAIL
    results+=("$verdict $(<"$root/took") s: $1")
    [ $verdict = PASS ]
}

trap 'printf "%s\n" "" "${results[@]}"' EXIT
chmod 755 "$root" # apt reads as a user of its own
step "debootstrap $suite" debootstrapped
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
git clone -q --depth 1 "file://$PWD" "$root/root/repository"
host_network
began=$(date +%s)
step "./install.sh$engine" inside "./install.sh$engine"
python=$(inside '.venv/bin/python -c "import platform; print(platform.python_version())"' 2>/dev/null)
step "the README's run, until its first decision" first_decision
results+=("$(($(cut -d ' ' -f 2 "$root/root/decision" | cut -d . -f 1) - began)) s from nothing to it, Python $python")
step "./install.sh$engine, the second time" inside "./install.sh$engine"
few="--num-envs 2 --num-steps 32 --total-timesteps 128 --eval-interval 0" # decisions, where the README's run has many
step "the README's kart learns" inside "$start_command $few"
[ -z "$tests" ] || step "the README's tests" inside "$test_command"
