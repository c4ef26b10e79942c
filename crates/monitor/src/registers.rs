//! Registers by name, for the operator: the names that `ringzero._core` documents.

use x86::{CpuState, Segment, cr0, efer, rflags, seg};

use crate::Error;

/// The general registers, in the order of their encoding.
pub const GENERAL: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// The segment registers with the suffixes of their parts, by the order of their encoding.
pub const SEGMENTS: [(&str, usize); 6] =
    [("es", seg::ES), ("cs", seg::CS), ("ss", seg::SS), ("ds", seg::DS), ("fs", seg::FS), ("gs", seg::GS)];

/// Bits that a segment's attributes have: bytes 5 and 6 of the descriptor without the limit.
const ATTRIBUTES: u64 = 0xf0ff;

/// All registers of a processor but CR8, which is its local APIC's.
#[must_use]
pub fn all(cpu: &CpuState) -> Vec<(String, u64)> {
    let mut list: Vec<(String, u64)> =
        GENERAL.iter().zip(cpu.gpr).map(|(name, value)| ((*name).to_string(), value)).collect();
    let plain = [
        ("rip", cpu.rip),
        ("rflags", cpu.rflags),
        ("cr0", cpu.cr0),
        ("cr2", cpu.cr2),
        ("cr3", cpu.cr3),
        ("cr4", cpu.cr4),
        ("efer", cpu.efer),
        ("gdtr_base", cpu.gdtr.base),
        ("gdtr_limit", u64::from(cpu.gdtr.limit)),
        ("idtr_base", cpu.idtr.base),
        ("idtr_limit", u64::from(cpu.idtr.limit)),
    ];
    list.extend(plain.map(|(name, value)| (name.to_string(), value)));
    let segments = SEGMENTS.map(|(name, index)| (name, cpu.segments[index]));
    for (name, segment) in segments.into_iter().chain([("tr", cpu.tr), ("ldtr", cpu.ldtr)]) {
        list.push((name.to_string(), u64::from(segment.selector)));
        list.push((format!("{name}_base"), segment.base));
        list.push((format!("{name}_limit"), u64::from(segment.limit)));
        list.push((format!("{name}_attributes"), u64::from(segment.attributes)));
    }
    list
}

fn fit<T: TryFrom<u64>>(name: &str, value: u64) -> Result<T, Error> {
    T::try_from(value).map_err(|_| Error::RegisterValue { name: name.into(), value })
}

fn set_segment(segment: &mut Segment, name: &str, part: &str, value: u64) -> Result<(), Error> {
    match part {
        "selector" if !name.contains('_') => segment.selector = fit(name, value)?,
        "base" => segment.base = value,
        "limit" => segment.limit = fit(name, value)?,
        "attributes" if value & !ATTRIBUTES == 0 => segment.attributes = fit(name, value)?,
        "attributes" => return Err(Error::RegisterValue { name: name.into(), value }),
        _ => return Err(Error::NoRegister(name.into())),
    }
    Ok(())
}

/// Sets one register of a processor; nothing is changed when that fails. Call [`settle`] after the last one.
///
/// # Errors
/// [`Error::NoRegister`] and [`Error::RegisterValue`].
pub fn set(cpu: &mut CpuState, name: &str, value: u64) -> Result<(), Error> {
    if let Some(index) = GENERAL.iter().position(|known| *known == name) {
        cpu.gpr[index] = value;
        return Ok(());
    }
    match name {
        "rip" => cpu.rip = value,
        "rflags" => cpu.rflags = value,
        "cr0" => cpu.cr0 = value,
        "cr2" => cpu.cr2 = value,
        "cr3" => cpu.cr3 = value,
        "cr4" => cpu.cr4 = value,
        "efer" => cpu.efer = value,
        "gdtr_base" => cpu.gdtr.base = value,
        "gdtr_limit" => cpu.gdtr.limit = fit(name, value)?,
        "idtr_base" => cpu.idtr.base = value,
        "idtr_limit" => cpu.idtr.limit = fit(name, value)?,
        _ => {
            // "cs" is the selector, "cs_base" a part; "cs_" is neither.
            let (segment, part) = name.split_once('_').map_or((name, "selector"), |(segment, part)| (segment, part));
            let known = SEGMENTS.iter().find(|(known, _)| *known == segment);
            let place = match (segment, known) {
                ("tr", _) => &mut cpu.tr,
                ("ldtr", _) => &mut cpu.ldtr,
                (_, Some((_, index))) => &mut cpu.segments[*index],
                _ => return Err(Error::NoRegister(name.into())),
            };
            set_segment(place, name, part, value)?;
        }
    }
    Ok(())
}

/// Makes true again what the processor itself keeps true: RFLAGS bit 1, and EFER.LMA, which says that paging is on in
/// long mode (Intel SDM (2024-12) Vol. 3A 11.8.5 "Initializing IA-32e Mode").
pub fn settle(cpu: &mut CpuState) {
    cpu.rflags |= rflags::FIXED;
    cpu.cr0 |= cr0::ET;
    let long = cpu.cr0 & cr0::PG != 0 && cpu.efer & efer::LME != 0;
    cpu.efer = cpu.efer & !efer::LMA | if long { efer::LMA } else { 0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_can_be_set_and_read_back() {
        let mut cpu = CpuState::reset();
        let names: Vec<String> = all(&cpu).into_iter().map(|(name, _)| name).collect();
        for (number, name) in names.iter().enumerate() {
            let value = if name.ends_with("attributes") { 0xa09b } else { 0x100 + number as u64 };
            set(&mut cpu, name, value).unwrap();
            let now = all(&cpu);
            assert_eq!(now[number], (name.clone(), value));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let mut cpu = CpuState::reset();
        let before = all(&cpu);
        for (name, value) in
            [("cs", 0x1_0000), ("ss_limit", 1 << 32), ("ds_attributes", 0x0f00), ("gdtr_limit", 1 << 16)]
        {
            assert!(matches!(set(&mut cpu, name, value), Err(Error::RegisterValue { .. })), "{name}");
        }
        for name in ["eax", "cs_", "cs_size", "xx_base", "", "_base", "tr_"] {
            assert!(matches!(set(&mut cpu, name, 0), Err(Error::NoRegister(_))), "{name}");
        }
        assert_eq!(all(&cpu), before);
    }

    #[test]
    fn long_mode_is_active_when_paging_is_on() {
        let mut cpu = CpuState::reset();
        set(&mut cpu, "efer", efer::LME).unwrap();
        set(&mut cpu, "rflags", 0).unwrap();
        settle(&mut cpu);
        assert_eq!((cpu.efer & efer::LMA, cpu.rflags), (0, rflags::FIXED));
        set(&mut cpu, "cr0", cr0::PG | cr0::PE).unwrap();
        settle(&mut cpu);
        assert!(cpu.is_long_mode());
    }
}
