//! Callouts whose instruction is known when it is translated, so that nobody has to look for it again: IN and OUT, the
//! instructions that name an MSR, INVLPG, and loads of CR3. What they do is what the interpreter's do, in kernel code.

use iced_x86::{Code, Instruction, OpKind, Register};
use x86::state::gpr::{RAX, RCX, RDX};
use x86::{GuestFault, Gva};

use super::{Next, Translator};
use crate::core::Core;
use crate::profile::interpreting;
use crate::system::{control, msr, serialize};
use crate::vcpu::Stale;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// IN and OUT of so many bytes, at a constant port or at that in DX.
    Input {
        size: u8,
        port: Option<u8>,
    },
    Output {
        size: u8,
        port: Option<u8>,
    },
    ReadMsr,
    WriteMsr,
    /// INVLPG of the address in a register.
    InvalidatePage {
        at: u8,
    },
    /// MOV to CR3.
    LoadRoot {
        from: u8,
    },
}

impl Short {
    /// What an instruction of kernel code is, if it is one of these.
    pub fn of(iced: &Instruction) -> Option<Short> {
        let port = |operand| (iced.op_kind(operand) == OpKind::Immediate8).then(|| iced.immediate8());
        let input = |size| Short::Input { size, port: port(1) };
        let output = |size| Short::Output { size, port: port(0) };
        Some(match iced.code() {
            Code::In_AL_imm8 | Code::In_AL_DX => input(1),
            Code::In_AX_imm8 | Code::In_AX_DX => input(2),
            Code::In_EAX_imm8 | Code::In_EAX_DX => input(4),
            Code::Out_imm8_AL | Code::Out_DX_AL => output(1),
            Code::Out_imm8_AX | Code::Out_DX_AX => output(2),
            Code::Out_imm8_EAX | Code::Out_DX_EAX => output(4),
            Code::Rdmsr => Short::ReadMsr,
            Code::Wrmsr => Short::WriteMsr,
            Code::Mov_cr_r64 if iced.op0_register() == Register::CR3 => {
                Short::LoadRoot { from: iced.op1_register().number() as u8 }
            }
            Code::Invlpg_m if is_bare(iced) => Short::InvalidatePage { at: iced.memory_base().number() as u8 },
            _ => return None,
        })
    }

    /// One of the instructions that it may be, for the profile.
    fn code(self) -> Code {
        match self {
            Short::Input { size: 1, .. } => Code::In_AL_DX,
            Short::Input { .. } => Code::In_EAX_DX,
            Short::Output { size: 1, .. } => Code::Out_DX_AL,
            Short::Output { .. } => Code::Out_DX_EAX,
            Short::ReadMsr => Code::Rdmsr,
            Short::WriteMsr => Code::Wrmsr,
            Short::InvalidatePage { .. } => Code::Invlpg_m,
            Short::LoadRoot { .. } => Code::Mov_cr_r64,
        }
    }

    /// As a word: what it is, an operand, and a port with a bit that says whether there is one.
    pub fn pack(self) -> u32 {
        let place = |port: Option<u8>| port.map_or(0, |port| u32::from(port) << 16 | 1 << 24);
        let (tag, operand, port) = match self {
            Short::Input { size, port } => (0, size, place(port)),
            Short::Output { size, port } => (1, size, place(port)),
            Short::ReadMsr => (2, 0, 0),
            Short::WriteMsr => (3, 0, 0),
            Short::InvalidatePage { at } => (4, at, 0),
            Short::LoadRoot { from } => (5, from, 0),
        };
        tag | u32::from(operand) << 8 | port
    }

    pub fn unpack(word: u32) -> Option<Short> {
        let [tag, operand, port, has_port] = word.to_le_bytes();
        let port = (has_port != 0).then_some(port);
        Some(match tag {
            0 if matches!(operand, 1 | 2 | 4) => Short::Input { size: operand, port },
            1 if matches!(operand, 1 | 2 | 4) => Short::Output { size: operand, port },
            2 => Short::ReadMsr,
            3 => Short::WriteMsr,
            4 if operand < 16 => Short::InvalidatePage { at: operand },
            5 if operand < 16 => Short::LoadRoot { from: operand },
            _ => return None,
        })
    }

