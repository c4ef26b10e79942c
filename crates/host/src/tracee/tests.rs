//! A tracee with a few bytes of code. Contract of the unsafe code: signals to children of ours, and a handler that counts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::map::memfd;

const AT: u64 = 0x40_0000;
const DATA: u64 = 0x7f12_3456_7000;

/// A tracee with `code` at [`AT`] and a writable page at [`DATA`], and the file behind both; `None`, said aloud, where the
/// host allows no tracing.
fn with_code(code: &[u8]) -> Option<(Tracee, File, Registers)> {
    let file = memfd(c"test", 2 * PAGE as u64).unwrap();
    file.write_all_at(code, 0).unwrap();
    let mut tracee = match Tracee::new(&[&file]) {
        Ok(tracee) => tracee,
        Err(error) => {
            eprintln!("skipped: the host allows no tracee: {error}");
            return None;
        }
    };
    let page = PAGE as u64;
    tracee
        .order(&[Order::map(AT, page, Rights::Execute, 0, 0), Order::map(DATA, page, Rights::Write, 0, page)])
        .unwrap();
    let mut registers = start::no_registers();
    registers.rip = AT;
    registers.eflags = 0x202;
    Some((tracee, file, registers))
}

fn run(tracee: &mut Tracee, registers: &Registers) -> (Stop, Registers) {
    tracee.set_registers(registers).unwrap();
    let stop = tracee.run();
    (stop, tracee.registers().unwrap())
}

#[test]
fn code_runs_until_its_system_call_which_is_not_carried_out() {
    // mov eax, 39; mov [rbx], r15; add r15, 1; syscall
    let code = [0xb8, 39, 0, 0, 0, 0x4c, 0x89, 0x3b, 0x49, 0x83, 0xc7, 1, 0x0f, 5];
    let Some((mut tracee, file, mut registers)) = with_code(&code) else { return };
    registers.rbx = DATA + 8;
    registers.r15 = u64::MAX;
    registers.fs_base = 0x1234_5000;
    let (stop, after) = run(&mut tracee, &registers);
    assert_eq!(stop, Stop::Call);
    assert_eq!((after.orig_rax, after.rip, after.r15, after.fs_base), (39, AT + code.len() as u64, 0, 0x1234_5000));
    assert_eq!(after.eflags & 0x8d5, 0x55, "ZF, PF, AF and CF of the addition");
    let mut stored = [0; 8];
    file.read_exact_at(&mut stored, PAGE as u64 + 8).unwrap();
    assert_eq!(stored, [0xff; 8]);
}

#[test]
fn nothing_else_is_mapped_and_nothing_is_writable_that_was_not_meant_to_be() {
    // mov [rbx], rax
    let Some((mut tracee, _file, mut registers)) = with_code(&[0x48, 0x89, 0x03]) else { return };
    let orders = tracee.reserved().start + PAGE as u64;
    for address in [AT, 0x1_0000, 0x7fff_ffff_e000, tracee.reserved().start, orders, orders + PAGE as u64] {
        registers.rbx = address;
        let (stop, after) = run(&mut tracee, &registers);
        assert_eq!(stop, Stop::Access(address));
        assert_eq!(after.rip, AT);
    }
}

#[test]
fn the_vsyscall_page_of_the_host_gives_nothing_and_one_may_go_on_from_there() {
    // call rax; syscall
    let Some((mut tracee, _file, mut registers)) = with_code(&[0xff, 0xd0, 0x0f, 0x05]) else { return };
    for page in [0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_0400, 0xffff_ffff_ff60_0800] {
        (registers.rip, registers.rax, registers.rsp) = (AT, page, DATA + 0x800);
        let (stop, after) = run(&mut tracee, &registers);
        assert!(matches!(stop, Stop::Fault | Stop::Access(_)), "{stop:?}");
        assert_eq!((after.rip, after.rsp), (page, DATA + 0x7f8));
        // As if the guest's kernel had served it.
        (registers.rip, registers.rax, registers.rsp) = (AT + 2, 5, DATA + 0x800);
        let (stop, after) = run(&mut tracee, &registers);
        assert_eq!((stop, after.orig_rax, after.rip), (Stop::Call, 5, AT + 4));
    }
}

