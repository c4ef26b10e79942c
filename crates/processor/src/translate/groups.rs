//! Accesses off one base register, checked once.
//!
//! Compiled code touches the stack and its structures by a base register and small displacements, again and again. All
//! accesses of a block through the same value of a register form a group: the first one checks the whole span of the group
//! in the TLB and keeps the host's pointer; the others use the pointer without a check. PUSH, POP, ADD and LEA that move
//! a register by a constant keep its value known.
//!
//! This is sound because TLB entries are only withdrawn between blocks and by what the interpreter does inside one; it ends
//! all groups.

use super::block::{Access, Insn, Kind, System};
use super::frame::GROUPS;
use iced_x86::{Code, Mnemonic, OpKind, Register};

/// A value that a register had: equal numbers mean equal values up to the known offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    version: u32,
    offset: i64,
}

#[derive(Clone, Copy, Debug)]
pub struct Group {
    version: u32,
    /// Whether the check is for stores.
    pub write: bool,
    /// The span of bytes that the group touches, relative to the value of its version.
    pub low: i64,
    pub high: i64,
    members: u32,
    /// Where the pointer is kept, when the group is worth it.
    pub slot: Option<usize>,
}

/// An access placed in its group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub group: usize,
    /// Offset of the access from the group's version.
    pub at: i64,
    /// What the base register holds now, relative to the version.
    pub base_offset: i64,
}

/// A wider span than this would cross a page too often.
const WIDEST: i64 = 256;

#[derive(Debug, Default)]
pub struct Groups {
    pub groups: Vec<Group>,
    /// For each instruction: the member of its operand and of its stack access.
    pub members: Vec<[Option<Member>; 2]>,
}

struct Registers {
    values: [Value; 16],
    next: u32,
}

impl Registers {
    fn new() -> Registers {
        let values = std::array::from_fn(|register| Value { version: register as u32, offset: 0 });
        Registers { values, next: 16 }
    }

    fn forget(&mut self, register: usize) {
        self.values[register] = Value { version: self.next, offset: 0 };
        self.next += 1;
    }

    fn after(&mut self, insn: &Insn) {
        match insn.kind {
            Kind::PushReg(_) | Kind::PushImm(_) | Kind::PushMem | Kind::System(System::PushFlags) => {
                self.values[4].offset -= 8;
            }
            Kind::System(System::PopFlags) => self.values[4].offset += 8,
            Kind::Callout => (0..16).for_each(|register| self.forget(register)),
            Kind::PopReg(register) => {
                self.values[4].offset += 8;
                self.forget(register.into());
            }
            Kind::Leave => {
                self.values[4] = Value { offset: self.values[5].offset + 8, ..self.values[5] };
                self.forget(5);
            }
            _ => match moved(insn) {
                Some((to, from, by)) => {
                    let value = self.values[from];
                    self.values[to] = Value { offset: value.offset + by, ..value };
                }
                None => {
                    let mut writes = insn.writes;
                    while writes != 0 {
                        self.forget(writes.trailing_zeros() as usize);
                        writes &= writes - 1;
                    }
                }
            },
        }
    }
}

/// For an instruction that makes a register another one (or itself) plus a constant: (to, from, constant).
fn moved(insn: &Insn) -> Option<(usize, usize, i64)> {
    let iced = &insn.iced;
    let to = iced.op0_register();
    if iced.op_count() == 0 || iced.op0_kind() != OpKind::Register || !to.is_gpr64() {
        return None;
    }
    let number = to.number();
    match iced.mnemonic() {
        Mnemonic::Add | Mnemonic::Sub
            if matches!(iced.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64) =>
        {
            let by = iced.immediate(1) as i64;
            Some((number, number, if iced.mnemonic() == Mnemonic::Add { by } else { by.checked_neg()? }))
        }
        Mnemonic::Inc => Some((number, number, 1)),
        Mnemonic::Dec => Some((number, number, -1)),
        Mnemonic::Mov if matches!(iced.code(), Code::Mov_r64_rm64 | Code::Mov_rm64_r64) => {
            (iced.op1_kind() == OpKind::Register).then(|| (number, iced.op1_register().number(), 0))
        }
        Mnemonic::Lea if iced.code() == Code::Lea_r64_m => {
            let base = iced.memory_base();
            let displacement = iced.memory_displacement64() as i64;
            (base.is_gpr64() && iced.memory_index() == Register::None && i32::try_from(displacement).is_ok())
                .then(|| (number, base.number(), displacement))
        }
        _ => None,
    }
}

impl Groups {
    /// Finds the groups of a block. With `enabled` false every access stays alone: for blocks whose groups proved to
    /// cross pages.
    pub fn find(&mut self, insns: &[Insn], enabled: bool) {
        self.groups.clear();
        self.members.clear();
        let mut registers = Registers::new();
        for insn in insns {
            let operand = insn.operand.and_then(|access| self.place(&registers, access));
            let stack = insn.stack.and_then(|access| self.place(&registers, access));
            self.members.push([operand, stack]);
            registers.after(insn);
        }
        let mut slots = 0..GROUPS;
        for group in &mut self.groups {
            if enabled && group.members > 1 {
                group.slot = slots.next();
            }
        }
    }

    fn place(&mut self, registers: &Registers, access: Access) -> Option<Member> {
        let (register, displacement) = access.simple?;
        let value = registers.values[usize::from(register)];
        let at = value.offset.checked_add(displacement.into())?;
        let end = at.checked_add(access.size.into())?;
        i32::try_from(at).ok()?;
        let open = self.groups.iter().rposition(|group| group.version == value.version && group.write == access.write);
        let index = match open {
            Some(index) if self.groups[index].high.max(end) - self.groups[index].low.min(at) <= WIDEST => {
                let group = &mut self.groups[index];
                group.low = group.low.min(at);
                group.high = group.high.max(end);
                group.members += 1;
                index
            }
            _ => {
                let write = access.write;
                self.groups.push(Group { version: value.version, write, low: at, high: end, members: 1, slot: None });
                self.groups.len() - 1
            }
        };
        Some(Member { group: index, at, base_offset: value.offset })
    }

    /// The member of an access, when its group keeps a pointer.
    pub fn member(&self, insn: usize, which: usize) -> Option<(Member, Group)> {
        let member = self.members[insn][which]?;
        let group = self.groups[member.group];
        group.slot.is_some().then_some((member, group))
    }
}
