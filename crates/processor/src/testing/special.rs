//! Parts of sequences that random bytes do not make: jumps, loops, calls, strings, divisions, images of FPU state.

use iced_x86::Register;
use x86::Gva;

use super::flags;
use super::generate::Generator;
use super::sequence::{Fix, Item, decode};

impl Generator {
    /// A jump over some of what follows.
    pub(super) fn skip(&mut self) -> Item {
        let items = 1 + self.random.below(4);
        let opcode = match self.random.below(8) {
            0 => 0xeb,
            1 => 0xe3,
            _ => 0x70 | self.random.byte() & 15,
        };
        Item { bytes: vec![opcode, 0], fixes: vec![Fix::Skip { items }] }
    }

    /// A few rounds of one or two instructions, counted by RCX.
    pub(super) fn repeat(&mut self) -> Option<Item> {
        if self.pointers.contains(&1) {
            return None;
        }
        let mut item = Item::of(&[0xb9, 1 + self.random.byte() % 5, 0, 0, 0]);
        let start = item.bytes.len();
        for _ in 0..1 + self.random.below(2) {
            let body = self.plain()?;
            let writes_count = decode(&body.bytes, Gva(0))
                .iter()
                .any(|i| flags::writes(&mut self.factory, i, Register::RCX) || i.is_stack_instruction());
            if writes_count {
                return None;
            }
            item.append(&body);
        }
        // LOOP, with ECX alone; LOOPE, LOOPNE; DEC or SUB with JNZ
        let tail: &[u8] = self.random.pick(&[
            &[0xe2_u8][..],
            &[0x67, 0xe2][..],
            &[0xe1][..],
            &[0xe0][..],
            &[0xff, 0xc9, 0x75][..],
            &[0x48, 0x83, 0xe9, 1, 0x75][..],
        ]);
        item.bytes.extend_from_slice(tail);
        let back = i64::try_from(start).ok()? - item.bytes.len() as i64 - 1;
        item.bytes.push(i8::try_from(back).ok()? as u8);
        Some(item)
    }

    /// A call, a return or an indirect jump, to what follows.
    pub(super) fn call(&mut self) -> Option<Item> {
        let register = self.random.byte() & 15;
        if self.is_pointer(register) {
            return None;
        }
        let (high, low) = (register >> 3, register & 7);
        // lea register, [rip+n]
        let lea = |n: u8| [0x48 | high << 2, 0x8d, 5 | low << 3, n, 0, 0, 0];
        let rest: &[u8] = match self.random.below(6) {
            // call next; pop register
            0 => return Some(Item::of(&[0xe8, 0, 0, 0, 0, 0x40 | high, 0x58 | low])),
            // call over a jump; jmp end; ret
            1 => return Some(Item::of(&[0xe8, 2, 0, 0, 0, 0xeb, 1, 0xc3])),
            // push register; ret
            2 => &[0x40 | high, 0x50 | low, 0xc3],
            // jmp register
            3 => &[0x40 | high, 0xff, 0xe0 | low],
            // call register; then (also where it leads) add rsp, 8
            4 => &[0x40 | high, 0xff, 0xd0 | low],
            // push register; ret 16; then sub rsp, 16 (lea, to leave the flags)
            _ => &[0x40 | high, 0x50 | low, 0xc2, 16, 0],
        };
        let mut item = Item::of(&lea(rest.len() as u8));
        item.bytes.extend_from_slice(rest);
        match rest.last() {
            Some(0) => item.bytes.extend_from_slice(&[0x48, 0x8d, 0x64, 0x24, 0xf0]),
            Some(0xd0..=0xd7) => item.bytes.extend_from_slice(&[0x48, 0x8d, 0x64, 0x24, 8]),
            _ => {}
        }
        Some(item)
    }

    /// lea `to`, [pointer + displacement]
    fn lea(&mut self, to: u8) -> Item {
        let base = self.random.pick(&self.pointers);
        let displacement = self.random.below(0x400) as i64 - 0x200;
        let mut bytes = vec![0x48 | base >> 3, 0x8d, 0x80 | to << 3 | base & 7];
        if base & 7 == 4 {
            bytes.push(0x24);
        }
        bytes.extend_from_slice(&(self.aligned(displacement) as i32).to_le_bytes());
        Item::of(&bytes)
    }