#[test]
fn vectors_come_and_go_whole() {
    // vaddps ymm1, ymm0, ymm0; int3
    let Some((mut tracee, _file, registers)) = with_code(&[0xc5, 0xfc, 0x58, 0xc8, 0xcc]) else { return };
    let mut area = [0; VECTORS];
    area[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    area[XSTATE_BV] = 7;
    for lane in 0..4 {
        area[160 + 4 * lane..][..4].copy_from_slice(&1.5_f32.to_le_bytes());
        area[576 + 4 * lane..][..4].copy_from_slice(&2.5_f32.to_le_bytes());
    }
    tracee.set_vectors(&area).unwrap();
    let (stop, _) = run(&mut tracee, &registers);
    assert_eq!(stop, Stop::Trap { is_step: false });
    let mut after = [0; VECTORS];
    assert!(tracee.vectors(&mut after).unwrap());
    assert_eq!(after[176..180], 3_f32.to_le_bytes());
    assert_eq!(after[592..596], 5_f32.to_le_bytes());
    assert_eq!(after[160..176], area[160..176]);
    assert_eq!((after[XSTATE_BV], &after[24..28]), (7, &area[24..28]));
}

#[test]
fn a_kick_stops_an_endless_loop_and_one_that_comes_early_counts() {
    // jmp $
    let Some((mut tracee, _file, registers)) = with_code(&[0xeb, 0xfe]) else { return };
    let kicker = Arc::<Kicker>::default();
    kicker.kick();
    kicker.announce(&tracee);
    kicker.kick();
    assert_eq!(run(&mut tracee, &registers).0, Stop::Kick);
    let twin = Arc::clone(&kicker);
    let other = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        twin.kick();
    });
    assert_eq!(run(&mut tracee, &registers).0, Stop::Kick);
    other.join().unwrap();
    kicker.withdraw();
    kicker.kick();
    // An order in between is not disturbed by a kick that still waits.
    tracee.order(&[Order::unmap(DATA, PAGE as u64)]).unwrap();
    assert_eq!(tracee.registers().unwrap().rip, tracee.reserved().start + start::LOOP + 47);
}

#[test]
fn a_step_is_told_from_a_breakpoint() {
    // push 0x302; popf; nop; int3
    let code = [0x68, 0x02, 0x03, 0, 0, 0x9d, 0x90, 0xcc];
    let Some((mut tracee, _file, mut registers)) = with_code(&code) else { return };
    registers.rsp = DATA + 0x800;
    let (stop, after) = run(&mut tracee, &registers);
    assert_eq!((stop, after.rip, after.eflags & 0x100), (Stop::Trap { is_step: true }, AT + 7, 0x100));
    registers.rip = AT + 7;
    let (stop, after) = run(&mut tracee, &registers);
    assert_eq!((stop, after.rip), (Stop::Trap { is_step: false }, AT + 8));
}

