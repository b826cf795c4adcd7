#!/bin/sh
# Make .venv: find or install what is missing, install the locked packages, build the native core.
# Quick when nothing changed. Called by the Makefile; may be called by hand.
set -eu
cd "$(dirname "$0")"

say() { printf 'outrider setup: %s\n' "$*"; }
fail() { printf 'outrider setup: %s\n' "$*" >&2; exit 1; }

PYTHON=${PYTHON:-}
find_python() {
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            PYTHON=$candidate
            return 0
        fi
    done
    return 1
}
has_venv() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'; }
has_compiler() { command -v gcc >/dev/null 2>&1; }
# for the native transport; without it the portable one serves, so it is asked for and not insisted on
has_nghttp2() { printf '#include <nghttp2/nghttp2.h>\nint main(void){return !nghttp2_version(0);}\n' | gcc -x c -o /dev/null - -lnghttp2 2>/dev/null; }
has_libc() { printf '#include <stdlib.h>\nint main(void){return 0;}\n' | gcc -x c -o /dev/null - 2>/dev/null; }

missing() {
    packages=
    find_python || packages="$packages python3"
    if [ -n "${PYTHON:-}" ] && find_python; then
        has_venv || packages="$packages python3-venv"
        has_headers || packages="$packages python3-dev"
    else
        packages="$packages python3-venv python3-dev"
    fi
    has_compiler || packages="$packages gcc"
    { has_compiler && has_libc; } || packages="$packages libc6-dev"
    printf '%s' "$packages"
}

apt_updated=
apt_install() {
    say "installing with apt:$*"
    [ -n "$apt_updated" ] || apt-get update -qq >/dev/null || return 1
    apt_updated=1
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

find_python || true
packages=$(missing)
if [ -n "$packages" ]; then
    if may_install; then
        # shellcheck disable=SC2086
        apt_install $packages || fail "apt-get failed; install by hand:$packages"
    else
        fail "please install (Debian names):$packages  -- as root: apt-get install$packages"
    fi
    find_python || fail "needs Python 3.11 to 3.13; set PYTHON=/path/to/python3.11"
fi

# wanted, and not insisted on: the native transport's library, and the load generators of `outrider bench`
wanted=
has_nghttp2 || wanted="libnghttp2-dev"
command -v h2load >/dev/null 2>&1 || wanted="$wanted nghttp2-client"
command -v wrk >/dev/null 2>&1 || wanted="$wanted wrk"
if [ -n "$wanted" ]; then
    # shellcheck disable=SC2086
    may_install && apt_install $wanted || true
fi
# An NGINX to build the module for and to compare with. Its package would start a service on port 80 and enable it for
# the next boot; and adding to an NGINX that is there already could upgrade, reload or reconfigure it: so that one is
# left alone, and ours is kept from starting.
POLICY=/usr/sbin/policy-rc.d
restore_policy() {
    [ -z "${policy_ours:-}" ] || rm -f "$POLICY"
    [ -z "${policy_kept:-}" ] || mv -f "$policy_kept" "$POLICY"
    policy_ours='' policy_kept=''
}
deny_services() {
    if [ -x "$POLICY" ]; then
        status=0
        "$POLICY" nginx start >/dev/null 2>&1 || status=$?
        [ "$status" != 101 ] || return 0 # it denies by itself
    fi
    trap restore_policy EXIT
    trap 'exit 130' HUP INT TERM
    if [ -e "$POLICY" ] || [ -L "$POLICY" ]; then
        mv "$POLICY" "$POLICY.outrider-kept" || return 1
        policy_kept="$POLICY.outrider-kept"
    fi
    policy_ours=1
    printf '#!/bin/sh\nexit 101\n' >"$POLICY" && chmod 755 "$POLICY"
}
has_nginx() { command -v nginx >/dev/null 2>&1 || [ -x /usr/sbin/nginx ] || [ -d /etc/nginx ]; }
if may_install && ! has_nginx; then
    if deny_services; then
        # the second without the first is of no use, the first without the second is
        { apt_install nginx nginx-dev && apt_install libnginx-mod-http-modsecurity modsecurity-crs; } || true
    fi
    restore_policy
    # enabled by its package, for the next boot
    update-rc.d nginx disable >/dev/null 2>&1 || true
    deb-systemd-helper disable nginx.service >/dev/null 2>&1 || true
fi
# the tests' own servers are started from it; the system's stays off
if may_install && ! command -v redis-server >/dev/null 2>&1; then
    if deny_services; then
        apt_install redis-server redis-sentinel || true
    fi
    restore_policy
    for service in redis-server redis-sentinel; do
        update-rc.d "$service" disable >/dev/null 2>&1 || true
        deb-systemd-helper disable "$service.service" >/dev/null 2>&1 || true
    done
fi
[ -e /usr/share/nginx/src/conf_flags ] ||
    say "no NGINX to build the module for (as root: apt-get install nginx nginx-dev): Envoy serves without it"
has_nghttp2 || say "libnghttp2-dev isn't here (as root: apt-get install libnghttp2-dev): the portable transport will serve"

sum() { cat "$@" 2>/dev/null | sha256sum | cut -d' ' -f1; }
wanted_packages=$(sum pyproject.toml constraints.txt)
wanted_core=$(sum setup.py native/*.pyx native/*.pxd)$(has_nghttp2 && printf +nghttp2 || true)
have() { cat ".venv/.$1" 2>/dev/null || true; }

if [ "$(have packages)" != "$wanted_packages" ] || [ ! -x .venv/bin/python ]; then
    say "making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv
    log=$(mktemp)
    say "installing packages (a minute or two)"
    if ! .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt setuptools cython wheel >"$log" 2>&1 ||
        ! .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
            $(.venv/bin/python - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["demo"], *project["optional-dependencies"]["dev"])
PY
) >>"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        fail "pip could not install the packages (above); is the package index reachable?"
    fi
    rm -f "$log"
    rm -f .venv/.core
    printf '%s' "$wanted_packages" >.venv/.packages
fi

if [ "$(have core)" != "$wanted_core" ]; then
    say "building the native core (about a minute)"
    log=$(mktemp)
    if ! PATH="$PWD/.venv/bin:$PATH" .venv/bin/python setup.py -q build_ext --inplace -j 2 >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        fail "the native core did not build; the whole output is in $log"
    fi
    rm -f "$log"
    # the package itself, editable: puts the outrider command into .venv/bin
    if [ ! -x .venv/bin/outrider ]; then
        .venv/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps \
            --config-settings editable_mode=compat -e . || fail "could not install the outrider command"
    fi
    printf '%s' "$wanted_core" >.venv/.core
fi
say "ready: .venv/bin/outrider"
