//! Which instruction-set extensions exist for guests: those that this code handles and the host's processor has, since
//! SIMD instructions run on it as they are.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature as F, EncodingKind, Instruction};

/// What an extension is to this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// An integer or system extension: not ours to judge.
    Other,
    /// x87, MMX, SSE, AVX and their kin; whether the host has it.
    Simd(bool),
}

fn family(feature: F) -> Family {
    macro_rules! host {
        ($name:tt) => {
            Family::Simd(std::is_x86_feature_detected!($name))
        };
    }
    match feature {
        F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::FXSR => Family::Simd(true),
        F::SSE3 => host!("sse3"),
        F::SSSE3 => host!("ssse3"),
        F::SSE4_1 => host!("sse4.1"),
        F::SSE4_2 => host!("sse4.2"),
        F::AES => host!("aes"),
        F::PCLMULQDQ => host!("pclmulqdq"),
        F::SHA => host!("sha"),
        F::GFNI => host!("gfni"),
        F::AVX => host!("avx"),
        F::AVX2 => host!("avx2"),
        F::FMA => host!("fma"),
        F::F16C => host!("f16c"),
        F::VAES => host!("vaes"),
        F::VPCLMULQDQ => host!("vpclmulqdq"),
        F::XSAVE | F::XSAVEOPT | F::XSAVEC | F::XSAVES => host!("xsave"),
        // Not offered: later AVX extensions, other makers' sets, coprocessors that were.
        F::SSE4A | F::XOP | F::FMA4 | F::D3NOW | F::D3NOWEXT | F::CYRIX_D3NOW | F::AVX_VNNI => Family::Simd(false),
        F::FPU287XL_ONLY | F::FPU387SL_ONLY => Family::Simd(false),
        _ => Family::Other,
    }
}

/// Whether `feature` is one of x87, MMX, SSE, AVX and their kin, and guests may use it: what the guest's CPUID may say.
#[must_use]
pub fn is_offered(feature: F) -> bool {
    // Families by the feature's number, so that a lookup is one load.
    static TABLE: OnceLock<[bool; 256]> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut table = [false; 256];
        for feature in F::values() {
            if let Some(place) = table.get_mut(feature as usize) {
                *place = family(feature) == Family::Simd(true);
            }
        }
        table
    });
    table.get(feature as usize).copied().unwrap_or(false)
}

/// Whether `instruction` belongs to one of these extensions: `None` when it does not, else whether guests may use it.
#[must_use]
pub fn judge(instruction: &Instruction) -> Option<bool> {
    // AVX-512, XOP, 3DNow! and what never came to be.
    if !matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Some(false);
    }
    let mut ours = None;
    for feature in instruction.cpuid_features() {
        match family(*feature) {
            Family::Simd(offered) => ours = Some(ours.unwrap_or(true) && offered),
            // VEX-encoded opmask instructions say AVX512F and nothing else.
            Family::Other if is_avx512(*feature) => return Some(false),
            Family::Other => {}
        }
    }
    ours
}

fn is_avx512(feature: F) -> bool {
    matches!(feature, F::AVX512F | F::AVX512BW | F::AVX512DQ | F::AVX512VL)
}
