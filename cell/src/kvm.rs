//! The KVM backend: a virtual machine without kernel or devices, one vCPU a thread slot, in ring 3
//! from its first instruction. The guest's physical addresses are the cell's own addresses of the
//! image, and so are its virtual ones.

use crate::{
    cpu,
    elf::{Image, Rights},
    memory::{BASE, HUGE_PAGE, MAILBOX, MAILBOX_BYTES, PAGE},
    serve::Slot,
    sys,
};
use kvm_bindings::{
    KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use libc::{MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE};
use std::{ops::Range, ptr, slice, sync::Arc};

/// The gate's port, and where the KVM gate lies after the image's entry.
const PORT: u16 = 0x10;
const GATE: usize = 0x10;

/// Page-table entries.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// Where page tables start in the guest, after the page of zeros at 0.
const ROOT: usize = PAGE;
const TABLES_BYTES: usize = 64 << 20;

/// What every image may use of XCR0: x87, SSE, AVX, AVX-512.
const XCR0: u64 = 0xe7;

/// A vCPU stopped at a gate, and the machine that it needs.
pub struct Vcpu {
    slot: usize,
    vcpu: VcpuFd,
    text: Range<usize>,
    _vm: Arc<VmFd>,
}

/// Builds the machine around the loaded image, with the tile registers of AMX where it needs them.
pub fn slots(image: &Image, threads: usize, tiles: bool) -> Result<Vec<Vcpu>, String> {
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(format!(
            "KVM has API version {}, not {KVM_API_VERSION}",
            kvm.get_api_version()
        ));
    }
    let vm = kvm
        .create_vm()
        .map_err(failed("creating a virtual machine"))?;
    let mut tables = Tables::new()?;
    // Page 0 is what the task state and its I/O bitmap are read from: present, zero, out of the
    // image's reach.
    tables.map(0..PAGE, PRESENT | NO_EXECUTE)?;
    let mut regions = vec![(0, tables.memory.as_mut_ptr() as usize, TABLES_BYTES)];
    for segment in &image.segments {
        let rights = match segment.rights {
            Rights::Read => NO_EXECUTE,
            Rights::Execute => 0,
            Rights::Write => WRITABLE | NO_EXECUTE,
        };
        tables.map(segment.memory.clone(), PRESENT | USER | rights)?;
        regions.push((
            segment.memory.start,
            segment.memory.start,
            segment.memory.len(),
        ));
    }
    tables.map(
        MAILBOX..MAILBOX + MAILBOX_BYTES,
        PRESENT | USER | WRITABLE | NO_EXECUTE,
    )?;
    regions.push((MAILBOX, MAILBOX, MAILBOX_BYTES));
    for (slot, (guest, host, bytes)) in regions.into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: guest as u64,
            memory_size: bytes as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the memory is mapped for the life of the process.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(failed("giving memory to the machine"))?;
    }
    let vm = Arc::new(vm);
    let states = if tiles { XCR0 | cpu::TILES } else { XCR0 };
    (0..threads)
        .map(|slot| {
            let vcpu = vcpu(&kvm, &vm, slot, states)?;
            Ok(Vcpu {
                slot,
                vcpu,
                text: image.segments[0].memory.clone(),
                _vm: vm.clone(),
            })
        })
        .collect()
}

impl Slot for Vcpu {
    fn enter(&mut self) -> u32 {
        let slot = self.slot;
        loop {
            let end = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[code])) => return u32::from(code),
                Ok(VcpuExit::Shutdown) => "a fault",
                Ok(VcpuExit::IoOut(..) | VcpuExit::IoIn(..)) => "port input or output",
                Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => {
                    "an access outside its memory"
                }
                Ok(VcpuExit::Hlt) => "a halt",
                Ok(VcpuExit::InternalError) => "an instruction that KVM cannot run",
                Ok(exit) => sys::die(format_args!(
                    "the enclave ended in thread slot {slot}: vCPU exit {exit:?}"
                )),
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(error) => sys::die(format_args!(
                    "the enclave ended in thread slot {slot}: KVM_RUN failed with error {}",
                    error.errno()
                )),
            };
            self.explain(end)
        }
    }
}

impl Vcpu {
    fn explain(&self, end: &str) -> ! {
        let slot = self.slot;
        let registers = self.vcpu.get_regs().unwrap_or_default();
        let (mut rip, rcx) = (registers.rip as usize, registers.rcx as usize);
        if rip == 0 {
            // A software KVM lets `syscall` jump to where nothing is; rcx holds where it came from.
            rip = rcx.wrapping_sub(2);
        }
        let fault = self.vcpu.get_sregs().map_or(0, |registers| registers.cr2);
        let what = match self.system_call(rip) {
            true => "the enclave attempted a system call",
            false => "the enclave faulted",
        };
        sys::die(format_args!(
            "{what} (thread slot {slot}: {end}, instruction at {rip:#x}, last page fault at \
             {fault:#x})"
        ))
    }

