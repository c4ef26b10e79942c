//! What CPUID tells guests: Intel SDM (2024-12) Vol. 2A, CPUID. The model is built once, from what this host's processor
//! can execute and what the engines implement; after that it is a value that can be printed and compared.
//!
//! The processor that guests see is an Intel one of family 6, model 0x8f ("Sapphire Rapids"), for the sake of the
//! tables in Linux (arch/x86/kernel/cpu/common.c, `cpu_vuln_blacklist`) and its drivers:
//! - it is in no list of Retbleed, GDS, SRBDS, MMIO or RFDS victims, and in no list of INVLPG or PCID errata;
//! - it is new enough for enhanced IBRS, which together with IA32_ARCH_CAPABILITIES (`system::msr`) makes Linux choose
//!   "Enhanced IBRS": no retpolines, no page-table isolation, no buffer clearing; and BHI_CTRL makes it leave branch
//!   history to the processor. All of these cost far more in translated code than on hardware, and there is nothing
//!   that they would protect: guest code never runs untranslated.
//! - without an architectural PMU (leaf 0xa) the performance monitor stays off, and under a hypervisor so do the
//!   drivers for microcode, uncore counters and memory controllers.
//!
//! Time: leaf 0x15 gives the exact frequency of the counter, so Linux calibrates nothing (TSC_KNOWN_FREQ); the
//! invariant counter with TSC_ADJUST makes it trust the counter without a watchdog clocksource.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::{Arc, OnceLock};

use x86::msr::misc_enable;
use x86::paging::PHYSICAL_BITS;
use x86::registers::xcr0;

use crate::xsave;

/// Family 6, model 0x8f, stepping 8.
const SIGNATURE: u32 = 0x0008_06f8;
const MAX_BASIC: u32 = 0x1f;
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Where our own hypervisor leaves begin.
pub const HYPERVISOR: u32 = 0x4000_0000;
/// A second set of hypervisor leaves, in the format that KVM defined (Documentation/virt/kvm/x86/cpuid.rst). Linux
/// uses a local APIC in x2APIC mode without an interrupt remapper only under a hypervisor that it knows, and
/// each access of an x2APIC register is an MSR access in place of a trip through MMIO.
pub const KVM: u32 = 0x4000_0100;
/// KVM_FEATURE_NOP_IO_DELAY: port accesses need no delay after them. No other feature of that interface is offered.
const KVM_FEATURES: u32 = 1 << 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// When a feature is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Translated code runs these instructions as they are, so the host must have them.
    Host,
    /// As `Host`, and the operating system must have enabled the AVX state.
    HostAvx,
    /// Ours (`xsave`), on top of the host's XSAVE.
    HostXsave,
    /// Ours to provide, whatever the host is.
    Always,
    /// Ours, where the operator asks for it: a guest that uses it becomes slower.
    OnRequest,
}
use Rule::{Always, Host, HostAvx, HostXsave, OnRequest};

#[derive(Clone, Copy, Debug)]
struct Feature {
    leaf: u32,
    subleaf: u32,
    register: Register,
    bit: u8,
    rule: Rule,
    /// As /proc/cpuinfo calls it.
    name: &'static str,
}

const fn feature(leaf: u32, subleaf: u32, register: Register, bit: u8, rule: Rule, name: &'static str) -> Feature {
    Feature { leaf, subleaf, register, bit, rule, name }
}

