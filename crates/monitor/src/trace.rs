//! The execution trace: one line an instruction, fit for comparing two engines with `diff`.
//!
//! A line is `COUNT RIP NAME=VALUE...`: how many instructions ran before it (decimal), where it was (hexadecimal), and
//! the registers that it changed (hexadecimal), in a fixed order. RIP itself is told by the next line. What comes
//! between two instructions, an interrupt or a fault, shows as a change of RSP and RFLAGS in the line of the latter.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use x86::{CpuState, FpuArea, rflags};

use crate::Error;
use crate::registers::{GENERAL, SEGMENTS};

pub struct Tracer {
    path: std::path::PathBuf,
    out: BufWriter<File>,
    count: u64,
    before: CpuState,
}

/// Wide registers: XMM as two words each, and the upper halves of YMM.
const XMM_WORDS: usize = 32;

fn fpu_word(fpu: &FpuArea, at: usize) -> u64 {
    fpu.bytes.get(at..at + 8).map_or(0, |bytes| {
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        u64::from_le_bytes(word)
    })
}

impl Tracer {
    /// Makes the trace file anew.
    ///
    /// # Errors
    /// [`Error::Trace`].
    pub fn new(path: &Path) -> Result<Tracer, Error> {
        let out = File::create(path).map_err(|error| Error::Trace { path: path.into(), error })?;
        Ok(Tracer { path: path.into(), out: BufWriter::new(out), count: 0, before: CpuState::reset() })
    }

    /// Remembers the state before an instruction.
    pub fn before(&mut self, cpu: &CpuState) {
        self.before.clone_from(cpu);
    }

    /// Writes the line of the instruction that ran since [`Tracer::before`].
    ///
    /// # Errors
    /// [`Error::Trace`], for instance when the disk is full.
    pub fn after(&mut self, cpu: &CpuState) -> Result<(), Error> {
        let result = self.line(cpu);
        self.count += 1;
        result.map_err(|error| Error::Trace { path: self.path.clone(), error })
    }

    /// Writes what is still kept back.
    ///
    /// # Errors
    /// [`Error::Trace`].
    pub fn finish(&mut self) -> Result<(), Error> {
        self.out.flush().map_err(|error| Error::Trace { path: self.path.clone(), error })
    }

    fn line(&mut self, now: &CpuState) -> std::io::Result<()> {
        let Tracer { out, count, before, .. } = self;
        write!(out, "{count} {:x}", before.rip)?;
        for (name, (old, new)) in GENERAL.iter().zip(before.gpr.iter().zip(&now.gpr)) {
            if old != new {
                write!(out, " {name}={new:x}")?;
            }
        }
        // RF is set and cleared by delivery alone; engines may keep it at different moments.
        let plain = [
            ("rflags", before.rflags & !rflags::RF, now.rflags & !rflags::RF),
            ("cr0", before.cr0, now.cr0),
            ("cr2", before.cr2, now.cr2),
            ("cr3", before.cr3, now.cr3),
            ("cr4", before.cr4, now.cr4),
            ("efer", before.efer, now.efer),
            ("kernel_gs_base", before.kernel_gs_base, now.kernel_gs_base),
        ];
        for (name, old, new) in plain {
            if old != new {
                write!(out, " {name}={new:x}")?;
            }
        }
        for (name, index) in SEGMENTS {
            let (old, new) = (before.segments[index], now.segments[index]);
            if old.selector != new.selector {
                write!(out, " {name}={:x}", new.selector)?;
            }
            if old.base != new.base {
                write!(out, " {name}_base={:x}", new.base)?;
            }
        }
        if before.fpu != now.fpu {
            for word in 0..XMM_WORDS {
                let (low, high) = (FpuArea::XMM + 8 * word, FpuArea::YMM_HIGH + 8 * word);
                let (register, half) = (word / 2, word % 2);
                if fpu_word(&before.fpu, low) != fpu_word(&now.fpu, low) {
                    write!(out, " xmm{register}.{half}={:x}", fpu_word(&now.fpu, low))?;
                }
                if fpu_word(&before.fpu, high) != fpu_word(&now.fpu, high) {
                    write!(out, " ymm{register}.{}={:x}", half + 2, fpu_word(&now.fpu, high))?;
                }
            }
            // The eight x87 registers, each 16 bytes apart, in stack order.
            for slot in 0..8 {
                let at = 32 + 16 * slot;
                if fpu_word(&before.fpu, at) != fpu_word(&now.fpu, at) {
                    write!(out, " st{slot}={:x}", fpu_word(&now.fpu, at))?;
                }
            }
        }
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_changed() {
        let path = std::env::temp_dir().join(format!("ringzero-trace-{}", std::process::id()));
        let mut tracer = Tracer::new(&path).unwrap();
        let mut cpu = CpuState::reset();
        tracer.before(&cpu);
        cpu.rip = 0xfff3;
        cpu.gpr[3] = 0x12;
        tracer.after(&cpu).unwrap();
        tracer.before(&cpu);
        cpu.fpu.bytes[FpuArea::XMM + 16] = 0xff;
        cpu.rflags |= rflags::CF;
        tracer.after(&cpu).unwrap();
        tracer.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "0 fff0 rbx=12\n1 fff3 rflags=3 xmm1.0=ff\n");
    }

    #[test]
    fn a_trace_file_that_cannot_be_is_one_sentence() {
        let error = Tracer::new(Path::new("/nowhere/at/all")).err().unwrap();
        assert!(error.to_string().starts_with("the trace file /nowhere/at/all cannot be written: "));
    }
}
