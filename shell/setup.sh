#!/usr/bin/env bash
# The environment. Every other script sources this file; so may you: `source shell/setup.sh`.
# The first call makes .venv at the repository root and installs requirements.txt; later calls only activate it.
#   INTERNVL_VENV=none   use (and complete) the active environment
#   INTERNVL_VENV=PATH   keep the environment somewhere else
# An interactive shell may source this file: it sets no shell options and exits only from subshells; the status of
# its last line is its own.

_internvl_setup() {
    local root code env wanted compiler=${CXX:-c++}
    root=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || return
    code=$root/internvl_chat
    [[ -d $code ]] || code=$root # laid over an upstream checkout, shell/ stands inside internvl_chat/
    env=${INTERNVL_VENV:-$root/.venv}
    if [[ $env == none ]]; then
        env=$(python3 -Ic 'import sys; print(sys.prefix)' 2>/dev/null) || env=
    elif [[ $env != /* ]]; then
        env=$PWD/$env
    fi
    command -v "${compiler%% *}" >/dev/null || {
        _internvl_say "no C++ compiler (${CXX:-g++}), with which DeepSpeed compiles an op: apt-get install g++."
        return 1
    }

    # The stamp of a finished installation: its place (a moved environment is broken) and what was asked for.
    wanted=$env$'\n'$(<"$root/requirements.txt")
    if [[ ! -x $env/bin/python3 || ! -f $env/.internvl || $(<"$env/.internvl") != "$wanted" ]]; then
        (_internvl_install "$root" "$env" "$wanted") || return
    fi
    if [[ ${INTERNVL_VENV:-} != none && ${VIRTUAL_ENV:-} != "$env" ]]; then
        # shellcheck source=/dev/null
        source "$env/bin/activate" || return
    fi
    [[ :${PYTHONPATH:-}: == *:$code:* ]] ||
        export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
    [[ -f $env/.internvl-flash-attn ]] || (_internvl_flash_attn "$env")
}

_internvl_say() { printf 'setup.sh: %s\n' "$*" >&2; }
_internvl_stop() { _internvl_say "$*." && exit 1; }

_internvl_python() { # prints the first Python >= 3.10; the active environment has only one
    local python candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ ${INTERNVL_VENV:-} == none ]] && candidates=(python3)
    for python in "${candidates[@]}"; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$python" && return
    done
    return 1
}

_internvl_install() { # root, environment, content of its stamp
    local root=$1 env=$2 wanted=$3 python version free
    # One installation at a time, also of jobs that share the disk. The kernel drops the lock however its owner ends.
    # A checkout that nobody may write to, or a disk without locks: go on without.
    { exec 9<>"$root/requirements.txt"; } 2>/dev/null
    if [[ -e /dev/fd/9 ]] && command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
        _internvl_say "another process is installing into $env; waiting for it"
        flock 9 || true
        [[ -f $env/.internvl && $(<"$env/.internvl") == "$wanted" ]] && return
    fi

    python=$(_internvl_python) ||
        _internvl_stop "no Python >= 3.10 on PATH: apt-get install python3 python3-venv python3-dev"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        _internvl_stop "Python $version lacks Python.h, which DeepSpeed's op needs: apt-get install python$version-dev"

    if [[ ${INTERNVL_VENV:-} != none ]]; then
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            _internvl_stop "Python $version cannot make environments: apt-get install python$version-venv"
        mkdir -p "$env" 2>/dev/null || _internvl_stop "cannot write to $env"
        if [[ ! -f $env/.internvl ]]; then
            free=$(df -Pk "$env" | awk 'NR == 2 {print int($4 / 1048576)}')
            ((${free:-0} >= 10)) ||
                _internvl_stop "$env needs 10 GB of disk, $free GB are free: INTERNVL_VENV=PATH puts it elsewhere"
        fi
        _internvl_say "installing requirements.txt into $env with Python $version (once, some minutes)"
        python=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') # not $env's
        rm -f "$env"/bin/python* # a link to a Python that is gone would stay
        "$python" -m venv "$env" || _internvl_stop "'$python -m venv $env' failed, see above"
        python=$env/bin/python3
    fi
    _internvl_pip "$python" -r "$root/requirements.txt" ||
        _internvl_stop "pip could not install requirements.txt, see above"
    printf '%s' "$wanted" 2>/dev/null >"$env/.internvl" || true # a complete environment may be read-only
}

_internvl_pip() { # python, what to install: silent, or the last words of pip
    local log
    log=$("$1" -m pip install --quiet --disable-pip-version-check "${@:2}" 2>&1) && return
    tail -n 12 <<<"$log" >&2
    return 1
}

_internvl_flash_attn() { # tried once per environment, where a GPU can run it; without it attention is PyTorch's
    local env=$1 python=$1/bin/python3 wheels=(setuptools wheel psutil ninja packaging)
    command -v nvidia-smi >/dev/null || return 0
    { : >"$env/.internvl-flash-attn"; } 2>/dev/null || return 0
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        awk '$1 >= 8 {ok = 1} END {exit !ok}' || return 0
    "$python" -c 'import flash_attn' 2>/dev/null && return 0
    _internvl_say "installing flash-attn (once, at most 30 minutes)"
    { "$python" -m pip install --quiet "${wheels[@]}" &&
        timeout 30m "$python" -m pip install --quiet --no-build-isolation flash-attn; } >"$env/flash-attn.log" 2>&1 ||
        _internvl_say "flash-attn could not be installed ($env/flash-attn.log); going on with PyTorch's attention"
}

_internvl_setup
