//! What the machine offers: CPU features, and cores to pin threads to.

use crate::sys;
use std::{
    arch::x86_64::_rdseed64_step,
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

/// Refuses a CPU without the 64-bit form of RDSEED, by a try: Linux hides the instruction on
/// processors whose shorter forms give too many zeros (AMD-SB-7055), and images use only this one.
/// It is tried on this machine; a virtual machine may still be refused it.
pub fn require_seeds() -> Result<(), String> {
    let mut word = 0;
    // SAFETY: where the instruction is not, a fault ends the child that runs it.
    seeds_from(|| unsafe { _rdseed64_step(&mut word) })
}

/// Refuses a CPU without RDSEED, which `run` executes, and nothing else: a child runs it.
fn seeds_from<T>(run: impl FnOnce() -> T) -> Result<(), String> {
    let mut status = 0;
    // SAFETY: other threads may hold locks, so the child calls nothing but `run` and `_exit`.
    unsafe {
        // A host that ignores how its children end passes that on: none could be waited for.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let child = sys::check("fork", libc::fork())?;
        if child == 0 {
            run();
            libc::_exit(0);
        }
        sys::check("waitpid", libc::waitpid(child, &mut status, 0))?;
    }
    if status == 0 {
        return Ok(());
    }
    if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGILL {
        return Err(
            "this CPU lacks RDSEED, which images make keys by: Intel's have it since Broadwell, \
             AMD's since Zen"
                .into(),
        );
    }
    Err(format!("trying RDSEED ended with status {status:#x}"))
}

/// The tile registers in `XCR0` and where the system is asked for them: tile data, which needs tile
/// configuration.
const TILE_DATA: usize = 18;
pub const TILES: u64 = 3 << 17;

/// Whether an image with these features may use the tile registers of AMX.
pub fn has_tiles(features: &[String]) -> bool {
    features.iter().any(|f| f.starts_with("amx_"))
}

/// Asks the system to let this process use tile registers, or let its virtual machines. A process
/// has them off until it asks, and a locked cell cannot ask.
pub fn permit_tiles(guests: bool) -> Result<(), String> {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const ARCH_REQ_XCOMP_GUEST_PERM: usize = 0x1025;
    let request = [ARCH_REQ_XCOMP_PERM, ARCH_REQ_XCOMP_GUEST_PERM][usize::from(guests)];
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, request, TILE_DATA) };
    sys::check(
        "asking the system for AMX tile registers, which the image needs (Linux 5.16 or newer, 5.17 \
         for virtual machines)",
        result as i32,
    )
    .map(drop)
}

/// Which core each thread is pinned to. Two spinning threads on one core would lose most of their
/// speed, and what one wrote reaches another late that shares no cache with it.
pub enum Placement {
    Pinned(Vec<usize>),
    Unpinned(String),
}

