#!/usr/bin/env bash
# What somebody does first who has the repository and a plain Debian or Ubuntu, and nothing of this
# machine's: the last commit, an empty home, /usr/bin/python3, an environment without variables.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
mkdir "$scratch/home"

# Runs a command in a clone, and shows the end of what it printed; where it fails, all of it.
newcomer() {
  echo "== $2"
  [[ -d $scratch/$1 ]] || git clone -q . "$scratch/$1"
  if ! (cd "$scratch/$1" && env -i HOME="$scratch/home" PATH=/usr/bin:/bin sh -ec "$2") \
    >"$scratch/log" 2>&1; then
    cat "$scratch/log"
    echo "== failed: $2"
    exit 1
  fi
  tail -n 25 "$scratch/log"
}

install=$(sed -n '/^## Install$/,/^```$/p' README.md | sed '1,/^```sh$/d; /^```$/d')
newcomer readme "python3 -m venv ~/venv && . ~/venv/bin/activate
$install"
newcomer make "make test"
newcomer make "make finetune"
