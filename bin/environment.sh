# Which Python runs ds-tune. Sourced by bin/tune, bin/test and .ci/run, which set $checkout first.
# The answer is left in $python. All that is said goes to stderr: stdout may be ds-tune's JSON.

venv=${checkout:?}/.venv
stamp=$venv/ds-tune-stamp

say() {
    echo "ds-tune: $*" >&2
}

# choose_python [test]: the Python that ds-tune is installed in, or else the checkout's own.
choose_python() {
    installed_python "${1:-}" || checkout_python "${1:-}"
}

installed_python() {
    # No Python is started where there is no such command: that alone can take 0.1 s behind a pyenv shim.
    case $(command -v ds-tune) in
        '' | "$venv"/*) return 1 ;;
    esac
    for python in python3 python; do
        # -P: the ds_tune.egg-info of a checkout in the current directory is no installation.
        "$python" -P -c 'import sys; from importlib.metadata import version; list(map(version, sys.argv[1:]))' \
            ds-tune ${1:+pytest pytest-timeout pytest-xdist} 2>/dev/null && return
    done
    return 1
}

# checkout_python [test]: the Python of .venv, made or brought up to date first where it has to be.
checkout_python() {
    made_from=$(fingerprint)
    up_to_date "${1:-}" || set_up "${1:-}" || exit
    python=$venv/bin/python
    # torch looks for ninja on the PATH when DeepSpeed has it build an operator.
    PATH=$venv/bin:$PATH
    export PATH
}

# What an environment depends on. The kernel driver's own files stand in for nvidia-smi, which can take seconds.
fingerprint() {
    {
        echo "$checkout"
        cat "$checkout/pyproject.toml" "$checkout/constraints.txt" "$checkout/bin/environment.sh"
        grep -hs -e '^NVRM version' -e '^Model' /proc/driver/nvidia/version /proc/driver/nvidia/gpus/*/information |
            sort -u || :
    } | cksum
}

# up_to_date [test]: the environment with the test extra is good for both.
up_to_date() {
    [ -x "$venv/bin/python" ] || return 1
    case $(cat "$stamp" 2>/dev/null) in
        "$made_from ${1:-run}" | "$made_from test") ;;
        *) return 1 ;;
    esac
}

# Can be interrupted anywhere and started again: pip continues, and the stamp is written last.
set_up() (
    [ -w "$checkout" ] || { say "cannot write to $checkout; install ds-tune in an environment of yours"; exit 1; }
    found=$(find_python) || exit
    exec 9>"$checkout/.venv.lock"
    lock "$found" '| fcntl.LOCK_NB' || {
        say "waiting for the set-up that another start is doing"
        lock "$found" || exit 1
    }
    up_to_date "${1:-}" && exit
    log=$venv/setup.log
    torch=$(torch_version)
    say "setting up $venv with $("$found" -V) and torch $torch, once; pip writes to $log"
    say "this takes 2 to 3 minutes with the CPU build of torch; the GPU build is a download of several GB"
    rm -f "$stamp"
    can_make_venv "$venv/bin/python" || "$found" -m venv --clear --without-pip "$venv" || exit 1
    cd "$checkout" || exit 1
    {
        { "$venv/bin/python" -m pip --version || "$venv/bin/python" -m ensurepip; } &&
            "$venv/bin/python" -m pip install -c constraints.txt "torch==$torch" -e ".${1:+[$1]}"
    } >"$log" 2>&1 || {
        say "installing failed, see $log; the same command tries again"
        exit 1
    }
    echo "$made_from ${1:-run}" >"$stamp"
)

# lock PYTHON [FLAG]: fd 9 holds the lock, also after this Python ends, until the last process that has it ends.
lock() {
    "$1" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX ${2:-})" 2>/dev/null
}

# Prints a Python that can make the environment. All pins exist for 3.11 and 3.12; a newer one is worth a try.
find_python() {
    for versions in '< (3, 13)' '>= (3, 13)'; do
        for candidate in python3 python3.12 python3.11 python "$venv/bin/python"; do
            can_make_venv "$candidate" "$versions" && echo "$candidate" && return
        done
    done
    say "found no Python 3.11 or newer that can make a virtual environment (tried python3, python3.12," \
        "python3.11 and python); if you have one, install python3-venv, which Debian and Ubuntu keep apart"
    return 2
}

# can_make_venv PYTHON [VERSIONS]: runs it, because a name on the PATH may be a pyenv shim for a missing version.
can_make_venv() {
    "$1" -c "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info ${2:-})" 2>/dev/null
}

# torch's default wheels: from 2.11 on they have no kernels for Volta (compute capability 7.0) and are built
# for CUDA 13, which needs driver 580. Without a GPU, PIP_EXTRA_INDEX_URL can name an index with the CPU build.
torch_version() {
    gpus=$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null) || gpus=
    echo "$gpus" | awk -F ', *' '
        $1 ~ /^[0-9.]+$/ && ($1 + 0 < 7.5 || int($2) < 580) { old = 1 }
        END { print old ? "2.10.0" : "2.13.0" }'
}