/// Every feature that a guest can be offered. What is not here is never offered: AVX-512, AMX, TSX, MONITOR,
/// CET, LA57, VMX, performance counters, virtual-8086 extensions (VME).
const FEATURES: &[Feature] = &[
    feature(1, 0, Edx, 0, Host, "fpu"),
    feature(1, 0, Edx, 2, Always, "de"),
    feature(1, 0, Edx, 3, Always, "pse"),
    feature(1, 0, Edx, 4, Always, "tsc"),
    feature(1, 0, Edx, 5, Always, "msr"),
    feature(1, 0, Edx, 6, Always, "pae"),
    feature(1, 0, Edx, 7, Always, "mce"),
    feature(1, 0, Edx, 8, Host, "cx8"),
    // Bit 9 (apic) follows IA32_APIC_BASE.
    feature(1, 0, Edx, 11, Always, "sep"),
    feature(1, 0, Edx, 12, Always, "mtrr"),
    feature(1, 0, Edx, 13, Always, "pge"),
    feature(1, 0, Edx, 14, Always, "mca"),
    feature(1, 0, Edx, 15, Host, "cmov"),
    feature(1, 0, Edx, 16, Always, "pat"),
    feature(1, 0, Edx, 17, Always, "pse36"),
    feature(1, 0, Edx, 19, Always, "clflush"),
    feature(1, 0, Edx, 23, Host, "mmx"),
    feature(1, 0, Edx, 24, Host, "fxsr"),
    feature(1, 0, Edx, 25, Host, "sse"),
    feature(1, 0, Edx, 26, Host, "sse2"),
    // Self-snoop: changes of memory types need no WBINVD.
    feature(1, 0, Edx, 27, Always, "ss"),
    feature(1, 0, Ecx, 0, Host, "pni"),
    feature(1, 0, Ecx, 1, Host, "pclmulqdq"),
    feature(1, 0, Ecx, 9, Host, "ssse3"),
    feature(1, 0, Ecx, 12, HostAvx, "fma"),
    feature(1, 0, Ecx, 13, Host, "cx16"),
    feature(1, 0, Ecx, 17, Always, "pcid"),
    feature(1, 0, Ecx, 19, Host, "sse4_1"),
    feature(1, 0, Ecx, 20, Host, "sse4_2"),
    feature(1, 0, Ecx, 21, Always, "x2apic"),
    feature(1, 0, Ecx, 22, Host, "movbe"),
    feature(1, 0, Ecx, 23, Host, "popcnt"),
    feature(1, 0, Ecx, 24, Always, "tsc_deadline_timer"),
    feature(1, 0, Ecx, 25, Host, "aes"),
    feature(1, 0, Ecx, 26, HostXsave, "xsave"),
    // Bit 27 (osxsave) follows CR4.
    feature(1, 0, Ecx, 28, HostAvx, "avx"),
    feature(1, 0, Ecx, 29, HostAvx, "f16c"),
    feature(1, 0, Ecx, 30, Host, "rdrand"),
    feature(1, 0, Ecx, 31, Always, "hypervisor"),
    // The local APIC timer runs whatever the sleep state.
    feature(6, 0, Eax, 2, Always, "arat"),
    feature(7, 0, Ebx, 0, Always, "fsgsbase"),
    feature(7, 0, Ebx, 1, Always, "tsc_adjust"),
    feature(7, 0, Ebx, 3, Host, "bmi1"),
    feature(7, 0, Ebx, 5, HostAvx, "avx2"),
    // x87 instruction pointers are whatever the host's FPU makes of them.
    feature(7, 0, Ebx, 6, Host, "fdp_excptn_only"),
    feature(7, 0, Ebx, 7, Always, "smep"),
    feature(7, 0, Ebx, 8, Host, "bmi2"),
    // REP MOVSB and STOSB are one host operation a page: faster in every engine than a loop of translated moves.
    feature(7, 0, Ebx, 9, Always, "erms"),
    feature(7, 0, Ebx, 10, Always, "invpcid"),
    feature(7, 0, Ebx, 13, Host, "zero_fcs_fds"),
    feature(7, 0, Ebx, 18, Host, "rdseed"),
    feature(7, 0, Ebx, 19, Host, "adx"),
    feature(7, 0, Ebx, 20, Always, "smap"),
    feature(7, 0, Ebx, 29, Host, "sha_ni"),
    feature(7, 0, Ecx, 2, Always, "umip"),
    feature(7, 0, Ecx, 3, OnRequest, "pku"),
    // Bit 4 (ospke) follows CR4.
    feature(7, 0, Ecx, 8, Host, "gfni"),
    feature(7, 0, Ecx, 9, HostAvx, "vaes"),
    feature(7, 0, Ecx, 10, HostAvx, "vpclmulqdq"),
    feature(7, 0, Ecx, 22, Always, "rdpid"),
    feature(7, 0, Ecx, 31, OnRequest, "pks"),
    feature(7, 0, Edx, 4, Always, "fsrm"),
    // Nothing to do under either engine; without it Linux serializes itself by an IRET at every patch of its text.
    feature(7, 0, Edx, 14, Always, "serialize"),
    // IBRS and IBPB: IA32_SPEC_CTRL and IA32_PRED_CMD.
    feature(7, 0, Edx, 26, Always, "spec_ctrl"),
    feature(7, 0, Edx, 27, Always, "intel_stibp"),
    feature(7, 0, Edx, 29, Always, "arch_capabilities"),
    feature(7, 0, Edx, 31, Always, "spec_ctrl_ssbd"),
    // Linux with the mitigation of ITS (2025, in all stable series) clears the branch history at every system call even
    // where BHI_NO is set, unless it can leave that to IA32_SPEC_CTRL.BHI_DIS_S.
    feature(7, 2, Edx, 4, Always, "bhi_ctrl"),
    feature(7, 2, Edx, 5, Always, "mcdt_no"),
    feature(0xd, 1, Eax, 0, HostXsave, "xsaveopt"),
    feature(0xd, 1, Eax, 1, HostXsave, "xsavec"),
    feature(0xd, 1, Eax, 2, HostXsave, "xgetbv1"),
    feature(0xd, 1, Eax, 3, HostXsave, "xsaves"),
    feature(0x8000_0001, 0, Ecx, 0, Always, "lahf_lm"),
    feature(0x8000_0001, 0, Ecx, 5, Host, "abm"),
    feature(0x8000_0001, 0, Ecx, 8, Always, "3dnowprefetch"),
    feature(0x8000_0001, 0, Edx, 11, Always, "syscall"),
    feature(0x8000_0001, 0, Edx, 20, Always, "nx"),
    feature(0x8000_0001, 0, Edx, 26, Always, "pdpe1gb"),
    feature(0x8000_0001, 0, Edx, 27, Always, "rdtscp"),
    feature(0x8000_0001, 0, Edx, 29, Always, "lm"),
    feature(0x8000_0007, 0, Edx, 8, Always, "nonstop_tsc"),
];