impl Placement {
    /// Distinct cores of the allowed set that share a cache, if so many do, one hardware thread of
    /// every physical core first.
    pub fn choose(threads: usize) -> Result<Self, String> {
        let allowed = allowed()?;
        if allowed.len() < threads {
            return Ok(Self::Unpinned(format!(
                "{threads} threads, but this process may use only {} of the cores",
                allowed.len()
            )));
        }
        let cores = allowed.into_iter().map(|number| Core {
            number,
            physical: topology(number, "topology/thread_siblings_list"),
            cache: topology(number, "cache/index3/shared_cpu_list"),
        });
        Ok(Self::Pinned(nearest(cores, threads)))
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

/// A hardware thread, the physical core that it belongs to, and the last cache that it shares.
struct Core {
    number: usize,
    physical: Option<String>,
    cache: Option<String>,
}

/// The first cache's cores that are enough, each physical core once; else all, those of the cache
/// with most cores first and second hardware threads last.
fn nearest(cores: impl Iterator<Item = Core>, threads: usize) -> Vec<usize> {
    let mut seen = HashSet::new();
    let mut caches: Vec<(Option<String>, Vec<usize>)> = Vec::new();
    let mut second = Vec::new();
    for core in cores {
        if core.physical.is_some_and(|name| !seen.insert(name)) {
            second.push(core.number);
        } else if let Some((_, same)) = caches.iter_mut().find(|(name, _)| *name == core.cache) {
            same.push(core.number);
        } else {
            caches.push((core.cache, vec![core.number]));
        }
    }
    if let Some(enough) = caches.iter().position(|(_, same)| same.len() >= threads) {
        caches.swap(0, enough);
    } else {
        caches.sort_by_key(|(_, same)| std::cmp::Reverse(same.len()));
    }
    let first = caches.into_iter().flat_map(|(_, same)| same);
    first.chain(second).take(threads).collect()
}

/// What the system says of a hardware thread's place; none where it says nothing.
fn topology(core: usize, name: &str) -> Option<String> {
    fs::read_to_string(format!("/sys/devices/system/cpu/cpu{core}/{name}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::asm;

    fn machine(feature: &str) -> bool {
        require(&[feature.to_owned()]).is_ok()
    }

    #[test]
    fn lacking_features_are_named() {
        let features = ["fpu", "nosuch", "neither"].map(str::to_owned);
        let refusal = require(&features).unwrap_err();
        assert!(
            refusal.contains("lacks nosuch, neither, which"),
            "{refusal}"
        );
    }

    #[test]
    fn an_instruction_is_tried() {
        assert_eq!(require_seeds(), Ok(()));
        // SAFETY: `ud2` faults, in the child.
        let refusal = seeds_from(|| unsafe { asm!("ud2") }).unwrap_err();
        assert!(refusal.starts_with("this CPU lacks RDSEED, "), "{refusal}");
        // SAFETY: no memory is involved.
        let killed = seeds_from(|| unsafe { libc::raise(libc::SIGKILL) });
        assert_eq!(killed, Err("trying RDSEED ended with status 0x9".into()));
    }

    fn cores(places: &[(&str, &str)]) -> Vec<Core> {
        let place = |(number, (physical, cache)): (usize, &(&str, &str))| Core {
            number,
            physical: Some((*physical).to_owned()),
            cache: Some((*cache).to_owned()),
        };
        places.iter().enumerate().map(place).collect()
    }

    #[test]
    fn threads_go_to_cores_that_share_a_cache() {
        let apart = [("a", "0"), ("b", "1"), ("c", "1"), ("a", "0"), ("d", "1")];
        let found = |threads| nearest(cores(&apart).into_iter(), threads);
        assert_eq!(found(1), [0]);
        assert_eq!(found(2), [1, 2]);
        assert_eq!(found(3), [1, 2, 4]);
        assert_eq!(found(4), [1, 2, 4, 0]);
        assert_eq!(found(5), [1, 2, 4, 0, 3]);
    }

    #[test]
    fn where_nothing_is_known_cores_are_taken_in_order() {
        let unknown = |number| Core {
            number,
            physical: None,
            cache: None,
        };
        assert_eq!(nearest([3, 5, 8].map(unknown).into_iter(), 2), [3, 5]);
    }

    #[test]
    fn only_an_image_with_amx_has_tiles() {
        assert!(has_tiles(&["fma".to_owned(), "amx_tile".to_owned()]));
        assert!(!has_tiles(&["avx512_bf16".to_owned()]));
        assert!(!has_tiles(&[]));
    }

    #[test]
    fn tiles_are_granted_where_they_are_and_refused_with_a_reason_elsewhere() {
        match permit_tiles(false) {
            Ok(()) => assert!(machine("amx_tile"), "granted without AMX"),
            Err(refusal) => {
                assert!(!machine("amx_tile"), "AMX is here, but: {refusal}");
                assert!(refusal.starts_with("asking the system for AMX tile registers"));
                assert!(refusal.contains("failed: "), "{refusal}");
            }
        }
    }
}
