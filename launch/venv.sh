# Sourced by launch/demo and launch/test: goes to the repository's root and makes .venv hold what pyproject.toml and
# launch/constraints.txt ask for. Installs only when something is missing or either file changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer found: install one (Debian: apt-get install python3 python3-venv)." >&2
    return 1
}

wanted=$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version) and installing hrgan (5.5 GB, a few minutes the first time) ..."
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt --editable '.[dev]'
    echo "$wanted" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
