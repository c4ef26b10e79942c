//! Instructions that are copied, with their registers and memory operands replaced.

use iced_x86::{Mnemonic, OpKind, Register};

use super::asm::{Mem, RCX, Reg, T0, T1};
use super::block::Insn;
use super::encode::{Fields, slot, slots};
use super::enter::home;
use super::exits::Cold;
use super::frame;
use super::lower::{Flags, Lowering};

impl Lowering<'_> {
    /// Emits an instruction with the fields as they are, the flags being where it needs them.
    pub(super) fn copy(&mut self, insn: &Insn, fields: &Fields, mem: Option<Mem>) {
        // What it leaves alone must be beside what it changes.
        let kept = if insn.flags_changed != 0 { insn.live_out & !insn.flags_killed } else { 0 };
        self.need_flags(insn.flags_read | kept);
        if matches!(insn.iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && mem.is_none() {
            match insn.iced.op0_register().size() {
                4 => self.check_divisor(insn, Reg(fields.rm), false),
                8 => self.check_divisor(insn, Reg(fields.rm), true),
                _ => {}
            }
        }
        if can_fault(insn) {
            self.may_fault();
        }
        fields.emit(self.c.asm, mem);
        if insn.flags_changed != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Leaves before a division by a register that is zero: much cheaper than a signal of the host. Changes no flags, because a
    /// handler sees those from before the division. `divisor` is the host's register, of 4 or 8 bytes.
    fn check_divisor(&mut self, insn: &Insn, divisor: Reg, wide: bool) {
        let saved = if divisor == T0 { T1 } else { T0 };
        if saved == T1 {
            self.in_t1 = None;
        }
        let (site, flags) = (self.interpret(insn), self.flags);
        let label = self.c.asm.label();
        let asm = &mut *self.c.asm;
        if divisor == RCX {
            if !wide {
                asm.byte(0x67);
            }
            // jrcxz over the next jump; jmp over the one behind it
            asm.bytes(&[0xe3, 2, 0xeb, 5]);
            asm.jmp(label);
        } else {
            asm.mov(saved, RCX);
            if wide {
                asm.mov(RCX, divisor);
            } else {
                asm.mov32(RCX, divisor);
            }
            // Likewise, and over the MOV of three bytes.
            asm.bytes(&[0xe3, 2, 0xeb, 8]);
            asm.mov(RCX, saved);
            asm.jmp(label);
            asm.mov(RCX, saved);
        }
        self.cold.push(Cold::Leave { label, site, flags });
    }

    /// Copies an instruction with its registers and memory operand replaced.
    pub(super) fn plain(&mut self, index: usize, insn: &Insn) -> Option<()> {
        if uses_high_byte(insn) && (insn.operand.is_some() || names_stack(insn)) {
            return None;
        }
        let mem = self.operand(index, insn);
        if insn.operand.is_some() && mem.is_none() {
            return None;
        }
        let stored = self.stored.take();
        let copied = self.plain_at(insn, mem);
        if let Some(done) = stored {
            self.c.asm.bind(done);
        }
        copied
    }

    /// Copies an instruction whose memory operand, if it has one, is at `mem`.
    pub(super) fn plain_at(&mut self, insn: &Insn, mut mem: Option<Mem>) -> Option<()> {
        let mut fields = insn.fields?;
        let slots = slots(insn.iced.code());
        let homeless = homeless(&fields, slots, insn.operand.is_none());
        if uses_high_byte(insn) {
            // AH..BH cannot be named together with REX, which R8..R15 need; their numbers are those of RSP..RDI.
            self.copy(insn, &fields, None);
            return Some(());
        }
        let mut scratch = [T0, T1].into_iter();
        if let Some(address) = mem {
            if homeless.iter().flatten().count() > 1 {
                return None;
            }
            if homeless[0].is_some() {
                mem = Some(self.fold(address));
            }
            scratch = [T0, T0].into_iter();
        } else if homeless.iter().flatten().count() > 2 {
            return None;
        }
        let writes_only = overwrites_first_operand(insn);
        let mut moved: [Option<(u8, Reg)>; 3] = [None; 3];
        for (place, guest) in homeless.iter().flatten().enumerate() {
            let host = scratch.next()?;
            if host == T1 {
                self.in_t1 = None;
            }
            if !(writes_only && place == 0 && first_operand_is(insn, *guest) && !reads_elsewhere(insn, *guest)) {
                self.c.asm.load(host, Mem::vcpu(frame::gpr((*guest).into())));
            }
            moved[place] = Some((*guest, host));
        }
        substitute(&mut fields, slots, insn.operand.is_none(), &moved);
        self.copy(insn, &fields, mem);
        for (guest, host) in moved.iter().flatten() {
            if insn.writes & 1 << guest != 0 {
                self.store_home(*guest, *host);
            }
        }
        Some(())
    }
}

fn register_operands(insn: &Insn) -> impl Iterator<Item = Register> + '_ {
    let is_register = |operand: &u32| insn.iced.op_kind(*operand) == OpKind::Register;
    (0..insn.iced.op_count()).filter(is_register).map(|operand| insn.iced.op_register(operand))
}

