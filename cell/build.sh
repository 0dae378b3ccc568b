#!/bin/sh
# usage: build.sh OUTDIR    builds OUTDIR/cell, a static executable
set -eu
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
# The folder of the registry would else stand in the messages of panics.
registry="--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}/registry/src=/crates"
cargo build --release --locked --quiet \
    --config "target.x86_64-unknown-linux-gnu.rustflags = ['$registry']"
built=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu/release/cell
# Moved into place, because a running cell may be executing the old file.
cp "$built" "$out/cell.new"
mv "$out/cell.new" "$out/cell"
