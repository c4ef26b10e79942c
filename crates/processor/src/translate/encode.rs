//! Guest instructions taken apart into their encoding fields and put together again with other registers or another
//! memory operand. All other bytes are copied: Intel SDM (2024-12) Vol. 2A 2.1 "Instruction Format".

use std::sync::OnceLock;

use iced_x86::{Code, OpCodeOperandKind as Kind};

use super::asm::{Asm, Mem};

/// Which encoding fields of an instruction hold general registers.
pub mod slot {
    pub const REG: u8 = 1;
    pub const RM: u8 = 2;
    pub const OPCODE: u8 = 4;
    pub const VVVV: u8 = 8;
}

/// The slots of every instruction code, found once.
pub fn slots(code: Code) -> u8 {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| Code::values().map(find_slots).collect())[code as usize]
}

/// The translators' part of [`crate::prepare`].
pub fn make_tables() {
    let mut decoder = iced_x86::Decoder::new(64, &[0x90], iced_x86::DecoderOptions::NONE);
    slots(decoder.decode().code());
}

fn find_slots(code: Code) -> u8 {
    let info = code.op_code();
    (0..info.op_count()).fold(0, |slots, operand| slots | slot_of(info.op_kind(operand)))
}

pub fn slot_of(kind: Kind) -> u8 {
    match kind {
        Kind::r8_reg
        | Kind::r16_reg
        | Kind::r32_reg
        | Kind::r64_reg
        | Kind::r16_reg_mem
        | Kind::r32_reg_mem
        | Kind::r64_reg_mem => slot::REG,
        Kind::r8_or_mem
        | Kind::r16_or_mem
        | Kind::r32_or_mem
        | Kind::r64_or_mem
        | Kind::r32_or_mem_mpx
        | Kind::r64_or_mem_mpx
        | Kind::r16_rm
        | Kind::r32_rm
        | Kind::r64_rm => slot::RM,
        Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode => slot::OPCODE,
        Kind::r32_vvvv | Kind::r64_vvvv => slot::VVVV,
        _ => 0,
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Vex {
    w: bool,
    l: bool,
    pp: u8,
    map: u8,
}

/// The fields of one instruction.
#[derive(Clone, Copy, Debug)]
pub struct Fields {
    prefixes: [u8; 4],
    prefix_count: u8,
    rex_w: bool,
    has_rex: bool,
    vex: Option<Vex>,
    /// Opcode bytes after prefixes and REX, escapes included; for VEX the one opcode byte.
    opcode: [u8; 3],
    opcode_count: u8,
    has_modrm: bool,
    modrm: u8,
    /// Register numbers with their extension bits.
    pub reg: u8,
    pub rm: u8,
    pub vvvv: u8,
    /// The register in the low bits of the opcode.
    pub embedded: u8,
    immediate: [u8; 8],
    immediate_count: u8,
}

fn has_modrm_one_byte(opcode: u8) -> bool {
    match opcode {
        0x00..=0x3f => opcode & 7 < 4,
        0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc6 | 0xc7 | 0xd0..=0xd3 | 0xd8..=0xdf => true,
        0xf6 | 0xf7 | 0xfe | 0xff => true,
        _ => false,
    }
}

fn has_modrm_two_byte(opcode: u8) -> bool {
    !matches!(opcode, 0x04..=0x0c | 0x0e | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
}

impl Fields {
    /// Takes apart a whole, valid instruction. `None` for encodings that the translator leaves to the interpreter (EVEX,
    /// XOP, an ignored REX before a prefix).
    pub fn parse(bytes: &[u8]) -> Option<Fields> {
        let mut fields = Fields {
            prefixes: [0; 4],
            prefix_count: 0,
            rex_w: false,
            has_rex: false,
            vex: None,
            opcode: [0; 3],
            opcode_count: 0,
            has_modrm: true,
            modrm: 0,
            reg: 0,
            rm: 0,
            vvvv: 0,
            embedded: 0,
            immediate: [0; 8],
            immediate_count: 0,
        };
        let mut rest = bytes.iter().copied().peekable();
        let mut position = 0;
        let mut next = || {
            position += 1;
            rest.next()
        };
        let mut byte = next()?;
        loop {
            match byte {
                0x66 | 0xf0 | 0xf2 | 0xf3 => {
                    *fields.prefixes.get_mut(usize::from(fields.prefix_count))? = byte;
                    fields.prefix_count += 1;
                }
                // Segment overrides and the address size go: the address is computed apart, and what has none may have
                // the prefix all the same, as padding.
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 => {}
                _ => break,
            }
            byte = next()?;
        }
        let (mut r, mut x, mut b) = (0, 0, 0);
        match byte {
            0xc5 => {
                let payload = next()?;
                r = !payload >> 7 & 1;
                fields.vvvv = !payload >> 3 & 15;
                fields.vex = Some(Vex { w: false, l: payload & 4 != 0, pp: payload & 3, map: 1 });
            }
            0xc4 => {
                let (first, second) = (next()?, next()?);
                r = !first >> 7 & 1;
                x = !first >> 6 & 1;
                b = !first >> 5 & 1;
                fields.vvvv = !second >> 3 & 15;
                let map = first & 31;
                fields.vex = Some(Vex { w: second & 0x80 != 0, l: second & 4 != 0, pp: second & 3, map });
            }
            0x62 => return None,
            0x40..=0x4f => {
                fields.has_rex = true;
                fields.rex_w = byte & 8 != 0;
                (r, x, b) = (byte >> 2 & 1, byte >> 1 & 1, byte & 1);
                byte = next()?;
                if matches!(
                    byte,
                    0x40..=0x4f | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65
                ) {
                    return None;
                }
            }
            _ => {}
        }
        if fields.vex.is_some() {
            fields.opcode[0] = next()?;
            fields.opcode_count = 1;
            fields.has_modrm = fields.opcode[0] != 0x77;
        } else {
            fields.opcode[0] = byte;
            fields.opcode_count = 1;
            if byte == 0x0f {
                fields.opcode[1] = next()?;
                fields.opcode_count = 2;
                if matches!(fields.opcode[1], 0x38 | 0x3a) {
                    fields.opcode[2] = next()?;
                    fields.opcode_count = 3;
                } else {
                    fields.has_modrm = has_modrm_two_byte(fields.opcode[1]);
                }
            } else {
                fields.has_modrm = has_modrm_one_byte(byte);
            }
        }
        let last = fields.opcode[usize::from(fields.opcode_count) - 1];
        fields.embedded = last & 7 | b << 3;
        let mut skip = 0;
        if fields.has_modrm {
            let modrm = next()?;
            fields.modrm = modrm;
            fields.reg = modrm >> 3 & 7 | r << 3;
            fields.rm = modrm & 7 | b << 3;
            let mode = modrm >> 6;
            if mode != 3 {
                if modrm & 7 == 4 {
                    let sib = next()?;
                    if mode == 0 && sib & 7 == 5 {
                        skip = 4;
                    }
                }
                skip = match mode {
                    0 if modrm & 7 == 5 => 4,
                    0 => skip,
                    1 => 1,
                    _ => 4,
                };
            }
        }
        let _ = x;
        let immediate = bytes.get(position + skip..)?;
        fields.immediate.get_mut(..immediate.len())?.copy_from_slice(immediate);
        fields.immediate_count = immediate.len() as u8;
        Some(fields)
    }

    /// Emits the instruction with the registers now in the fields, and `mem` in place of its memory operand.
    pub fn emit(&self, asm: &mut Asm, mem: Option<Mem>) {
        let (x, b) = match mem {
            Some(mem) => (mem.index.map_or(0, |(index, _)| index.0 >> 3), mem.base.0 >> 3),
            None if self.has_modrm => (0, self.rm >> 3),
            None => (0, self.embedded >> 3),
        };
        let r = self.reg >> 3;
        asm.bytes(&self.prefixes[..usize::from(self.prefix_count)]);
        if let Some(vex) = self.vex {
            asm.byte(0xc4);
            asm.byte((r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | vex.map);
            asm.byte(u8::from(vex.w) << 7 | (!self.vvvv & 15) << 3 | u8::from(vex.l) << 2 | vex.pp);
        } else {
            let rex = 0x40 | u8::from(self.rex_w) << 3 | r << 2 | x << 1 | b;
            if self.has_rex || rex != 0x40 {
                asm.byte(rex);
            }
        }
        let count = usize::from(self.opcode_count);
        asm.bytes(&self.opcode[..count - 1]);
        let last = self.opcode[count - 1];
        if self.has_modrm {
            asm.byte(last);
            match mem {
                Some(mem) => asm.modrm_mem(self.reg, mem),
                None => asm.byte(0xc0 | (self.reg & 7) << 3 | self.rm & 7),
            }
        } else if self.holds_register() {
            asm.byte(last & !7 | self.embedded & 7);
        } else {
            asm.byte(last);
        }
        asm.bytes(&self.immediate[..usize::from(self.immediate_count)]);
    }

    /// Whether the low bits of the opcode are a register: XCHG, MOV immediate, BSWAP (PUSH and POP are not copied).
    fn holds_register(&self) -> bool {
        match self.opcode_count {
            1 => self.vex.is_none() && matches!(self.opcode[0], 0x90..=0x97 | 0xb0..=0xbf),
            2 => matches!(self.opcode[1], 0xc8..=0xcf),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::asm::{Reg, T0, T1};

    fn again(bytes: &[u8], mem: Option<Mem>) -> Vec<u8> {
        let mut asm = Asm::default();
        Fields::parse(bytes).unwrap().emit(&mut asm, mem);
        asm.code
    }

    #[test]
    fn an_unchanged_instruction_keeps_its_bytes() {
        for bytes in [
            &[0x48, 0x01, 0xd8][..],
            &[0x66, 0x0f, 0x6f, 0xc1],
            &[0xb8, 1, 2, 3, 4],
            &[0x49, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x0f, 0xc9],
            &[0xc4, 0xe2, 0x70, 0xf2, 0xc2],
            &[0x90],
            &[0xf3, 0x90],
            &[0x66, 0x41, 0x0f, 0x3a, 0x0f, 0xc1, 0x07],
        ] {
            assert_eq!(again(bytes, None), bytes);
        }
    }

    #[test]
    fn memory_operands_are_replaced_and_immediates_kept() {
        // add dword [rbp+rax*4+0x12345678], 0x11 -> [r10+r11]
        let bytes = [0x83, 0x84, 0x85, 0x78, 0x56, 0x34, 0x12, 0x11];
        assert_eq!(again(&bytes, Some(Mem::indexed(T0, T1, 0, 0))), [0x43, 0x83, 0x04, 0x1a, 0x11]);
        // mov rax, [rip+0x10] -> [r11+8]
        let bytes = [0x48, 0x8b, 0x05, 0x10, 0, 0, 0];
        assert_eq!(again(&bytes, Some(Mem::base(T1, 8))), [0x49, 0x8b, 0x43, 0x08]);
        // vmovups ymm0, [rcx] (two-byte VEX) -> [r10+r11]
        assert_eq!(
            again(&[0xc5, 0xfc, 0x10, 0x01], Some(Mem::indexed(T0, T1, 0, 0))),
            [0xc4, 0x81, 0x7c, 0x10, 0x04, 0x1a]
        );
    }

    #[test]
    fn registers_are_replaced() {
        // mov rsp, rax: RM slot
        let mut fields = Fields::parse(&[0x48, 0x89, 0xc4]).unwrap();
        assert_eq!(fields.rm, 4);
        fields.rm = 15;
        let mut asm = Asm::default();
        fields.emit(&mut asm, None);
        assert_eq!(asm.code, [0x49, 0x89, 0xc7]);
        assert_eq!(slots(Code::Mov_rm64_r64), slot::REG | slot::RM);
        assert_eq!(slots(Code::Mov_r32_imm32), slot::OPCODE);
        assert_eq!(slots(Code::VEX_Andn_r64_r64_rm64), slot::REG | slot::RM | slot::VVVV);
        let _ = Reg(0);
    }
}
