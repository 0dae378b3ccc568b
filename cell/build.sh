#!/bin/sh
# usage: build.sh OUTDIR    builds OUTDIR/cell, a static executable
set -eu
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
cargo build --release --locked --quiet
built=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu/release/cell
# Moved into place, because a running cell may be executing the old file.
cp "$built" "$out/cell.new"
mv "$out/cell.new" "$out/cell"
