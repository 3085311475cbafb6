#!/usr/bin/env bash
# Creates or updates the project's own virtual environment, without root and without git.
#
#   bash scripts/venv.sh [EXTRAS]      EXTRAS: comma-separated, from quickstart,serve,recordings,quantized,ray,bench,dev; default none
#   bash scripts/venv.sh --latest ...  renews scripts/constraints.txt: the newest versions that the package allows, in an
#                                      environment of their own in $BLSPKD_VENV/latest; the tests there (...: arguments
#                                      of scripts/test.sh); and if they pass, the list. Once for each Python.
#
# Versions are those of scripts/constraints.txt; to try another torch, which --latest keeps, change its line there.
# BLSPKD_VENV  where (default: .venv beside setup.py)
# PYTHON       the Python 3.11 or 3.12 to use, a path or a name (default: the first one found)
#
# A CPU build of torch is installed unless `nvidia-smi` works, or none is found; a torch that is there already is kept.
# Does nothing, within a second, when all is in place.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${BLSPKD_VENV:-$root/.venv}
pinned=$root/scripts/constraints.txt
latest=no
extras=${1:-}
if [[ $extras == --latest ]]; then
    latest=yes
    shift
    extras=quickstart,serve,recordings,quantized,ray,bench,dev
    venv=$venv/latest
    rm -rf "$venv"
fi
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p;' "$pinned" | head -n 1)
cpu_wheels=https://download.pytorch.org/whl/cpu

mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
py=$venv/bin/python
log=$venv/install.log
stamp=$venv/installed-${extras:-none}

fail() {
    echo "venv.sh: $*" >&2
    exit 1
}

# Whether $1 runs (a pyenv shim may exist and not run), is 3.11 or 3.12 and can make environments (Debian splits that off).
is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

