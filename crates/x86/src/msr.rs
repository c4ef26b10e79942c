//! Model-specific registers that a guest of ours can meet: Intel SDM (2024-12) Vol. 4 ch. 2.

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_SIGN_ID: u32 = 0x8b;
pub const MTRRCAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const FLUSH_CMD: u32 = 0x10b;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const DEBUGCTL: u32 = 0x1d9;
pub const MTRR_PHYSBASE0: u32 = 0x200;
pub const MTRR_PHYSMASK7: u32 = 0x20f;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const MTRR_FIX4K_F8000: u32 = 0x26f;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const PKRS: u32 = 0x6e1;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

/// Bits of IA32_MISC_ENABLE, Intel SDM (2024-12) Vol. 4 Table 2-2 "IA-32 Architectural MSRs".
pub mod misc_enable {
    pub const FAST_STRINGS: u64 = 1 << 0;
    pub const THERMAL_CONTROL: u64 = 1 << 3;
    pub const PERFORMANCE_MONITORING: u64 = 1 << 7;
    pub const BRANCH_TRACE_UNAVAILABLE: u64 = 1 << 11;
    pub const PEBS_UNAVAILABLE: u64 = 1 << 12;
    pub const SPEEDSTEP: u64 = 1 << 16;
    pub const MONITOR: u64 = 1 << 18;
    pub const LIMIT_CPUID: u64 = 1 << 22;
    pub const NO_TPR_MESSAGES: u64 = 1 << 23;
    pub const XD_DISABLE: u64 = 1 << 34;
}

/// What PAT holds after reset, Intel SDM Vol. 3A 13.12.4 "Programming the PAT".
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
