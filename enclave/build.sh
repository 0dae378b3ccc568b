#!/bin/sh
# Builds the enclave runtime of one CPU level: build.sh LEVEL OUTDIR writes OUTDIR/libmyelin_enclave.a.
# The bytes depend on nothing but the sources, Cargo.lock, the toolchain and the level: not on folders or the machine.
set -eu
level=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")"
features=+aes,+pclmulqdq,+rdrand,+rdseed
case $level in
    x86-64-v3) ;;
    x86-64-v4) features=$features,+sha,+vaes,+vpclmulqdq ;;
    *) echo "build.sh: level $level is unknown; give x86-64-v3 or x86-64-v4" >&2; exit 2 ;;
esac
cargo_home=${CARGO_HOME:-$HOME/.cargo}
target=x86_64-unknown-linux-gnu
# Naming the target keeps these flags away from procedural macros, which a static relocation model would break.
RUSTFLAGS="-C target-cpu=$level -C target-feature=$features -C relocation-model=static -C code-model=small \
    --remap-path-prefix=$PWD=/enclave --remap-path-prefix=$cargo_home=/cargo" \
    cargo build --quiet --release --locked --package myelin-gate --target "$target" --target-dir "$PWD/target/$level"
cp "target/$level/$target/release/libmyelin_enclave.a" "$out/libmyelin_enclave.a"
