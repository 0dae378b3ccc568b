#!/bin/sh
# Builds the enclave runtime of one CPU level: build.sh LEVEL OUTDIR writes OUTDIR/libmyelin_enclave.a;
# build.sh LEVEL OUTDIR EXAMPLE an example of a crate in the same way, for this machine: OUTDIR/EXAMPLE.
# Levels of one family of processors take the runtime of x86-64-v4 (src/myelin/cpu.py).
# The bytes depend on nothing but the sources, Cargo.lock, the toolchain and the level: not on folders or the machine.
set -eu
level=${1:?"usage: build.sh LEVEL OUTDIR [EXAMPLE]"}
mkdir -p "${2:?"usage: build.sh LEVEL OUTDIR [EXAMPLE]"}"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")"
features=+aes,+pclmulqdq,+rdrand,+rdseed
case $level in
    x86-64-v3) ;;
    x86-64-v4) features=$features,+sha,+vaes,+vpclmulqdq ;;
    *) echo "build.sh: level $level is unknown; give x86-64-v3 or x86-64-v4" >&2; exit 2 ;;
esac
target=x86_64-unknown-linux-gnu
case ${3-} in
    "") set -- libmyelin_enclave.a --package myelin-gate ;;
    *) set -- "examples/$3" --example "$3" ;;
esac
made=$1
shift
cargo fetch --quiet --locked --target "$target"

# One flag a line, because folders may have spaces. Naming the target keeps the flags away from procedural macros,
# which a static relocation model would break.
flags=$(
    printf '%s\n' -Ctarget-cpu="$level" -Ctarget-feature="$features" -Crelocation-model=static -Ccode-model=small
    printf '%s\n' --remap-path-prefix="$PWD=/enclave"
    for crates in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do
        printf '%s\n' --remap-path-prefix="$crates=/crates"
    done
)
CARGO_ENCODED_RUSTFLAGS=$(printf '%s' "$flags" | tr '\n' '\037') \
    cargo build --quiet --release --locked "$@" --target "$target" --target-dir "$PWD/target/$level"
cp "target/$level/$target/release/$made" "$out/"