    fn run(self, core: &mut Core<'_>) -> Result<(), GuestFault> {
        match self {
            Short::Input { size, port } => {
                let port = port.map_or(core.vcpu.cpu.gpr[RDX] as u16, u16::from);
                let value = u64::from(core.outside.port_read(port, size));
                let rax = &mut core.vcpu.cpu.gpr[RAX];
                // A load of 32 bits clears the upper half.
                *rax = match size {
                    1 => *rax & !0xff | value & 0xff,
                    2 => *rax & !0xffff | value & 0xffff,
                    _ => value,
                };
            }
            Short::Output { size, port } => {
                let cpu = &core.vcpu.cpu;
                let port = port.map_or(cpu.gpr[RDX] as u16, u16::from);
                let value = cpu.gpr[RAX] as u32 & u32::MAX >> (32 - 8 * size);
                core.outside.port_write(port, size, value);
            }
            Short::ReadMsr => {
                let value = msr::read(core, core.vcpu.cpu.gpr[RCX] as u32)?;
                crate::system::set_edx_eax(&mut core.vcpu.cpu, value);
            }
            Short::WriteMsr => {
                serialize(core);
                let value = crate::system::edx_eax(&core.vcpu.cpu);
                msr::write(core, core.vcpu.cpu.gpr[RCX] as u32, value)?;
            }
            Short::InvalidatePage { at } => {
                serialize(core);
                let address = Gva(core.vcpu.cpu.gpr[usize::from(at)]);
                if address.is_canonical() {
                    core.flush_page(address);
                }
            }
            Short::LoadRoot { from } => {
                serialize(core);
                control::set_cr3(core, core.vcpu.cpu.gpr[usize::from(from)])?;
            }
        }
        Ok(())
    }
}

/// Whether the memory operand is one 64-bit register and nothing else.
fn is_bare(iced: &Instruction) -> bool {
    iced.memory_base().is_gpr64()
        && iced.memory_index() == Register::None
        && iced.memory_displacement64() == 0
        && !super::block::has_segment_base(iced)
}

impl Translator {
    /// Runs the instruction at `guest` of a block, which has `size` bytes, for the code that goes on at `resume`.
    pub(super) fn short(
        &mut self,
        core: &mut Core<'_>,
        short: Short,
        place: (u32, u16),
        size: u8,
        resume: u64,
    ) -> Next {
        self.counters.exits_short += 1;
        core.vcpu.interpreted += 1;
        core.vcpu.sampler.now(interpreting(short.code()));
        let result = short.run(core);
        let vcpu = &mut *core.vcpu;
        if let Some(profile) = &mut vcpu.profile {
            profile.count(&vcpu.sampler);
        }
        let is_quiet = result.is_ok()
            && vcpu.stale == Stale::default()
            && !vcpu.attention.is_raised()
            && !core.memory.code.is_pending(vcpu.number);
        if is_quiet {
            return Next::Enter(resume);
        }
        let rip = self.blocks.rip(place.0, place.1);
        core.vcpu.cpu.rip = rip;
        if let Err(fault) = result {
            return Next::Fault(fault);
        }
        let next = rip.wrapping_add(size.into());
        core.vcpu.cpu.rip = next;
        if self.may_resume(core, next) { Next::Enter(resume) } else { Next::Dispatch }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn every_one_survives_packing() {
        let codes: [&[u8]; 12] = [
            &[0xe4, 0x80],
            &[0xec],
            &[0x66, 0xed],
            &[0xed],
            &[0xe6, 0xff],
            &[0xef],
            &[0x0f, 0x32],
            &[0x0f, 0x30],
            &[0x41, 0x0f, 0x01, 0x3a],
            &[0x0f, 0x01, 0x3e],
            &[0x0f, 0x22, 0xd8],
            &[0x41, 0x0f, 0x22, 0xdf],
        ];
        let decode = |code: &[u8]| Decoder::new(64, code, DecoderOptions::NONE).decode();
        for code in codes {
            let short = Short::of(&decode(code)).unwrap_or_else(|| panic!("{code:x?}"));
            assert_eq!(Short::unpack(short.pack()), Some(short), "{code:x?}");
        }
        // INVLPG with a displacement, of another segment, with a 32-bit address; MOV to CR4.
        let others: [&[u8]; 4] =
            [&[0x0f, 0x01, 0x7e, 0x08], &[0x65, 0x0f, 0x01, 0x3e], &[0x67, 0x0f, 0x01, 0x3e], &[0x0f, 0x22, 0xe0]];
        for code in others {
            assert_eq!(Short::of(&decode(code)), None, "{code:x?}");
        }
        assert_eq!(Short::unpack(0x0300), None);
        assert_eq!(Short::unpack(0x1004), None);
    }
}