find_python() {
    local name candidate names=(python3.11 python3.12 python3)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        while read -r candidate; do
            if is_usable "$candidate"; then
                echo "$candidate"
                return
            fi
        done < <(type -ap "$name"; ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name" 2>/dev/null)
    done
    [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is no Python 3.11 or 3.12 that can create virtual environments"
    fail "no Python 3.11 or 3.12 with the venv module was found: install one (Debian, Ubuntu: python3.11 and" \
        "python3.11-venv) or set PYTHON to its path"
}

# step LABEL COMMAND...: one line with the seconds it took; what the command printed is shown when it fails.
step() {
    local label=$1 start=$SECONDS
    shift
    printf 'venv: %s ...' "$label"
    if ! "$@" >"$log" 2>&1; then
        printf ' failed after %d s\n' $((SECONDS - start))
        grep -v '^WARNING' "$log" | tail -n 25 >&2
        name_missing
        fail "$label failed; the full output is in $log"
    fi
    printf ' %d s\n' $((SECONDS - start))
}

# Says which of the versions that pip stumbled over are not in its registry, as pip itself does not when they are pinned.
name_missing() {
    local one answer
    while read -r one; do
        answer=$("$py" -m pip install --dry-run --no-deps --ignore-installed "$one" 2>&1) || true
        if [[ $answer == *"ERROR: No matching distribution"* ]]; then
            echo "venv.sh: the package registry has no $one for $("$py" -V) on this machine;" \
                "scripts/venv.sh --latest looks for versions that it has" >&2
        fi
    done < <(sed -n 's/.*(constraint) //p; s/^ERROR: No matching distribution found for //p' "$log" | sort -u)
}

# The constraints are variables because these hold where pip builds a package, too.
pip_install() {
    PIP_CONSTRAINT=$venv/constraints.txt PIP_BUILD_CONSTRAINT=$venv/constraints.txt \
        "$py" -m pip install --disable-pip-version-check --no-input "$@"
}

# The versions to be installed; a torch that is there already keeps its own.
write_constraints() {
    "$py" "$root/scripts/pins.py" constraints >"$venv/constraints.txt"
    if [[ $latest == yes ]]; then
        sed -i '/^torch==/!d' "$venv/constraints.txt"
    fi
}

install_torch() {
    if nvidia-smi >/dev/null 2>&1; then
        pip_install "torch==$torch"
        return
    fi
    # The local version "+cpu" never names a CUDA build. First from where the user's pip looks anyway.
    if pip_install "torch==$torch+cpu" >"$log.torch" 2>&1; then
        return
    fi
    cat "$log.torch"
    grep -q "No matching distribution found for torch" "$log.torch" || return 1
    pip_install "torch==$torch+cpu" --extra-index-url "$cpu_wheels" --retries 1 --timeout 15 && return
    echo "No CPU build of torch $torch for this Python was found; the usual one, several GB, runs on a CPU, too."
    pip_install "torch==$torch" && return
    echo "You may install one of torch 2.6 or later into $venv by yourself: it is kept when you run this again."
    return 1
}

# By hash, since the publisher of this build is not known by name; see blspkd_fairseq/requirements.py.
install_fairseq() {
    cat >"$venv/fairseq.txt" <<'HASHES'
ve-fairseq==0.12.3 \
    --hash=sha256:5e84da7a92db08aae7f9cc3d155d4574d915fe1959dc1e041d514b6ef7bc000a \
    --hash=sha256:9ba18767af12978b4700ac7d9914e6abfe365a50ce17faa6a79e8f07f4129be5
HASHES
    "$py" -m pip install --disable-pip-version-check --no-input --no-deps --require-hashes -r "$venv/fairseq.txt"
}

# An environment that pip, or an older version of this, has filled: transformers fails where torchaudio does.
remove_broken_torchaudio() {
    if "$py" -m pip show -q torchaudio >/dev/null 2>&1 && ! "$py" -c 'import torchaudio' >/dev/null 2>&1; then
        step "without torchaudio, which cannot be loaded" "$py" -m pip uninstall -y torchaudio
    fi
}

# Not by its own requirements, as these ask for fairseq and so for torchaudio.
install_project() {
    pip_install --no-deps --no-build-isolation -e "$root"
}

refuse_other_fairseq() {
    local other
    other=$(PYTHONPATH=$root "$py" -c 'from blspkd_fairseq import compat
print(*(str(one) for one in compat.fairseq_distributions() if not one.is_pinned), sep=", ")')
    [[ -z $other ]] || fail "$venv already has $other, which this would overwrite: set BLSPKD_VENV to another folder"
}

# Identifies a finished installation of extras $1: for which checkout, by which Python.
fingerprint() {
    echo "$root $venv $1 $("$py" -V 2>&1)"
    cat "$root"/{setup.py,pyproject.toml,blspkd_fairseq/requirements.py,scripts/pins.py} "$pinned" "${BASH_SOURCE[0]}"
}

version_of() {
    "$1" -V | grep -o '[0-9]*\.[0-9]*' | head -n 1
}

exec 9>"$venv/lock"
flock 9 # a second caller waits, then finds the work done

# is_installed: with these extras, or with more
is_installed() {
    local done_stamp there extra
    for done_stamp in "$venv"/installed-*; do
        there=${done_stamp##*/installed-}
        for extra in ${extras//,/ }; do
            [[ ,$there, == *,$extra,* ]] || continue 2
        done
        if [[ -f $done_stamp && $(fingerprint "${there/#none/}" | sha256sum) == $(cat "$done_stamp") ]]; then
            return 0
        fi
    done
    return 1
}

if [[ -n ${PYTHON:-} && -x $py ]]; then
    python=$(find_python)
    [[ $(version_of "$py") == $(version_of "$python") ]] ||
        fail "$venv holds $("$py" -V), not that of PYTHON=$PYTHON: delete it or set BLSPKD_VENV"
fi
if is_installed; then
    exit 0
fi
if [[ -f $venv/bin/activate ]] && ! grep -qF "$venv" "$venv/bin/activate"; then
    fail "$venv was made in another place and its commands still point there: delete it and run this again"
fi

if ! "$py" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    step "virtual environment with $("$python" -V) in $venv" "$python" -m venv "$venv"
fi
is_usable "$py" || fail "$venv holds $("$py" -V), and 3.11 or 3.12 is needed: delete it or set BLSPKD_VENV"
refuse_other_fairseq
"$py" "$root/scripts/pins.py" needs "$extras" >"$venv/requirements.txt" || exit
write_constraints
if ! "$py" -c 'import torch' >/dev/null 2>&1; then
    step "torch $torch" install_torch
    write_constraints
fi
step "fairseq" install_fairseq
remove_broken_torchaudio
step "packages${extras:+ of $extras}" pip_install -r "$venv/requirements.txt"
if [[ ,$extras, == *,bench,* ]]; then
    # Alone: its chunked losses need no triton, which is large; a CUDA build of torch has brought it.
    step "liger-kernel" pip_install --no-deps liger-kernel
fi
step "blspkd-fairseq" install_project
fingerprint "$extras" | sha256sum >"$stamp" # last: an interrupted run starts over

if [[ $latest == yes ]]; then
    exec 9>&- # the tests begin by calling this script
    BLSPKD_VENV=$venv bash "$root/scripts/test.sh" "$@"
    "$py" "$root/scripts/pins.py" renew
    echo "venv: the tests passed; these versions now stand in $pinned"
fi
