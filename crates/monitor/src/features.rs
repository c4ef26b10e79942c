//! What the host offers: `ringzero doctor`.

use std::arch::x86_64::__cpuid;
use std::fs::{File, OpenOptions};
use std::path::Path;

use host::map::{Map, PAGE, Protection, memfd};
use host::tracee::Tracee;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Feature {
    Flag(bool),
    Number(u64),
    Text(String),
}

/// Registers of CPUID as the text that they hold.
fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers.iter().flat_map(|register| register.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(|c: char| c == '\0' || c.is_whitespace()).to_string()
}

fn brand() -> String {
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return String::new();
    }
    let leaves = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(__cpuid);
    text(&leaves.map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).concat())
}

/// Keys of the auxiliary vector, Linux include/uapi/linux/auxvec.h.
const AT_PAGESZ: u64 = 6;
const AT_HWCAP2: u64 = 26;

/// An entry of the vector in which the kernel tells this process of its machine.
fn auxiliary(wanted: u64) -> Option<u64> {
    let vector = std::fs::read("/proc/self/auxv").ok()?;
    let (words, _) = vector.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let pair = pairs.iter().find(|[key, _]| u64::from_ne_bytes(*key) == wanted)?;
    Some(u64::from_ne_bytes(pair[1]))
}

/// Whether user code may use RDFSBASE and WRGSBASE: the kernel says so in AT_HWCAP2 bit 1 (Linux
/// Documentation/arch/x86/x86_64/fsgs.rst); CPUID alone does not tell.
fn fsgsbase() -> bool {
    auxiliary(AT_HWCAP2).is_some_and(|bits| bits & 2 != 0)
}

/// Whether memory that was written may be made executable, as a translator must.
fn may_execute() -> bool {
    Map::anonymous(PAGE).is_ok_and(|map| map.protect(0, PAGE, Protection::ReadExecute).is_ok())
}

fn may_open(path: &Path) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

fn memfd_works() -> bool {
    let made: std::io::Result<File> = memfd(c"ringzero-doctor", PAGE as u64);
    made.is_ok_and(|file| Map::shared(&file, PAGE, Protection::ReadWrite).is_ok())
}

fn tracing_works() -> bool {
    memfd(c"ringzero-doctor", PAGE as u64).and_then(|file| Tracee::new(&[&file])).is_ok()
}

/// Everything that decides what can run here and how fast, by name.
#[must_use]
pub fn host_features() -> Vec<(&'static str, Feature)> {
    let vendor = __cpuid(0);
    let invariant_tsc = __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0;
    let xsave = __cpuid(1).ecx & 1 << 27 != 0;
    let flag = Feature::Flag;
    vec![
        ("vendor", Feature::Text(text(&[vendor.ebx, vendor.edx, vendor.ecx]))),
        ("brand", Feature::Text(brand())),
        ("fsgsbase", flag(fsgsbase())),
        ("bmi2", flag(std::is_x86_feature_detected!("bmi2"))),
        ("avx", flag(std::is_x86_feature_detected!("avx"))),
        ("avx2", flag(std::is_x86_feature_detected!("avx2"))),
        ("fma", flag(std::is_x86_feature_detected!("fma"))),
        ("aes", flag(std::is_x86_feature_detected!("aes"))),
        ("sha", flag(std::is_x86_feature_detected!("sha"))),
        // CPUID.1:ECX.OSXSAVE: the processor has it and the kernel has switched it on.
        ("xsave", flag(xsave)),
        ("avx512f", flag(std::is_x86_feature_detected!("avx512f"))),
        ("invariant_tsc", flag(invariant_tsc)),
        ("tsc_khz", Feature::Number(host::clock::host_tsc_hz() / 1000)),
        ("kvm", flag(may_open(Path::new("/dev/kvm")))),
        ("memfd", flag(memfd_works())),
        // Whether a process of ours may trace a child: direct execution needs it.
        ("tracing", flag(tracing_works())),
        ("page_size", Feature::Number(auxiliary(AT_PAGESZ).unwrap_or(0))),
        ("mmap_exec", flag(may_execute())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_who_it_is() {
        let features = host_features();
        let of = |wanted: &str| &features.iter().find(|(name, _)| *name == wanted).unwrap().1;
        let Feature::Text(vendor) = of("vendor") else { panic!("vendor is text") };
        assert_eq!(vendor.len(), 12, "{vendor:?}");
        assert_eq!(of("memfd"), &Feature::Flag(true));
        let Feature::Number(khz) = of("tsc_khz") else { panic!("a number") };
        assert!((100_000..20_000_000).contains(khz), "{khz}");
        assert_eq!(of("page_size"), &Feature::Number(4096));
    }
}
