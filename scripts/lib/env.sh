# shellcheck shell=bash
# Makes the checkout's virtual environment once, and finds it ready at once afterwards. Sourced by scripts/serve, test, check.
#
#   ensure_env base|dev     afterwards $VENV holds the project, installed editable, and with `dev` its tools too
#
# PYTHON=...      the interpreter to build the environment from (default: the first of python3, python3.14 ... 3.11 that will do)
# CMAKE_ARGS=...  further options for the build of llama.cpp; they win over the ones below
#
# What was installed is written down in .venv/edgellm-stamp, last of all: the checkout's path (virtual environments cannot
# be moved), the interpreter behind it, the extras and a hash of pyproject.toml and kernels/. While all of that still holds
# nothing is run but the hash. .venv/edgellm-installing stands there during an install; an environment found with it is made anew.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

ensure_env() {
    local need="$1"
    _stamp_holds "$need" && return 0
    if command -v flock >/dev/null; then
        exec 9<"$ROOT/scripts" # a lock on the directory leaves no file behind
        flock -n 9 || { say "Another run is setting up this checkout; waiting for it."; flock 9; }
        _stamp_holds "$need" || _set_up "$need"
        exec 9<&-
    else
        _set_up "$need"
    fi
}

# Of all that an editable install builds from: what changes there needs a new install.
_sources_hash() {
    local line
    line="$(cat "$ROOT/pyproject.toml" "$ROOT"/kernels/* 2>/dev/null | { sha256sum 2>/dev/null || shasum -a 256; })"
    printf '%s' "${line%% *}"
}

# The file behind a command or path, links followed; empty if there is none.
_resolve() {
    local found
    found="$(command -v -- "$1")" && readlink -f -- "$found"
}

# Reads the stamp into stamp_root, stamp_python, stamp_chosen, stamp_extras, stamp_hash. Fails if there is none.
_read_stamp() {
    stamp_root='' stamp_python='' stamp_chosen='' stamp_extras='' stamp_hash=''
    [[ -f "$VENV/edgellm-stamp" ]] || return 1
    { IFS= read -r stamp_root && IFS= read -r stamp_python && IFS= read -r stamp_chosen &&
        IFS= read -r stamp_extras && IFS= read -r stamp_hash; } <"$VENV/edgellm-stamp"
}

# Whether .venv was made here, and by the interpreter that is there (and asked for) now.
_venv_is_ours() {
    [[ ! -e "$VENV/edgellm-installing" && "$stamp_root" == "$ROOT" ]] || return 1
    [[ -n "$stamp_python" && "$(_resolve "$VENV/bin/python")" == "$stamp_python" ]] || return 1
    [[ -z "${PYTHON:-}" || "$(_resolve "$PYTHON")" == "$stamp_chosen" ]]
}

_stamp_holds() {
    _read_stamp && _venv_is_ours || return 1
    [[ "$1" == base || "$stamp_extras" == dev ]] && [[ "$(_sources_hash)" == "$stamp_hash" ]]
}

_set_up() {
    local extras="$1" target="$ROOT" hash chosen
    if [[ ! -d "$VENV" ]]; then
        _make_venv
    elif [[ -e "$VENV/edgellm-installing" ]]; then
        say "An earlier set-up was interrupted: making $VENV anew."
        _make_venv
    elif _read_stamp && ! _venv_is_ours; then
        say "This checkout was moved, or its Python changed: making $VENV anew."
        _make_venv
    else
        [[ "$stamp_extras" == dev ]] && extras=dev # never take the tools away again
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
            die "$VENV is not from these scripts and has no pip. Remove it, and run this again."
        chosen="${stamp_chosen:-$(_resolve "$VENV/bin/python")}"
    fi
    [[ "$extras" == dev ]] && target="$ROOT[dev]"
    hash="$(_sources_hash)" # before the install: a change during it must not pass as installed

    : >"$VENV/edgellm-installing"
    rm -f "$VENV/edgellm-stamp"
    _pip_install -e "$target"
    printf '%s\n' "$ROOT" "$(_resolve "$VENV/bin/python")" "$chosen" "$extras" "$hash" >"$VENV/edgellm-stamp.new"
    rm -f "$VENV/edgellm-installing"
    mv "$VENV/edgellm-stamp.new" "$VENV/edgellm-stamp"
}

