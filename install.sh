#!/usr/bin/env bash
# Sets up Debian or Ubuntu for the scripts: system packages, the game's assets, .venv; then tries the game
#
#   ./install.sh                     as root, or as a user who may use sudo; a second run changes nothing
#   ./install.sh --engine pystk      builds the original engine too, which takes minutes
#   PYTHON=python3.12 ./install.sh   with that Python (3.11 to 3.14)
set -euo pipefail
cd "$(dirname "$0")"

venv=$PWD/.venv
[ -n "${XDG_CACHE_HOME:-${HOME:-}}" ] || { echo "HOME is not set: type \`HOME=/a/folder ./install.sh\`." >&2 && exit 1; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ppo_tuxkart
log=$cache/install.log
to_run=(ca-certificates libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 libglx0 libopengl0 libx11-6 supertuxkart-data)
to_build=(g++ libgl-dev libopengl-dev libx11-dev)
pystk=1.1.2
say() { echo "install.sh: $*"; }
die() { say "$*" >&2; exit 1; }
quietly() { "$@" >>"$log" 2>&1; }

engines=(pystk2)
case "$*" in
    "" | "--engine auto" | "--engine pystk2") ;;
    "--engine pystk") engines=(pystk2 pystk) ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) die "There is no option \`$*\`: type \`./install.sh\` or \`./install.sh --engine pystk\`." ;;
esac
[ "${engines[*]}" = pystk2 ] || to_run+=(libegl-dev) # for the name libEGL.so, which the original engine opens
{ mkdir -p "$cache/wheels" && : >"$log"; } 2>/dev/null ||
    die "$cache cannot be written: type \`HOME=/a/folder ./install.sh\`, with a folder that can."

apt_install() { # NAME...: those that are missing
    local name status sudo=() missing=()
    for name; do # since Debian 13 some libraries end in t64
        status=$(dpkg-query -W -f '${db:Status-Status} ' "$name" "${name}t64" 2>>"$log") || true
        [[ " $status" == *" installed "* ]] || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]} ..."
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    quietly "${sudo[@]}" apt-get update || true # one broken source must not stop the others
    quietly "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "${missing[@]}"
}

pip_install() { quietly "$venv/bin/python" -m pip install "$@"; }

version() { # NAME: of that package in .venv, or nothing
    "$venv/bin/python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>>"$log" || true
}

# --- Python, the system's packages, .venv

command -v dpkg-query >>"$log" || die "This is neither Debian nor Ubuntu: install Mesa's EGL and SuperTuxKart with" \
    "your system's tools, then type \`pip install -r requirements.txt\`."
[ -n "${PYTHON:-$(command -v python3)}" ] || apt_install python3-venv || true # and it brings python3
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11} ""; do
    series=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>>"$log") || continue
    [[ $series =~ ^3\.1[1-4]$ ]] && break
done
[ -n "$python" ] || die "Python 3.11 to 3.14 is needed${PYTHON:+, which $PYTHON is not}: type" \
    "\`sudo apt-get install python3.11 python3.11-venv\`, or \`PYTHON=/path/to/python3.12 ./install.sh\`."
"$python" -c 'import ensurepip' 2>>"$log" || to_run+=("python$series-venv")
if ! apt_install "${to_run[@]}"; then
    apt-cache show supertuxkart-data >>"$log" 2>&1 ||
        die "apt does not know supertuxkart-data: type \`sudo add-apt-repository universe\`, then \`./install.sh\`."
    die "apt-get failed: type, as root, \`apt-get install --no-install-recommends ${to_run[*]}\`," \
        "then \`./install.sh\`."
fi

if ! quietly "$venv/bin/pip" --version; then # there is none, or half of one, or it was moved
    say "making .venv with Python $series ..."
    quietly "$python" -m venv --clear "$venv" || die "That failed: type \`$python -m venv --clear .venv\` to see why."
fi
has=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -z "${PYTHON:-}" ] || [ "$has" = "$series" ] ||
    die ".venv has Python $has and not $series: type \`rm -r .venv\`, then \`PYTHON=$PYTHON ./install.sh\`."

# --- Python packages

torch=$(sed -n 's/^torch==//p' requirements.txt)
if [[ $(version torch) != "$torch"* ]] && ! quietly nvidia-smi -L; then
    say "installing PyTorch $torch for the CPU ..."
    pip_install --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" ||
        say "PyTorch's own index does not answer (see $log), so PyPI's build for GPUs comes: some GB more ..."
fi
[ -n "$(version tyro)" ] || say "installing requirements.txt ..."
pip_install -r requirements.txt ||
    die "requirements.txt could not be installed (see $log): check the network, then type \`./install.sh\`."

# --- The original engine: it has no wheel for these Pythons, so one is built and kept