/// What depends on the state of the processor that asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// CR4.PKE.
    pub ospke: bool,
    pub xcr0: u64,
    pub apic_id: u32,
    pub apic_enabled: bool,
    /// IA32_MISC_ENABLE: it can hide what is there.
    pub misc_enable: u64,
}

/// EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

/// The processor that guests see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidModel {
    /// Which of [`FEATURES`] are offered.
    offered: Vec<bool>,
    cpus: u32,
    tsc_hz: u64,
}

fn word(registers: Registers, register: Register) -> u32 {
    registers[register as usize]
}

/// What the host's processor answers.
fn host(leaf: u32, subleaf: u32) -> Registers {
    let highest = __cpuid(leaf & 0x8000_0000).eax;
    if leaf > highest {
        return [0; 4];
    }
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// What tells processors with different instructions apart, of the host.
#[must_use]
pub fn host_features() -> Vec<u64> {
    let highest = [__cpuid(0).eax, __cpuid(0x8000_0000).eax];
    let mut words = Vec::new();
    for (leaf, subleaf) in [(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0)] {
        if leaf <= highest[usize::from(leaf >= 0x8000_0000)] {
            let found = __cpuid_count(leaf, subleaf);
            // EBX of leaf 1 names the core, of leaf 0xd the size of what is enabled now.
            let other = if matches!(leaf, 1 | 0xd) { 0 } else { found.ebx };
            words.extend([found.eax, other, found.ecx, found.edx].map(u64::from));
        }
    }
    words
}

impl CpuidModel {
    /// The features that are only offered on request.
    pub fn on_request() -> impl Iterator<Item = &'static str> {
        FEATURES.iter().filter(|feature| feature.rule == OnRequest).map(|feature| feature.name)
    }

    /// The model for a guest of `cpus` processors on this host, with those features `on_request`. Its time stamp counter is the
    /// host's.
    #[must_use]
    pub fn of_host(cpus: u32, on_request: &[String]) -> CpuidModel {
        // Looks at XCR0, too: whether the host's operating system saves the AVX state.
        let avx = std::arch::is_x86_feature_detected!("avx");
        let xsave = std::arch::is_x86_feature_detected!("xsave");
        let offered = FEATURES
            .iter()
            .map(|feature| {
                let has = || word(host(feature.leaf, feature.subleaf), feature.register) & 1 << feature.bit != 0;
                match feature.rule {
                    Host => has(),
                    HostAvx => avx && has(),
                    HostXsave => xsave,
                    Always => true,
                    OnRequest => on_request.iter().any(|name| name == feature.name),
                }
            })
            .collect();
        CpuidModel { offered, cpus: cpus.max(1), tsc_hz: ::host::clock::host_tsc_hz() }
    }

    /// The model of this host for one processor, made once.
    #[must_use]
    pub fn shared() -> Arc<CpuidModel> {
        static MODEL: OnceLock<Arc<CpuidModel>> = OnceLock::new();
        Arc::clone(MODEL.get_or_init(|| Arc::new(CpuidModel::of_host(1, &[]))))
    }

    /// Frequency at which the local APIC's timer counts (before its divider), as leaf 0x15 tells. It is the counter's own,
    /// or half of it where 32 bits cannot hold that: the least rounding in the kilohertz that Linux computes with.
    #[must_use]
    pub fn apic_timer_hz(&self) -> u64 {
        self.tsc_hz / self.tsc_ratio()
    }

    fn tsc_ratio(&self) -> u64 {
        self.tsc_hz / (1 << 32) + 1
    }

    /// Processors of the machine.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    #[must_use]
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Whether a feature is offered, by the name that /proc/cpuinfo gives it.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.features().any(|(known, offered)| known == name && offered)
    }

    /// All features that could be offered, and whether they are.
    pub fn features(&self) -> impl Iterator<Item = (&'static str, bool)> {
        FEATURES.iter().zip(&self.offered).map(|(feature, offered)| (feature.name, *offered))
    }

    /// State components that XCR0 may enable.
    #[must_use]
    pub fn xcr0_supported(&self) -> u64 {
        let avx = if self.has("avx") { xcr0::AVX } else { 0 };
        let pkru = if self.has("pku") && self.has("xsave") { xcr0::PKRU } else { 0 };
        xcr0::X87 | xcr0::SSE | avx | pkru
    }

    /// Size of the standard XSAVE area for these components, SDM Vol. 1 13.4.
    fn xsave_size(components: u64) -> u32 {
        if components & xcr0::PKRU != 0 {
            xsave::PKRU_OFFSET + xsave::PKRU_SIZE
        } else if components & xcr0::AVX != 0 {
            xsave::AVX_OFFSET + xsave::AVX_SIZE
        } else {
            xsave::AVX_OFFSET
        }
    }

    /// Size of the compacted area, where each component is behind those that are there.
    fn compacted_size(components: u64) -> u32 {
        let avx = if components & xcr0::AVX != 0 { xsave::AVX_SIZE } else { 0 };
        let pkru = if components & xcr0::PKRU != 0 { xsave::PKRU_SIZE } else { 0 };
        xsave::AVX_OFFSET + avx + pkru
    }

    /// What CPUID answers.
    #[must_use]
    pub fn query(&self, leaf: u32, subleaf: u32, now: Now) -> Registers {
        // An unknown basic or extended leaf gives what the highest basic leaf would, an unknown hypervisor leaf nothing.
        let leaf = match leaf {
            0..=MAX_BASIC | 0x4000_0000..=0x4fff_ffff | 0x8000_0000..=MAX_EXTENDED => leaf,
            _ => MAX_BASIC,
        };
        let mut answer = self.fixed(leaf, subleaf, now);
        for (feature, _) in FEATURES.iter().zip(&self.offered).filter(|(_, offered)| **offered) {
            if feature.leaf == leaf && feature.subleaf == subleaf_of(leaf, subleaf) {
                answer[feature.register as usize] |= 1 << feature.bit;
            }
        }
        // SDM Vol. 4 Table 2-2: with "Limit CPUID Maxval" leaf 0 says 2, and "XD Bit Disable" clears that feature.
        if leaf == 0 && now.misc_enable & misc_enable::LIMIT_CPUID != 0 {
            answer[Eax as usize] = 2;
        }
        if leaf == 0x8000_0001 && now.misc_enable & misc_enable::XD_DISABLE != 0 {
            answer[Edx as usize] &= !(1 << 20);
        }
        answer
    }

    /// What is not a feature bit.
    fn fixed(&self, leaf: u32, subleaf: u32, now: Now) -> Registers {
        let xsave = self.has("xsave");
        match leaf {
            0 => {
                let [b, d, c] = text(b"GenuineIntel");
                [MAX_BASIC, b, c, d]
            }
            1 => {
                // APIC ID, number of IDs reserved for the package, CLFLUSH line in units of 8 bytes.
                let ebx = now.apic_id << 24 | self.cpus.next_power_of_two().min(255) << 16 | 8 << 8;
                let ecx = u32::from(now.osxsave && xsave) << 27;
                let edx = u32::from(now.apic_enabled) << 9 | u32::from(self.cpus > 1) << 28;
                [SIGNATURE, ebx, ecx, edx]
            }
            // "Leaf 2 gives nothing, look at leaf 4", and one line of prefetch.
            2 => [0x00fe_ff01, 0, 0, 0],
            4 => self.cache(subleaf),
            // The last subleaf.
            7 if subleaf == 0 => [2, 0, u32::from(now.ospke) << 4, 0],
            0xb | 0x1f => self.topology(subleaf, now.apic_id),
            0xd if xsave => self.xsave(subleaf, now),
            0x15 => [1, self.tsc_ratio() as u32, self.apic_timer_hz() as u32, 0],
            // Base and highest frequency of the processor and of the bus, in megahertz.
            0x16 => {
                let megahertz = (self.tsc_hz / 1_000_000) as u32;
                [megahertz, megahertz, 100, 0]
            }
            HYPERVISOR => {
                let [b, c, d] = text(b"RingZeroVMM\0");
                [HYPERVISOR, b, c, d]
            }
            KVM => {
                let [b, c, d] = text(b"KVMKVMKVM\0\0\0");
                [KVM + 1, b, c, d]
            }
            0x4000_0101 => [KVM_FEATURES, 0, 0, 0],
            0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
            0x8000_0002..=0x8000_0004 => brand(leaf - 0x8000_0002),
            // L2: 64-byte lines, 8 ways, 2 MiB; as leaf 4 has it.
            0x8000_0006 => [0, 0, 2048 << 16 | 6 << 12 | 64, 0],
            // Widths of physical and linear addresses.
            0x8000_0008 => [48 << 8 | PHYSICAL_BITS, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// Leaf 4: caches of a plain modern processor. They steer how memory is cut up by libraries, nothing else.
    fn cache(&self, subleaf: u32) -> Registers {
        // Type (1 data, 2 code, 3 both), level, ways, sets, shared by all.
        let (kind, level, ways, sets, shared) = match subleaf {
            0 => (1, 1, 12, 64, false),
            1 => (2, 1, 8, 64, false),
            2 => (3, 2, 8, 4096, false),
            3 => (3, 3, 16, 16384, true),
            _ => return [0; 4],
        };
        let ids = self.cpus.next_power_of_two().min(64) - 1;
        let sharing = if shared { ids } else { 0 };
        let self_initializing = 1 << 8;
        let eax = kind | level << 5 | self_initializing | sharing << 14 | ids << 26;
        [eax, (ways - 1) << 22 | 63, sets - 1, 0]
    }

    /// Leaves 0xb and 0x1f: one package of `cpus` cores, each with one thread.
    fn topology(&self, subleaf: u32, apic_id: u32) -> Registers {
        let bits = self.cpus.next_power_of_two().trailing_zeros();
        match subleaf {
            0 => [0, 1, 1 << 8, apic_id],
            1 => [bits, self.cpus, 2 << 8 | 1, apic_id],
            _ => [0, 0, subleaf & 0xff, apic_id],
        }
    }

    /// Leaf 0xd: which state XSAVE saves, and where.
    fn xsave(&self, subleaf: u32, now: Now) -> Registers {
        let supported = self.xcr0_supported();
        match subleaf {
            0 => [supported as u32, Self::xsave_size(now.xcr0), Self::xsave_size(supported), 0],
            // The features are in EAX; EBX is defined when one of them is there.
            1 => [0, Self::compacted_size(now.xcr0), 0, 0],
            2 if supported & xcr0::AVX != 0 => [xsave::AVX_SIZE, xsave::AVX_OFFSET, 0, 0],
            9 if supported & xcr0::PKRU != 0 => [xsave::PKRU_SIZE, xsave::PKRU_OFFSET, 0, 0],
            _ => [0; 4],
        }
    }

    /// Every leaf and subleaf as processor 0 sees it after reset, for people and for comparisons.
    #[must_use]
    pub fn table(&self) -> Vec<(u32, u32, Registers)> {
        let now = Now { xcr0: xcr0::X87, apic_enabled: true, ..Now::default() };
        let basic = (0..=MAX_BASIC).flat_map(|leaf| {
            let last = match leaf {
                4 => 3,
                0xb | 0x1f => 1,
                7 => 2,
                0xd => 9,
                _ => 0,
            };
            (0..=last).map(move |subleaf| (leaf, subleaf))
        });
        let others = [HYPERVISOR, KVM, KVM + 1].into_iter().chain(0x8000_0000..=MAX_EXTENDED).map(|leaf| (leaf, 0));
        let row = |(leaf, subleaf)| (leaf, subleaf, self.query(leaf, subleaf, now));
        basic.chain(others).map(row).filter(|(.., registers)| *registers != [0; 4]).collect()
    }
}

/// Most leaves do not look at ECX.
fn subleaf_of(leaf: u32, subleaf: u32) -> u32 {
    match leaf {
        4 | 7 | 0xb | 0xd | 0x1f => subleaf,
        _ => 0,
    }
}

/// Twelve letters in three registers.
fn text(letters: &[u8; 12]) -> [u32; 3] {
    let at = |index: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| letters[index * 4 + byte]));
    [at(0), at(1), at(2)]
}