_make_venv() {
    local python
    python="$(_find_python)" || exit 1
    _check_compiler
    _check_headers "$python"
    say "Making a virtual environment in $VENV with $("$python" --version)."
    rm -rf "$VENV"
    mkdir "$VENV"
    : >"$VENV/edgellm-installing"
    "$python" -m venv "$VENV" >&2
    chosen="$(_resolve "$python")" # belongs to _set_up
}

_HOW_TO_PYTHON="Debian, Ubuntu: sudo apt install python3 python3-venv; Fedora: sudo dnf install python3; macOS: brew install python"
_HOW_TO_HEADERS="Debian, Ubuntu: sudo apt install python3-dev; Fedora: sudo dnf install python3-devel"
_HOW_TO_CXX="Debian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; macOS: xcode-select --install"

# Prints the interpreter to use: $PYTHON, or the first on PATH that is new enough.
_find_python() {
    local name found=''
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for name in "${candidates[@]}"; do
        command -v -- "$name" >/dev/null || continue
        found+=" $("$name" --version 2>&1) ($name)"
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$name" -c 'import venv, ensurepip' 2>/dev/null ||
            die "$name has no venv module (Debian, Ubuntu: sudo apt install python3-venv)"
        printf '%s' "$name"
        return 0
    done
    die "edgellm needs Python 3.11 or newer; found:${found:- none} ($_HOW_TO_PYTHON; or set PYTHON to an interpreter)"
}

# llama.cpp is compiled on this machine, for this machine: both compilers must work, not merely exist.
_check_compiler() {
    local cc="${CC:-cc}" cxx="${CXX:-c++}"
    printf 'int main(void) { return 0; }\n' | $cc -x c - -o /dev/null 2>/dev/null ||
        die "no working C compiler ($cc), which llama.cpp needs ($_HOW_TO_CXX)"
    printf '#include <vector>\nint main() { return std::vector<int>().size(); }\n' | $cxx -x c++ - -o /dev/null 2>/dev/null ||
        die "no working C++ compiler ($cxx), which llama.cpp needs ($_HOW_TO_CXX)"
}

# edgellm's own native code is a Python module: Debian and Fedora keep the headers for those in a package of their own.
_check_headers() {
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' ||
        die "$1 comes without its headers, Python.h ($_HOW_TO_HEADERS)"
}

_pip_install() {
    local log="$VENV/edgellm-install.log"
    say "Installing edgellm and what it needs. llama.cpp is compiled once, for this machine: several minutes on the first run."
    say "(full log: $log)"
    # Only libllama and ggml are used: leaving out llama.cpp's multimodal and command-line libraries halves the build.
    export CMAKE_ARGS="-DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$ROOT/scripts/lib/llama_cpp.cmake' ${CMAKE_ARGS:-}"
    [[ -n "${CMAKE_BUILD_PARALLEL_LEVEL:-}" ]] || _limit_build_jobs
    if ! PIP_USER=0 PYTHONUNBUFFERED=1 "$VENV/bin/python" -m pip --disable-pip-version-check install "$@" 2>&1 |
        tee "$log" | _progress; then
        say ""
        say "The last lines of $log:"
        tail -n 40 "$log" >&2
        die "the installation failed; nothing is lost, run this again once the cause is gone"
    fi
    say "Ready."
}

# One compiler job may take 0.8 GB: on small boards fewer jobs than cores, or the kernel kills the build.
_limit_build_jobs() {
    local name kib _ jobs cores
    [[ -r /proc/meminfo ]] || return 0
    while read -r name kib _; do
        [[ "$name" == MemAvailable: ]] || continue
        jobs=$((kib / 800000)) cores="$(getconf _NPROCESSORS_ONLN)"
        ((jobs < cores)) && export CMAKE_BUILD_PARALLEL_LEVEL="$((jobs > 1 ? jobs : 1))"
        return 0
    done </proc/meminfo
}

# pip's log to the few lines that show where it is; "still running" is pip's own sign of life during a compilation.
_progress() {
    local line
    while IFS= read -r line; do
        case "$line" in
            Collecting*"(from edgellm=="* | Installing\ collected* | Successfully\ installed*) say "  ${line:0:110}" ;;
            *Building\ *wheel*started | *Building\ *still\ running* | *Building\ *finished*) say "  ${line## }" ;;
        esac
    done
}
