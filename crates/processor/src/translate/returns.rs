//! Returns, led back to their calls without a search.
//!
//! A guest's CALL stores the address of a landing, which is host code of the calling block, in a table of the VCPU. A guest's
//! RET jumps to the landing that it finds there. The landing compares the guest's return address with the one that it stands
//! for; when the guest returned elsewhere, the jump cache finds out where to. The place in the table is that of the return
//! address in the guest's stack, so that returns out of several calls at once, and other stacks, do not disturb it.
//!
//! A landing is as good as a link inside its page: right in its mode, in its address space, and as long as nobody writes
//! that page. So there is a table for each mode, and they are emptied wherever jump caches or blocks are forgotten. An empty
//! place leads to the jump cache, too.

use super::asm::{Alu, BASE, Mem, T0, T1, cc};
use super::exits::Cold;
use super::frame;
use super::lower::{Flags, Lowering, Mode};

/// Landings in a table: these reach 2 KiB of stack.
pub const LANDINGS: usize = 256;

/// The bits of a stack address that are the offset of its place in a table.
const PLACE: i32 = (LANDINGS as i32 - 1) << 3;

#[derive(Debug)]
#[repr(C)]
pub struct Returns {
    pub landings: [[u64; LANDINGS]; 8],
    /// What looks in the jump cache of each mode.
    lookups: [u64; 8],
}

impl Returns {
    /// Tables on which no code can run yet.
    pub const fn new() -> Returns {
        Returns { landings: [[0; LANDINGS]; 8], lookups: [0; 8] }
    }

    /// Empties the tables of another translator.
    pub fn prepare(&mut self, lookups: &[u64; 8]) {
        // No two translators have the first at the same place, unless all are.
        if self.lookups[0] != lookups[0] {
            self.lookups = *lookups;
            self.clear(true);
            self.clear(false);
        }
    }

    /// Empties the tables of user code, or those of kernel code.
    pub fn clear(&mut self, user: bool) {
        for (mode, (table, lookup)) in self.landings.iter_mut().zip(self.lookups).enumerate() {
            // Only these modes there are.
            if Mode(mode as u8).is_user() == user && mode as u8 & (Mode::USER | Mode::AC) != Mode::USER | Mode::AC {
                table.fill(lookup);
            }
        }
    }
}

impl Lowering<'_> {
    /// Remembers that the call at work, whose return address is on the guest's stack, shall come back to `next`. `live` are
    /// the flags that the call keeps. Clobbers T0 and T1.
    pub(super) fn note_call(&mut self, next: u64, live: u32) {
        if !self.is_linkable(next) {
            return;
        }
        self.before_clobber(live);
        self.place_of_return();
        let landing = self.c.asm.label();
        let returns = frame::returns(self.c.mode.0.into());
        self.c.asm.lea_label(T0, landing);
        self.c.asm.store(Mem::indexed(BASE, T1, 0, returns), T0);
        self.cold.push(Cold::Landing { label: landing, next });
    }

    /// Computes the place of the return address that guest RSP points at into T1.
    fn place_of_return(&mut self) {
        let stack = self.register(4, T1);
        self.c.asm.mov32(T1, stack);
        self.c.asm.alu_imm32(Alu::And, T1, PLACE);
        self.in_t1 = None;
    }

    /// The landing of a call. The guest returned to the address in T0, with its flags in their slot.
    pub(super) fn land(&mut self, next: u64) {
        self.flags = Flags::Slot;
        let lookup = self.c.stubs.lookup(self.c.mode);
        let asm = &mut *self.c.asm;
        match i32::try_from(next as i64) {
            Ok(next) => asm.alu_imm(Alu::Cmp, T0, next),
            Err(_) => {
                asm.mov_imm(T1, next);
                asm.alu(Alu::Cmp, T0, T1);
            }
        }
        asm.jcc_address(cc::NZ, lookup);
        self.jump_to(next);
    }

    /// RET, the return address being in T0 and still on the guest's stack. Flags must be in their slot.
    pub(super) fn return_to_t0(&mut self, extra: u16) {
        self.place_of_return();
        self.move_stack(8 + i32::from(extra));
        self.c.asm.jmp_mem(Mem::indexed(BASE, T1, 0, frame::returns(self.c.mode.0.into())));
    }
}