/// A third of the brand string.
fn brand(third: u32) -> Registers {
    const NAME: &[u8; 48] = b"ringzero virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let at = |register: usize| {
        let start = third as usize * 16 + register * 4;
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| NAME.get(start + byte).copied().unwrap_or(0)))
    };
    [at(0), at(1), at(2), at(3)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything but what is there on request.
    fn model() -> CpuidModel {
        let offered = FEATURES.iter().map(|feature| feature.rule != OnRequest).collect();
        CpuidModel { offered, cpus: 2, tsc_hz: 2_599_998_765 }
    }

    #[test]
    fn protection_keys_are_there_on_request_with_their_state() {
        let enabled = Now { xcr0: xcr0::X87 | xcr0::SSE | xcr0::PKRU, ospke: true, ..Now::default() };
        assert_eq!(CpuidModel::on_request().collect::<Vec<_>>(), ["pku", "pks"]);
        assert_eq!(model().query(7, 0, Now::default())[2] & (1 << 3 | 1 << 4 | 1 << 31), 0);
        assert_eq!(model().query(0xd, 9, Now::default()), [0; 4]);
        let requested = CpuidModel { offered: vec![true; FEATURES.len()], ..model() };
        assert_eq!(requested.query(7, 0, enabled)[2] & (1 << 3 | 1 << 4 | 1 << 31), 1 << 3 | 1 << 4 | 1 << 31);
        assert_eq!(requested.query(0xd, 0, enabled), [0x207, 840, 840, 0]);
        assert_eq!(requested.query(0xd, 1, enabled)[1], 584, "without AVX in between");
        assert_eq!(requested.query(0xd, 9, enabled), [8, 832, 0, 0]);
        assert!(!CpuidModel::of_host(1, &["pks".to_owned()]).has("pku"));
    }

    #[test]
    fn linux_computes_the_frequency_of_the_counter_to_the_kilohertz() {
        for tsc_hz in [1_000_000_000, 2_599_998_765, 4_294_967_295, 4_500_123_456, 5_700_000_000] {
            let model = CpuidModel { tsc_hz, ..model() };
            let [denominator, numerator, crystal, _] = model.query(0x15, 0, Now::default());
            // As native_calibrate_tsc does it, in 32 bits.
            let khz = (crystal / 1000).checked_mul(numerator).unwrap() / denominator;
            assert!(u64::from(khz).abs_diff(tsc_hz / 1000) <= 1, "{khz} {tsc_hz}");
        }
    }

    #[test]
    fn state_of_the_processor_shows() {
        let asleep = model().query(1, 0, Now::default());
        let awake = Now { osxsave: true, xcr0: 7, apic_id: 1, apic_enabled: true, ..Now::default() };
        let [_, ebx, ecx, edx] = model().query(1, 0, awake);
        assert_eq!((asleep[2] >> 27 & 1, ecx >> 27 & 1), (0, 1));
        assert_eq!((asleep[3] >> 9 & 1, edx >> 9 & 1), (0, 1));
        assert_eq!(ebx >> 24, 1);
        assert_eq!(model().query(0xb, 1, awake), [1, 2, 0x201, 1]);
        assert_eq!(model().query(0xd, 0, Now::default())[1], 576);
        assert_eq!(model().query(0xd, 0, awake), [7, 832, 832, 0]);
    }

    #[test]
    fn unknown_leaves_answer_as_intel_says() {
        let now = Now::default();
        assert_eq!(model().query(0x2000, 0, now), model().query(MAX_BASIC, 0, now));
        assert_eq!(model().query(0x8000_1000, 1, now), model().query(MAX_BASIC, 1, now));
        assert_eq!(model().query(0x4000_0010, 0, now), [0; 4]);
        assert_eq!(model().query(7, 1, now), [0; 4]);
        assert_eq!(model().query(1, 9, now), model().query(1, 0, now), "leaf 1 has no subleaves");
    }

    #[test]
    fn nothing_is_offered_that_the_host_cannot_run() {
        let model = CpuidModel::of_host(1, &[]);
        for (feature, offered) in FEATURES.iter().zip(&model.offered) {
            if matches!(feature.rule, Host | HostAvx) && *offered {
                assert_ne!(word(host(feature.leaf, feature.subleaf), feature.register) & 1 << feature.bit, 0);
            }
        }
        // AVX-512 and AMX components never show, whatever the host has.
        assert_eq!(model.query(0xd, 0, Now::default())[0] & !7, 0);
        assert_eq!(model.query(7, 0, Now::default())[1] & (1 << 16), 0);
    }

    #[test]
    fn vendor_and_brand_are_text() {
        let now = Now::default();
        let [_, b, c, d] = model().query(0, 0, now);
        let letters: Vec<u8> = [b, d, c].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(letters, b"GenuineIntel");
        assert!(model().table().iter().any(|(leaf, _, registers)| *leaf == 0x8000_0002 && registers[0] != 0));
    }
}
