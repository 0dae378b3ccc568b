//! What the machine offers: CPU features, and cores to pin threads to.

use crate::sys;
use std::{
    collections::HashSet,
    fs,
    mem::{size_of, zeroed},
};

/// Refuses a CPU that lacks one of `features`, named as in /proc/cpuinfo.
pub fn require(features: &[String]) -> Result<(), String> {
    let info = fs::read_to_string("/proc/cpuinfo")
        .map_err(|e| format!("/proc/cpuinfo cannot be read ({e}), so CPU features are unknown"))?;
    let line = info
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let present: HashSet<&str> = line.split_ascii_whitespace().skip(2).collect();
    let missing: Vec<&str> = features
        .iter()
        .map(String::as_str)
        .filter(|f| !present.contains(f))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this CPU lacks {}, which the image needs; build the image for a lower CPU level",
        missing.join(", ")
    ))
}

/// Which core each thread is pinned to. Two spinning threads on one core would lose most of their
/// speed.
pub enum Placement {
    Pinned(Vec<usize>),
    Unpinned(String),
}

impl Placement {
    /// Distinct cores of the allowed set, one hardware thread of every physical core first.
    pub fn choose(threads: usize) -> Result<Self, String> {
        let allowed = allowed()?;
        if allowed.len() < threads {
            return Ok(Self::Unpinned(format!(
                "{threads} threads, but this process may use only {} of the cores",
                allowed.len()
            )));
        }
        let mut seen = HashSet::new();
        let (first, second): (Vec<_>, Vec<_>) = allowed
            .into_iter()
            .partition(|&core| seen.insert(siblings(core)));
        Ok(Self::Pinned(
            first.into_iter().chain(second).take(threads).collect(),
        ))
    }

    /// The core of thread `slot`.
    pub fn core(&self, slot: usize) -> Option<usize> {
        match self {
            Self::Pinned(cores) => cores.get(slot).copied(),
            Self::Unpinned(_) => None,
        }
    }
}

/// Pins the calling thread.
pub fn pin(core: usize) -> Result<(), String> {
    // SAFETY: a cpu_set_t is plain bits; `core` came out of one.
    let result = unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    sys::check(&format!("pinning to core {core}"), result).map(drop)
}

fn allowed() -> Result<Vec<usize>, String> {
    // SAFETY: a cpu_set_t is plain bits, and the call is told its size.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        let result = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        sys::check("sched_getaffinity", result)?;
        Ok((0..libc::CPU_SETSIZE as usize)
            .filter(|&core| libc::CPU_ISSET(core, &set))
            .collect())
    }
}

/// Names the physical core that `core` is a hardware thread of.
fn siblings(core: usize) -> String {
    let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    fs::read_to_string(path).unwrap_or_else(|_| core.to_string())
}
