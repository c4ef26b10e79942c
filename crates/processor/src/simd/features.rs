//! Which instruction-set extensions exist for guests: those that this code handles and the host's processor has, since
//! SIMD instructions run on it as they are.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature as F, Instruction};

/// Whether guests may use `feature`. `None`: an integer or system extension, which is not ours to judge.
fn judge(feature: F) -> Option<bool> {
    macro_rules! host {
        ($name:tt) => {
            Some(std::is_x86_feature_detected!($name))
        };
    }
    match feature {
        F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::FXSR | F::CLFSH => Some(true),
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
        F::XSAVE => host!("xsave"),
        // Not offered: AVX-512 and AVX-VNNI, AMX, XOP, FMA4, SSE4a, 3DNow!, key locker ...
        F::SSE4A | F::XOP | F::FMA4 | F::D3NOW | F::D3NOWEXT | F::CYRIX_D3NOW | F::AVX_VNNI => Some(false),
        F::AVX512F | F::AVX512VL | F::AVX512BW | F::AVX512CD | F::AVX512DQ | F::AVX512ER | F::AVX512PF => Some(false),
        _ => None,
    }
}

/// Whether guests may use `feature`, and it is one of x87, MMX, SSE, AVX and their kin.
#[must_use]
pub fn is_offered(feature: F) -> bool {
    // Detection is cached by the standard library; the table makes one lookup of it.
    static TABLE: OnceLock<[bool; 256]> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut table = [false; 256];
        for feature in F::values() {
            if let Some(place) = table.get_mut(feature as usize) {
                *place = judge(feature) == Some(true);
            }
        }
        table
    });
    table.get(feature as usize).copied().unwrap_or(false)
}

/// Whether all that `instruction` needs is offered.
#[must_use]
pub fn are_offered(instruction: &Instruction) -> bool {
    instruction.cpuid_features().iter().all(|feature| is_offered(*feature))
}