#[test]
fn a_break_comes_before_its_instruction_and_again_at_the_next_time() {
    // inc r15; mov r14, [code]; inc r13; int3
    let code = [0x49, 0xff, 0xc7, 0x4c, 0x8b, 0x34, 0x25, 0, 0, 0x40, 0, 0x49, 0xff, 0xc5, 0xcc];
    let Some((mut tracee, _file, registers)) = with_code(&code) else { return };
    let before = |tracee: &mut Tracee, registers: &Registers| {
        let (stop, after) = run(tracee, registers);
        assert_eq!(stop, Stop::Break);
        after
    };
    tracee.break_at(&[AT + 3, DATA, AT + 11]).unwrap();
    for _ in 0..3 {
        let after = before(&mut tracee, &registers);
        assert_eq!((after.rip, after.r15, after.r14), (AT + 3, 1, 0));
    }
    // The code reads as it is: a breakpoint leaves no trace in it. Over the first one by a step that the tracer makes.
    let after = before(&mut tracee, &Registers { rip: AT + 3, eflags: 0x1_0202, ..registers });
    assert_eq!((after.rip, after.r14.to_le_bytes()), (AT + 11, code[..8].try_into().unwrap()));
    tracee.break_at(&[AT]).unwrap();
    assert_eq!(before(&mut tracee, &registers).rip, AT);
    tracee.break_at(&[]).unwrap();
    let (stop, after) = run(&mut tracee, &registers);
    assert_eq!((stop, after.r15, after.r13), (Stop::Trap { is_step: false }, 1, 1));
}

#[test]
fn cpuid_faults_while_it_is_forbidden() {
    // cpuid; int3
    let Some((mut tracee, _file, registers)) = with_code(&[0x0f, 0xa2, 0xcc]) else { return };
    if let Err(error) = tracee.forbid_cpuid(true) {
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        eprintln!("skipped: the host's processor cannot forbid CPUID");
        return;
    }
    for _ in 0..2 {
        let (stop, after) = run(&mut tracee, &registers);
        assert_eq!((stop, after.rip), (Stop::Fault, AT));
    }
    tracee.forbid_cpuid(false).unwrap();
    assert_eq!(run(&mut tracee, &registers).0, Stop::Trap { is_step: false });
}

#[test]
fn no_other_call_of_its_kind_passes_the_filter() {
    let Some((mut tracee, _file, _)) = with_code(&[0x90]) else { return };
    // ARCH_SET_FS: it would harm nobody.
    let set_fs = Order::new(libc::SYS_arch_prctl, [0x1002, 0x1000, 0, 0, 0, 0]);
    tracee.order(&[set_fs]).unwrap_err();
    assert_eq!(tracee.run(), Stop::Gone);
}

#[test]
fn an_order_that_the_host_refuses_is_an_error() {
    let Some((mut tracee, _file, _)) = with_code(&[0x90]) else { return };
    let page = PAGE as u64;
    let error = tracee.order(&[Order::unmap(DATA, page), Order::map(AT + 1, page, Rights::Read, 0, 0)]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let many = vec![Order::map(DATA, page, Rights::Read, 0, 0); Tracee::most_orders()];
    tracee.order(&many).unwrap();
}

#[test]
fn a_process_that_was_ended_is_told_of() {
    let Some((mut tracee, _file, registers)) = with_code(&[0xeb, 0xfe]) else { return };
    tracee.set_registers(&registers).unwrap();
    // SAFETY: a signal to a child of ours.
    unsafe { libc::kill(tracee.process, libc::SIGKILL) };
    assert_eq!(tracee.run(), Stop::Gone);
    assert_eq!(tracee.run(), Stop::Gone);
}

#[test]
fn nobody_is_told_of_each_stop() {
    static TOLD: AtomicI32 = AtomicI32::new(0);
    extern "C" fn count(_signal: i32) {
        TOLD.fetch_add(1, Ordering::SeqCst);
    }
    let handler = count as extern "C" fn(i32);
    // SAFETY: a handler that only counts; the action it takes the place of is the default one.
    unsafe { libc::signal(libc::SIGCHLD, handler as *const () as libc::sighandler_t) };
    // syscall
    let Some((mut tracee, _file, registers)) = with_code(&[0x0f, 5]) else { return };
    for _ in 0..1000 {
        assert_eq!(run(&mut tracee, &registers).0, Stop::Call);
    }
    // Tracees of other tests end meanwhile, and that is told.
    assert!(TOLD.load(Ordering::SeqCst) < 100, "{TOLD:?}");
}