build_pystk() (
    headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || to_build+=("python$has-dev")
    apt_install "${to_build[@]}" || exit 1
    say "building PySuperTuxKart $pystk, which takes 1 to 10 minutes ..."
    scratch=$(mktemp -d "$cache/build.XXXXXX") || exit 1
    trap 'rm -rf "$scratch"' EXIT
    export PATH="$scratch/venv/bin:$PATH" TMPDIR=$scratch
    # It predates CMake 4 and GCC 13, and the pybind11 that it brings predates Python 3.11.
    export CXX="g++ -include cstdint -I$scratch/pybind11/pybind11/include"
    quietly "$venv/bin/python" -m venv "$scratch/venv" &&
        quietly pip install setuptools==80.9.0 cmake==3.31.6 ninja==1.13.0 &&
        quietly pip install --target "$scratch/pybind11" pybind11==2.13.6 &&
        quietly pip wheel --no-cache-dir --no-build-isolation --no-deps --no-binary PySuperTuxKart \
            --wheel-dir "$scratch/wheel" "PySuperTuxKart==$pystk" &&
        mv "$scratch"/wheel/*.whl "$cache/wheels"
)

if [[ ${engines[*]} != pystk2 && $(version PySuperTuxKart) != "$pystk" ]]; then
    wheel=$cache/wheels/pysupertuxkart-$pystk-cp${has/./}-cp${has/./}-linux_$(uname -m).whl
    if [ -e "$wheel" ] || build_pystk; then
        # Without its dependency, which downloads the assets that apt has brought.
        pip_install --no-index --no-deps "$wheel" ||
            die "The engine's wheel could not be installed: type \`rm -r $cache/wheels\`, then" \
                "\`./install.sh --engine pystk\`."
    else
        say "PySuperTuxKart could not be built (see $log), so PySuperTuxKart2 alone runs the game:" \
            "\`./install.sh --engine pystk\` tries it again."
        engines=(pystk2)
    fi
fi

# --- The assets: links to Debian's, laid out as each engine looks for them

debian=/usr/share/games/supertuxkart/data

link_assets() { # FOLDER MARKER
    mkdir -p "$1/data/skins"
    for file in "$debian"/*; do
        case "${file##*/}" in
            skins) ln -sfn "$file"/* "$1/data/skins/" ;;
            *) ln -sfn "$file" "$1/data/" ;;
        esac
    done
    [ -e "$1/data/skins/classic" ] || ln -s "$debian/skins/peach" "$1/data/skins/classic" # which pystk2 asks for
    touch "$1/data/$2" "$1/__downloaded__.txt"
}

pystk2_assets=${XDG_CACHE_HOME:-$HOME/.cache}/PySuperTuxKart2/1.5
if [ ! -e "$pystk2_assets/__downloaded__.txt" ] || [ -L "$pystk2_assets/data/tracks" ]; then # else its own are there
    link_assets "$pystk2_assets" supertuxkart.1.5
fi
if [ "${engines[*]}" != pystk2 ]; then
    link_assets "$venv/share/supertuxkart" supertuxkart.git
    cat >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pystk_data.py" <<'EOF'
"""Where the original engine finds its data, as install.sh has laid it out."""

import os
import sys

data_dir = os.path.join(sys.prefix, "share", "supertuxkart")
EOF
fi

# --- Preflight: scotland with each engine, in a process of its own

preflight() {
    SUPERTUXKART_SAVEDIR=$cache/preflight XDG_CONFIG_HOME=$cache/preflight \
        timeout 300 "$venv/bin/python" - "$1" <<'EOF'
import ctypes
import os
import sys
import time

from ppo_tuxkart import TuxKartEnv

env = TuxKartEnv(track="scotland", engine=sys.argv[1], random_start=0.0)
env.action_space.seed(0)
env.reset(seed=0)
get_string = ctypes.CDLL("libGL.so.1").glGetString
get_string.restype = ctypes.c_char_p
renderer = get_string(0x1F01).decode()  # GL_RENDERER
spent = []  # seconds of each decision
while len(spent) < 200 and sum(spent) < 10:
    start = time.perf_counter()
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    spent.append(time.perf_counter() - start)
    if terminated or truncated:
        env.reset()
env.close()
line = "{engine} {engine_version}, assets {assets}".format(**env.versions)
os.write(3, f"{line}, {renderer}, {len(spent) / sum(spent):.0f} decisions/s at 64x64\n".encode())
EOF
}

works=()
for engine in "${engines[@]}"; do # the engines write to 1 and 2, from C++
    if preflight "$engine" 3>&1 >>"$log" 2>&1; then works+=("$engine"); fi
done
[ ${#works[@]} -gt 0 ] || die "The game does not run: type \`tail $log\` to see what it said."
[ "${works[*]}" = "${engines[*]}" ] ||
    say "Only ${works[*]} runs here (see $log): add \`--engine ${works[*]}\` to your commands."
say "ready: type \`.venv/bin/python ppo_tuxkart.py --track scotland\`."
