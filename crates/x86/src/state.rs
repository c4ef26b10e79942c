//! The architectural state of one processor.

use crate::address::Gva;
use crate::registers::{cr0, dr6, dr7, efer, rflags};

/// Indices of the segment registers in [`CpuState::segments`], in the order of their encoding.
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Indices of the general registers in [`CpuState::gpr`], in the order of their encoding.
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// A privilege level, 0 (kernel) to 3 (user).
pub type Cpl = u8;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// In bytes: granularity is already applied.
    pub limit: u32,
    pub selector: u16,
    /// As in descriptor bytes 5 and 6: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15. Zero P bit or a null
    /// selector means unusable.
    pub attributes: u16,
}

impl Segment {
    pub const PRESENT: u16 = 1 << 7;
    pub const LONG: u16 = 1 << 13;
    pub const BIG: u16 = 1 << 14;

    #[must_use]
    pub fn dpl(&self) -> Cpl {
        (self.attributes >> 5 & 3) as Cpl
    }

    #[must_use]
    pub fn is_long(&self) -> bool {
        self.attributes & Self::LONG != 0
    }

    #[must_use]
    pub fn is_big(&self) -> bool {
        self.attributes & Self::BIG != 0
    }

    #[must_use]
    pub fn is_present(&self) -> bool {
        self.attributes & Self::PRESENT != 0
    }

    /// Code segment as SYSCALL and far transfers to 64-bit code make it.
    #[must_use]
    pub fn flat_code64(selector: u16, dpl: Cpl) -> Segment {
        Segment { base: 0, limit: u32::MAX, selector, attributes: 0xa09b | u16::from(dpl) << 5 }
    }

    #[must_use]
    pub fn flat_code32(selector: u16, dpl: Cpl) -> Segment {
        Segment { base: 0, limit: u32::MAX, selector, attributes: 0xc09b | u16::from(dpl) << 5 }
    }

    #[must_use]
    pub fn flat_data(selector: u16, dpl: Cpl) -> Segment {
        Segment { base: 0, limit: u32::MAX, selector, attributes: 0xc093 | u16::from(dpl) << 5 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}

/// x87, SSE and AVX state in the standard (non-compacted) XSAVE format: 512 bytes legacy, 64 bytes header, 256 bytes of
/// upper YMM halves. Intel SDM Vol. 1 13.4 "XSAVE Area".
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FpuArea {
    pub bytes: [u8; FpuArea::SIZE],
}

impl FpuArea {
    pub const SIZE: usize = 832;
    pub const XSTATE_BV: usize = 512;
    pub const YMM_HIGH: usize = 576;
    pub const MXCSR: usize = 24;
    pub const XMM: usize = 160;
    /// The state after reset as software finds it after FNINIT: FCW 0x37f, MXCSR 0x1f80, all else zero; every component
    /// marked as present.
    #[must_use]
    pub fn initial() -> Self {
        let mut bytes = [0; Self::SIZE];
        bytes[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        bytes[Self::MXCSR..Self::MXCSR + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        bytes[Self::XSTATE_BV] = 7;
        FpuArea { bytes }
    }
}

/// What one processor is, apart from its local APIC.
///
/// `repr(C)`: translated code reads and writes fields at their offsets. The general registers come first so that the
/// ones which translated code keeps in memory have one-byte displacements.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct CpuState {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: [Segment; 6],
    pub kernel_gs_base: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub xcr0: u64,
    pub xss: u64,
    /// Two bits a protection key, of user pages and of supervisor pages.
    pub pkru: u32,
    pub pkrs: u32,
    pub debugctl: u64,
    pub dr: [u64; 8],
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub ldtr: Segment,
    pub tr: Segment,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    /// One instruction long: after STI, MOV SS and POP SS no interrupt is taken (Intel SDM Vol. 3A 7.8.3).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    pub fpu: FpuArea,
}

impl CpuState {
    /// The state after power-up, Intel SDM Vol. 3A 10.1.1 "Processor State After Reset".
    #[must_use]
    pub fn reset() -> Self {
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x93 };
        let mut segments = [data; 6];
        segments[seg::CS] = Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
        let mut dr = [0; 8];
        dr[6] = dr6::FIXED;
        dr[7] = dr7::FIXED;
        CpuState {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments,
            kernel_gs_base: 0,
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: crate::msr::PAT_RESET,
            misc_enable: 1,
            spec_ctrl: 0,
            xcr0: 1,
            xss: 0,
            pkru: 0,
            pkrs: 0,
            debugctl: 0,
            dr,
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            ldtr: Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x82 },
            tr: Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x8b },
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            interrupt_shadow: false,
            nmi_blocked: false,
            fpu: FpuArea::initial(),
        }
    }

    #[must_use]
    pub fn cpl(&self) -> Cpl {
        if self.cr0 & cr0::PE == 0 { 0 } else { self.segments[seg::SS].dpl() }
    }

    #[must_use]
    pub fn is_long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether the processor runs 64-bit code (long mode and CS.L).
    #[must_use]
    pub fn is_code64(&self) -> bool {
        self.is_long_mode() && self.segments[seg::CS].is_long()
    }

    #[must_use]
    pub fn is_paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// The linear address of the next instruction.
    #[must_use]
    pub fn linear_rip(&self) -> Gva {
        if self.is_code64() {
            Gva(self.rip)
        } else {
            Gva(self.segments[seg::CS].base.wrapping_add(self.rip) & 0xffff_ffff)
        }
    }

    /// Whether a maskable interrupt can be taken before the next instruction.
    #[must_use]
    pub fn can_take_interrupt(&self) -> bool {
        self.rflags & rflags::IF != 0 && !self.interrupt_shadow
    }
}
