//! The cell: maps an enclave image at its fixed addresses, donates threads to its slots, and
//! carries frames between the host (file descriptors 0 and 1) and the mailbox.
//!
//! Nobody trusts the cell. It confines the enclave (a hostile image ends the cell, nothing else)
//! and explains what happened. Frames are `u32 length ‖ message`, little-endian, at most 1 MiB of
//! message. The first frame to the host is JSON:
//!
//! ```json
//! {"threads": 2, "cores": [0, 1], "unpinned": null}
//! ```
//!
//! or no cores and the reason. A length of `0xffff_ffff` starts the last words of a cell: text up
//! to the end of the stream.

mod cpu;
mod elf;
mod filter;
mod kvm;
mod memory;
mod process;
mod serve;
mod sys;

use std::{convert::Infallible, env, path::PathBuf, process::exit};

const USAGE: &str = "usage: cell --backend process|kvm --threads N --require FEATURE,… IMAGE
Speaks frames on file descriptors 0 and 1; started by myelin.cell, not by hand.";

enum Backend {
    Process,
    Kvm,
}

struct Options {
    backend: Backend,
    threads: usize,
    required: Vec<String>,
    image: PathBuf,
}

fn main() {
    let Some(options) = parse(env::args().skip(1)) else {
        eprintln!("{USAGE}");
        exit(2)
    };
    match run(options) {
        Err(reason) => sys::die(format_args!("it did not start: {reason}")),
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
    let (mut backend, mut threads, mut required, mut image) = (None, None, Vec::new(), None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--backend" => {
                backend = Some(match arguments.next()?.as_str() {
                    "process" => Backend::Process,
                    "kvm" => Backend::Kvm,
                    _ => return None,
                });
            }
            "--threads" => {
                let count = arguments.next()?.parse().ok()?;
                threads = (1..=memory::MAX_SLOTS).contains(&count).then_some(count);
            }
            "--require" => {
                let names = arguments.next()?;
                required.extend(
                    names
                        .split(',')
                        .filter(|n| !n.is_empty())
                        .map(str::to_owned),
                );
            }
            _ if argument.starts_with('-') || image.is_some() => return None,
            _ => image = Some(PathBuf::from(argument)),
        }
    }
    Some(Options {
        backend: backend?,
        threads: threads?,
        required,
        image: image?,
    })
}

fn run(options: Options) -> Result<Infallible, String> {
    sys::harden()?;
    cpu::require(&options.required)?;
    cpu::require_seeds()?;
    let tiles = cpu::has_tiles(&options.required);
    if tiles {
        cpu::permit_tiles(matches!(options.backend, Backend::Kvm))?;
    }
    let placement = cpu::Placement::choose(options.threads)?;
    let image = elf::Image::read(&options.image)?;
    memory::load(&image)?;
    match options.backend {
        Backend::Process => {
            let slots = process::slots(&image, options.threads);
            serve::serve(slots, placement, filter::PROCESS)
        }
        Backend::Kvm => {
            let slots = kvm::slots(&image, options.threads, tiles)?;
            serve::serve(slots, placement, filter::KVM)
        }
    }
}