    /// A string instruction, XLAT or a masked store, with its fixed registers set.
    pub(super) fn string(&mut self) -> Option<Item> {
        if self.pointers.iter().any(|p| matches!(p, 0 | 1 | 3 | 6 | 7)) {
            return None;
        }
        let mut item = Item::default();
        if self.random.chance(10) {
            item.append(&self.lea(3));
            item.bytes.push(0xd7);
            return Some(item);
        }
        item.append(&self.lea(6));
        item.append(&self.lea(7));
        if self.kinds.sse && self.random.chance(30) {
            // maskmovdqu or maskmovq
            if self.random.chance(50) {
                item.bytes.push(0x66);
            }
            item.bytes.extend_from_slice(&[0x0f, 0xf7, 0xc0 | self.random.byte() & 0x3f]);
            return Some(item);
        }
        let repeat = self.random.pick(&[0, 0xf3, 0xf3, 0xf2]);
        if repeat != 0 {
            item.bytes.extend_from_slice(&[0xb9, self.random.byte() & 0x3f, 0, 0, 0]);
        }
        if self.random.chance(20) {
            item.bytes.push(self.random.pick(&[0xfc, 0xfd]));
        }
        if self.random.chance(25) {
            item.bytes.push(0x66);
        }
        if repeat != 0 {
            item.bytes.push(repeat);
        }
        if self.random.chance(40) {
            item.bytes.push(0x48);
        }
        item.bytes.push(self.random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]));
        Some(item)
    }

    /// push flags; popf. TF, NT, AC, VM and RF stay clear.
    pub(super) fn pop_flags(&mut self) -> Item {
        let flags = (self.random.word() as u32 & 0xcd5 | 0x202).to_le_bytes();
        if self.random.chance(25) {
            return Item::of(&[0x66, 0x68, flags[0], flags[1], 0x66, 0x9d]);
        }
        Item::of(&[0x68, flags[0], flags[1], flags[2], flags[3], 0x9d])
    }

    /// A division that does not overflow every time.
    pub(super) fn divide(&mut self) -> Option<Item> {
        let divisor = self.random.byte() & 15;
        if self.pointers.iter().any(|p| *p == 0 || *p == 2) || divisor == 0 || divisor == 2 {
            return None;
        }
        let (high, low) = (divisor >> 3, divisor & 7);
        let signed = self.random.chance(50);
        let width = self.random.below(4);
        let rex = 0x40 | high | if width == 3 { 8 } else { 0 };
        let mut item = Item::default();
        if width == 1 {
            item.bytes.push(0x66);
        }
        match (width, signed) {
            (0, false) => item.bytes.extend_from_slice(&[0x0f, 0xb6, 0xc0]),
            (0, true) => item.bytes.extend_from_slice(&[0x66, 0x98]),
            (_, true) => item.bytes.extend_from_slice(&[rex & !1, 0x99]),
            // movzx edx, dl leaves some overflows; xor would change flags, which is also fine, but this keeps them.
            (1, false) => item.bytes.extend_from_slice(&[0xba, 0, 0]),
            (_, false) => item.bytes.extend_from_slice(&[0xba, 0, 0, 0, 0]),
        }
        if width == 1 {
            item.bytes.push(0x66);
        }
        let opcode = if width == 0 { 0xf6 } else { 0xf7 };
        item.bytes.extend_from_slice(&[rex, opcode, if signed { 0xf8 } else { 0xf0 } | low]);
        Some(item)
    }

    /// A save or a load of FPU state, at places where images were saved before and their headers changed.
    pub(super) fn state(&mut self) -> Option<Item> {
        if self.pointers.iter().any(|p| *p == 0 || *p == 2) {
            return None;
        }
        let mut item = Item::default();
        // mov eax, components; mov edx, 0 or -1
        let components = self.random.byte() & 15;
        item.bytes.extend_from_slice(&[0xb8, self.random.pick(&[7, 7, components]), 0, 0, 0]);
        item.bytes
            .extend_from_slice(self.random.pick(&[&[0xba_u8, 0, 0, 0, 0][..], &[0xba, 0xff, 0xff, 0xff, 0xff][..]]));
        let offset = self.random.pick(&[0, 0, 0, 0, 0, 0x400, 8, 16]);
        let wide = self.random.byte() & 8;
        // (prefix, opcode, reg field)
        // Whether a component with its initial values counts as in use is the processor's choice: FNSTENV, LDMXCSR and their
        // like make it so, which a save then shows. A sequence has these, or components that are made initial.
        let mut choice = self.random.below(22);
        let initial = self.pointers[1] & 1 == 1;
        if initial && (14..20).contains(&choice) {
            choice -= 11;
        }
        let present = if initial { self.random.byte() & 7 } else { 7 };
        // An image of initial values that was saved and is loaded counts as in use, too.
        let loads = (7..12).contains(&choice) || choice == 13;
        if choice == 17 || (loads && initial && self.has_loaded) {
            return None;
        }
        self.has_loaded |= loads;
        let (prefix, opcode, reg, offset) = match choice {
            0..3 => (None, 0xae, 4, offset),  // xsave
            3..6 => (None, 0xc7, 4, offset),  // xsavec
            6 => (None, 0xae, 6, 0x800),      // xsaveopt, where nothing is loaded from: it may skip
            7..12 => (None, 0xae, 5, offset), // xrstor
            12 => (None, 0xae, 0, offset),    // fxsave
            13 => (None, 0xae, 1, offset),    // fxrstor
            14 => (None, 0xae, 2, 24),        // ldmxcsr of an image
            15 => (None, 0xae, 3, offset),    // stmxcsr
            16 => (Some(0xd9), 0, 6, 0xa00),  // fnstenv, where it does not hit MXCSR in an image
            17 => (Some(0xdd), 0, 6, 0xa00),  // fnsave
            18 => (Some(0xd9), 0, 4, 0xa00),  // fldenv
            19 => (Some(0xdd), 0, 4, 0xa00),  // frstor
            20 => {
                // A header word becomes small, or zero: mov qword [pointer + 512 + n], imm32
                let word = 0x200 + 8 * self.random.below(8) as i32;
                let value = if word == 0x200 { i32::from(present) } else { 0 };
                let store = self.at_pointer(&[0xc7], 8, 0, word);
                item.append(&store);
                item.bytes.extend_from_slice(&value.to_le_bytes());
                return Some(item);
            }
            _ => {
                // MXCSR of an image: mov dword [pointer + 24], imm32
                let store = self.at_pointer(&[0xc7], 0, 0, 24);
                item.append(&store);
                let value = self.random.word() as u32 & self.random.pick(&[0xffff, 0xffff, 0x1_ffff]);
                item.bytes.extend_from_slice(&value.to_le_bytes());
                return Some(item);
            }
        };
        let body = match prefix {
            Some(first) => self.at_pointer(&[first], 0, reg, offset),
            None => self.at_pointer(&[0x0f, opcode], if choice == 14 || choice == 15 { 0 } else { wide }, reg, offset),
        };
        // A header that is all zero but for the components makes most loads succeed.
        if (7..12).contains(&choice) && self.random.chance(70) {
            for word in 1..8 {
                let store = self.at_pointer(&[0xc7], 8, 0, 0x200 + 8 * word);
                item.append(&store);
                item.bytes.extend_from_slice(&[0; 4]);
            }
            let store = self.at_pointer(&[0xc7], 8, 0, 0x200);
            item.append(&store);
            item.bytes.extend_from_slice(&[present, 0, 0, 0]);
            let store = self.at_pointer(&[0xc7], 0, 0, 24);
            item.append(&store);
            item.bytes.extend_from_slice(&[self.random.byte(), self.random.byte(), 0, 0]);
        }
        if !self.kinds.pointers {
            // FIP and FDP, and FOP before them, of an image or of an environment.
            let pieces: &[(u8, i32)] = match choice {
                7..=11 | 13 => &[(8, offset + 8), (8, offset + 16), (0, offset + 4)],
                18 | 19 => &[(8, offset + 12), (8, offset + 20)],
                _ => &[],
            };
            for (w, place) in pieces {
                let store = self.at_pointer(&[0xc7], *w, 0, *place);
                item.append(&store);
                item.bytes.extend_from_slice(&[0xff, 0, 0, 0]);
                let length = item.bytes.len();
                // The word at 4 has the tags; the others are zero.
                item.bytes[length - 4] = if *w == 0 { 0xff } else { 0 };
            }
        }
        item.append(&body);
        Some(item)
    }

    /// An instruction on `[first pointer + displacement]`.
    fn at_pointer(&self, opcode: &[u8], w: u8, reg: u8, displacement: i32) -> Item {
        let base = self.pointers[0];
        let mut bytes = vec![0x40 | w | base >> 3];
        bytes.extend_from_slice(opcode);
        bytes.push(0x80 | reg << 3 | base & 7);
        if base & 7 == 4 {
            bytes.push(0x24);
        }
        bytes.extend_from_slice(&displacement.to_le_bytes());
        Item::of(&bytes)
    }
}
