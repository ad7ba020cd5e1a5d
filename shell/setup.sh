#!/usr/bin/env bash
# Set up and activate the Python environment. Every other script sources this file; so can you: source shell/setup.sh
# The first call creates .venv in the repository and installs requirements.txt. Later calls only activate it.
#   INTERNVL_VENV=none   use the active environment; missing requirements are installed into it
#   INTERNVL_VENV=PATH   use another folder for the environment
#   INTERNVL_FLASH_ATTN=1   also compile flash-attn, up to 30 minutes; PyTorch >= 2.10 has such a kernel itself
# In an installed package there is nothing to set up: pip has installed what it requires.
# An interactive shell can source this file: it sets no shell options and calls exit only in subshells. The return
# status is that of _internvl_setup.

_internvl_setup() {
    local root code env wanted compiler=${CXX:-c++}
    root=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || return
    [[ ! -f $root/__init__.py ]] || return 0 # inside an installed package
    code=$root/internvl_chat
    [[ -d $code ]] || code=$root # copied into an upstream checkout: shell/ is inside internvl_chat/
    env=${INTERNVL_VENV:-$root/.venv}
    if [[ $env == none ]]; then
        env=$(python3 -Ic 'import sys; print(sys.prefix)' 2>/dev/null) || env=
    elif [[ $env != /* ]]; then
        env=$PWD/$env
    fi
    # shellcheck disable=SC2086 # such as CXX="ccache g++"
    $compiler --version >/dev/null 2>&1 || {
        _internvl_log "no C++ compiler (${CXX:-g++}), which DeepSpeed requires to compile an op: apt-get install g++."
        return 1
    }

    # The stamp of a finished installation: its path (a moved environment is broken) and its requirements.
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
    [[ ${INTERNVL_FLASH_ATTN:-} != 1 || -f $env/flash-attn.log ]] || (_internvl_flash_attn "$env")
}

_internvl_log() { printf 'setup.sh: %s\n' "$*" >&2; }
_internvl_fail() { _internvl_log "$*." && exit 1; }

_INTERNVL_IS_RECENT='import sys; sys.exit(sys.version_info < (3, 10))'
_internvl_python() { # print the first Python >= 3.10; with INTERNVL_VENV=none only python3 qualifies
    local python candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ ${INTERNVL_VENV:-} == none ]] && candidates=(python3)
    for python in "${candidates[@]}"; do
        "$python" -c "$_INTERNVL_IS_RECENT" 2>/dev/null && echo "$python" && return
    done
    return 1
}

_internvl_install() { # arguments: repository root, environment, content of its stamp
    local root=$1 env=$2 wanted=$3 python version free error
    [[ ${INTERNVL_VENV:-} == none ]] || error=$(mkdir -p "$env" 2>&1) || _internvl_fail "cannot create $env: ${error##*: }"
    # Lock: one installation at a time, also by jobs that share the disk and by other checkouts. The kernel releases it
    # when its owner exits. With a read-only environment, or a file system without locks, install without it.
    { exec 9>>"$env/.internvl-lock"; } 2>/dev/null
    if [[ -e /dev/fd/9 ]] && command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
        _internvl_log "another process is installing into $env; waiting for it"
        flock 9 || true
        [[ -f $env/.internvl && $(<"$env/.internvl") == "$wanted" ]] && return
    fi

    python=$(_internvl_python) ||
        _internvl_fail "no Python >= 3.10 on PATH: apt-get install python3 python3-venv python3-dev"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        _internvl_fail "Python $version lacks Python.h, which DeepSpeed's op needs: apt-get install python$version-dev"

    if [[ ${INTERNVL_VENV:-} != none ]]; then
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            _internvl_fail "Python $version cannot create environments: apt-get install python$version-venv"
        if [[ ! -f $env/.internvl ]]; then
            free=$(df -Pk "$env" | awk 'NR == 2 {print int($4 / 1048576)}')
            ((${free:-0} >= 10)) ||
                _internvl_fail "$env needs 10 GB of disk, $free GB are free: set INTERNVL_VENV to another folder"
        fi
        _internvl_log "installing requirements.txt into $env with Python $version (once, takes some minutes)"
        if "$env/bin/python3" -c "$_INTERNVL_IS_RECENT" 2>/dev/null; then
            python=$env/bin/python3 # it may be running
        else
            rm -f "$env"/bin/python* # venv keeps existing links, also to a Python that was removed
        fi
        python=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') # not $env's
        "$python" -m venv "$env" || _internvl_fail "'$python -m venv $env' failed, see above"
        python=$env/bin/python3
    fi
    _internvl_pip "$python" -r "$root/requirements.txt" ||
        _internvl_fail "pip could not install requirements.txt, see above"
    printf '%s' "$wanted" 2>/dev/null >"$env/.internvl" || true # a complete environment may be read-only
}

_internvl_pip() { # arguments: python, then those of `pip install`; print the end of pip's output if it fails
    local log
    log=$("$1" -m pip install --quiet --disable-pip-version-check "${@:2}" 2>&1) && return
    tail -n 12 <<<"$log" >&2
    return 1
}

_internvl_flash_attn() { # argument: environment; try once, its log is the stamp
    local env=$1 python=$1/bin/python3 wheels=(setuptools wheel psutil ninja packaging)
    { : >"$env/flash-attn.log"; } 2>/dev/null || return 0
    _internvl_log "compiling flash-attn (once, takes up to 30 minutes)"
    { "$python" -m pip install --quiet "${wheels[@]}" &&
        timeout 30m "$python" -m pip install --quiet --no-build-isolation flash-attn; } >"$env/flash-attn.log" 2>&1 ||
        _internvl_log "compiling flash-attn failed: read $env/flash-attn.log and delete it to try again"
}

_internvl_setup