fn uses_high_byte(insn: &Insn) -> bool {
    register_operands(insn)
        .any(|register| matches!(register, Register::AH | Register::CH | Register::DH | Register::BH))
}

fn names_stack(insn: &Insn) -> bool {
    register_operands(insn).any(|register| register.full_register() == Register::RSP)
}

/// The register numbers in the fields of an instruction that hold general registers.
fn named(fields: &Fields, slots: u8, rm_is_register: bool) -> impl Iterator<Item = u8> {
    [
        (slots & slot::REG != 0).then_some(fields.reg),
        (slots & slot::RM != 0 && rm_is_register).then_some(fields.rm),
        (slots & slot::OPCODE != 0).then_some(fields.embedded),
        (slots & slot::VVVV != 0).then_some(fields.vvvv),
    ]
    .into_iter()
    .flatten()
}

/// The distinct guest registers of an instruction that live in the VCPU.
fn homeless(fields: &Fields, slots: u8, rm_is_register: bool) -> [Option<u8>; 3] {
    let mut found = [None; 3];
    for guest in named(fields, slots, rm_is_register) {
        if home(guest).is_none()
            && !found.contains(&Some(guest))
            && let Some(place) = found.iter_mut().find(|place| place.is_none())
        {
            *place = Some(guest);
        }
    }
    found
}

fn substitute(fields: &mut Fields, slots: u8, rm_is_register: bool, moved: &[Option<(u8, Reg)>; 3]) {
    let host = |guest: u8| match home(guest) {
        Some(host) => host.0,
        None => moved.iter().flatten().find(|(number, _)| *number == guest).map_or(guest, |(_, host)| host.0),
    };
    if slots & slot::REG != 0 {
        fields.reg = host(fields.reg);
    }
    if slots & slot::RM != 0 && rm_is_register {
        fields.rm = host(fields.rm);
    }
    if slots & slot::OPCODE != 0 {
        fields.embedded = host(fields.embedded);
    }
    if slots & slot::VVVV != 0 {
        fields.vvvv = host(fields.vvvv);
    }
}

/// Whether the host may refuse the copied instruction: a division, an unaligned operand, a SIMD exception.
fn can_fault(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    insn.is_simd || matches!(insn.iced.mnemonic(), M::Div | M::Idiv | M::Cmpxchg16b)
}

/// Whether the first operand is overwritten whole without being read: its old value need not be loaded.
fn overwrites_first_operand(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    let register = insn.iced.op0_register();
    matches!(insn.iced.mnemonic(), M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movd | M::Movq)
        && insn.iced.op0_kind() == OpKind::Register
        && (register.is_gpr64() || register.is_gpr32())
}

fn first_operand_is(insn: &Insn, guest: u8) -> bool {
    insn.iced.op0_register().number() == usize::from(guest)
}

fn reads_elsewhere(insn: &Insn, guest: u8) -> bool {
    (1..insn.iced.op_count()).any(|operand| {
        insn.iced.op_kind(operand) == OpKind::Register && {
            let register = insn.iced.op_register(operand);
            register.is_gpr() && register.full_register().number() == usize::from(guest)
        }
    })
}