    /// Whether `syscall`, `sysenter` or `int n` stands at `rip`.
    fn system_call(&self, rip: usize) -> bool {
        if !self.text.contains(&rip) || !self.text.contains(&(rip + 1)) {
            return false;
        }
        // SAFETY: both bytes lie in the image's text, which stays mapped and is never written.
        let instruction = unsafe { [*(rip as *const u8), *((rip + 1) as *const u8)] };
        matches!(instruction, [0x0f, 0x05 | 0x34] | [0xcd, _])
    }
}

/// A vCPU in 64-bit mode, ring 3, at the KVM gate of the image.
fn vcpu(kvm: &Kvm, vm: &VmFd, slot: usize, wanted: u64) -> Result<VcpuFd, String> {
    let vcpu = vm
        .create_vcpu(slot as u64)
        .map_err(failed("creating a vCPU"))?;
    let features = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&features)
        .map_err(failed("KVM_SET_CPUID2"))?;

    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x13,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut system = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    system.cs = kvm_segment {
        selector: 0xb,
        type_: 11,
        db: 0,
        l: 1,
        ..flat
    };
    for data in [
        &mut system.ds,
        &mut system.es,
        &mut system.fs,
        &mut system.gs,
        &mut system.ss,
    ] {
        *data = flat;
    }
    system.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    system.cr3 = ROOT as u64;
    system.cr4 = 1 << 18 | 0x620; // OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
    system.efer = 0xd00; // NXE, LMA, LME: no SCE, so `syscall` faults
    vcpu.set_sregs(&system).map_err(failed("KVM_SET_SREGS"))?;

    let extended = features
        .as_slice()
        .iter()
        .find(|leaf| (leaf.function, leaf.index) == (0xd, 0));
    let mut states = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    let found = extended.map_or(0x3, |leaf| u64::from(leaf.eax) & wanted);
    if (wanted & !found) & cpu::TILES != 0 {
        return Err(
            "KVM gives virtual machines no AMX tile registers, which the image needs".into(),
        );
    }
    states.xcrs[0].value = found;
    vcpu.set_xcrs(&states).map_err(failed("KVM_SET_XCRS"))?;

    vcpu.set_regs(&kvm_regs {
        rdi: slot as u64,
        rip: (BASE + GATE) as u64,
        rflags: 0x3002, // IOPL 3: the gate may use OUT; any other port ends the cell
        ..Default::default()
    })
    .map_err(failed("KVM_SET_REGS"))?;
    Ok(vcpu)
}

/// Four-level page tables in guest memory from address 0 on, identity-mapped: entry `ROOT` maps
/// everything.
struct Tables {
    memory: &'static mut [u64],
    used: usize,
}

impl Tables {
    fn new() -> Result<Self, String> {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        // SAFETY: a fresh mapping, zero, kept for the life of the process.
        let memory = unsafe {
            let at = libc::mmap(
                ptr::null_mut(),
                TABLES_BYTES,
                PROT_READ | PROT_WRITE,
                flags,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                sys::check("mapping page tables", -1)?;
            }
            slice::from_raw_parts_mut(at.cast(), TABLES_BYTES / 8)
        };
        Ok(Self {
            memory,
            used: ROOT + PAGE,
        })
    }

    /// Maps whole pages, large ones where they fit.
    fn map(&mut self, range: Range<usize>, entry: u64) -> Result<(), String> {
        let mut at = range.start;
        while at < range.end {
            let large = at.is_multiple_of(HUGE_PAGE) && range.end - at >= HUGE_PAGE;
            let (levels, bytes, kind) = if large {
                (2, HUGE_PAGE, LARGE)
            } else {
                (3, PAGE, 0)
            };
            let mut table = ROOT;
            for level in 0..levels {
                table = self.below(table, at >> (39 - 9 * level) & 511)?;
            }
            self.memory[table / 8 + (at >> (39 - 9 * levels) & 511)] = at as u64 | entry | kind;
            at += bytes;
        }
        Ok(())
    }

    /// The table that entry `index` of `table` points to, made where there is none.
    fn below(&mut self, table: usize, index: usize) -> Result<usize, String> {
        let entry = &mut self.memory[table / 8 + index];
        if *entry == 0 {
            if self.used == TABLES_BYTES {
                return Err(
                    "the image needs too many page tables; align its large segments to 2 MiB"
                        .into(),
                );
            }
            *entry = self.used as u64 | PRESENT | WRITABLE | USER;
            self.used += PAGE;
        }
        Ok(*entry as usize & !(PAGE - 1))
    }
}

fn failed(step: &str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |error| format!("{step} failed: {error}")
}
