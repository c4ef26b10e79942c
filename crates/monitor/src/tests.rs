//! Machines with tiny guests, in 32-bit protected mode without paging: the whole way from the assembly to the end.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use x86::Gpa;

use crate::slow::SlowDevice;
use crate::{Error, Options, Vm};

const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x1100;
const IDT: u64 = 0x2000;
const GDT: u64 = 0x2800;
const COUNT: Gpa = Gpa(0x3000);
const LONG: Duration = Duration::from_secs(60);

/// mov dx,0x604; mov ax,0x3400 (sleep type 5, sleep); out dx,ax; hlt
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4];
const HALT_FOR_EVER: &[u8] = &[0xf4, 0xeb, 0xfd];

fn machine(code: &[u8]) -> Vm {
    machine_with(code, "interpret", 1)
}

fn machine_with(code: &[u8], engine: &str, processors: usize) -> Vm {
    let options = Options {
        memory: 16 << 20,
        processors,
        engine: engine.into(),
        cpu_features: Vec::new(),
        count_instructions: false,
        profile: false,
        trace: None,
        translations: None,
        has_pci_devices: true,
        devices: Vec::new(),
        translation_bytes: None,
    };
    let vm = Vm::assemble(&options).unwrap();
    vm.write_memory(Gpa(CODE), code).unwrap();
    // Null, flat code, flat data.
    for (index, descriptor) in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().enumerate() {
        vm.write_memory(Gpa(GDT + 8 * index as u64), &descriptor.to_le_bytes()).unwrap();
    }
    let mut registers = vec![("rip", CODE), ("rsp", 0x8000), ("cr0", 0x11), ("cs", 8), ("idtr_limit", 0)];
    registers.extend([("ss", 0x10), ("ds", 0x10), ("es", 0x10), ("gdtr_base", GDT), ("gdtr_limit", 0x17)]);
    let mut registers: Vec<(String, u64)> = registers.into_iter().map(|(name, value)| (name.into(), value)).collect();
    for name in ["cs", "ss", "ds", "es"] {
        let attributes = if name == "cs" { 0xc09b } else { 0xc093 };
        registers.push((format!("{name}_base"), 0));
        registers.push((format!("{name}_limit"), 0xffff_ffff));
        registers.push((format!("{name}_attributes"), attributes));
    }
    vm.set_registers(0, &registers).unwrap();
    vm
}

fn run(code: &[u8]) -> String {
    let vm = machine(code);
    vm.start().unwrap();
    vm.wait(Some(LONG)).unwrap().expect("the guest ends")
}

fn count(vm: &Vm) -> u32 {
    let bytes = vm.read_memory(COUNT, 4).unwrap();
    u32::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn power_off_and_triple_fault_end_the_machine() {
    assert_eq!(run(POWER_OFF), "poweroff");
    // UD2, and no IDT to find a handler in.
    assert_eq!(run(&[0x0f, 0x0b]), "triple-fault");
}

#[test]
fn a_halted_processor_sleeps_until_the_machine_is_stopped() {
    let vm = machine(HALT_FOR_EVER);
    vm.start().unwrap();
    let halts = || vm.stats().into_iter().find(|(name, _)| name == "exits.halt").unwrap().1;
    let begin = Instant::now();
    while halts() == 0 && begin.elapsed() < LONG {
        assert_eq!(vm.wait(Some(Duration::from_millis(10))).unwrap(), None);
    }
    assert_eq!(halts(), 1);
    // Looking at it woke its thread but not the guest.
    vm.pause().unwrap();
    assert_eq!(vm.registers(0).unwrap().iter().find(|(name, _)| name == "rip").unwrap().1, CODE + 1);
    vm.end("stopped".into());
    assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("stopped"));
}

#[test]
fn timer_interrupts_wake_a_halted_processor() {
    let mut code = Vec::new();
    // The PIC: vectors from 0x20, only line 0 open. The PIT: channel 0, mode 2, 100 Hz.
    let ports =
        [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)];
    for (port, value) in ports {
        code.extend([0xb0, value, 0xe6, port]); // mov al,value; out port,al
    }
    // sti; again: hlt; cmp dword [0x3000],5; jb again
    code.extend([0xfb, 0xf4, 0x83, 0x3d, 0x00, 0x30, 0, 0, 5, 0x72, 0xf6]);
    code.extend(POWER_OFF);
    let vm = machine(&code);
    // inc dword [0x3000]; push eax; mov al,0x20; out 0x20,al; pop eax; iret
    let handler = [0xff, 0x05, 0x00, 0x30, 0, 0, 0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
    vm.write_memory(Gpa(HANDLER), &handler).unwrap();
    let gate = HANDLER | 8 << 16 | 0x8e00 << 32;
    vm.write_memory(Gpa(IDT + 8 * 0x20), &gate.to_le_bytes()).unwrap();
    vm.set_registers(0, &[("idtr_base".into(), IDT), ("idtr_limit".into(), 0x7ff)]).unwrap();
    let begin = Instant::now();
    vm.start().unwrap();
    assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("poweroff"));
    assert_eq!(count(&vm), 5);
    assert!(begin.elapsed() >= Duration::from_millis(40), "five ticks of a hundredth of a second");
}

/// Tells the test what it was asked; answers 7.
struct Told(Sender<(u16, u8, Option<u32>)>);

impl SlowDevice for Told {
    fn name(&self) -> String {
        "Told".into()
    }
    fn read(&mut self, offset: u16, size: u8) -> Result<u32, String> {
        self.0.send((offset, size, None)).map_err(|error| error.to_string())?;
        Ok(7)
    }
    fn write(&mut self, offset: u16, size: u8, value: u32) -> Result<(), String> {
        self.0.send((offset, size, Some(value))).map_err(|error| error.to_string())
    }
}

#[test]
fn a_slow_device_is_asked_and_its_failure_ends_the_machine() {
    // mov dx,0x511; in al,dx; mov [0x3000],al; out dx,eax
    let mut code = vec![0x66, 0xba, 0x11, 0x05, 0xec, 0xa2, 0x00, 0x30, 0, 0, 0x66, 0xba, 0x10, 0x05, 0xef];
    code.extend(POWER_OFF);
    let (told, hear) = channel();
    let vm = machine(&code);
    vm.add_port_device(0x510, 4, Box::new(Told(told))).unwrap();
    let taken = vm.add_port_device(0x3f8, 1, Box::new(Told(channel().0)));
    assert!(matches!(taken, Err(Error::Platform(_))));
    vm.start().unwrap();
    assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("poweroff"));
    assert_eq!(hear.iter().take(2).collect::<Vec<_>>(), [(1, 1, None), (0, 4, Some(7))]);
    assert_eq!(count(&vm), 7);

    let (told, hear) = channel();
    drop(hear);
    let vm = machine(&code);
    vm.add_port_device(0x510, 4, Box::new(Told(told))).unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("error: device Told: sending on a closed channel"));
}

#[test]
fn other_processors_wait_until_they_are_started_and_end_with_the_machine() {
    let vm = machine_with(HALT_FOR_EVER, "interpret", 3);
    vm.start().unwrap();
    vm.pause().unwrap();
    let before = vm.registers(2).unwrap();
    vm.resume().unwrap();
    std::thread::sleep(Duration::from_millis(10));
    vm.pause().unwrap();
    assert_eq!(vm.registers(2).unwrap(), before);
    vm.end("stopped".into());
    assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("stopped"));
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let vm = machine(&[0xeb, 0xfe]);
    vm.start().unwrap();
    assert_eq!(vm.wait(Some(Duration::from_millis(10))).unwrap(), None);
    drop(vm);
}

#[test]
fn an_nmi_waits_for_the_handler_of_another() {
    const SEND_NMI: &[u8] = &[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x44, 0, 0]; // mov dword [0xfee00300], 0x4400
    let mut code = SEND_NMI.to_vec();
    // mov ecx, 1000; loop $
    code.extend([0xb9, 0xe8, 0x03, 0, 0, 0xe2, 0xfe]);
    code.extend(POWER_OFF);
    for engine in ["interpret", "translate"] {
        let vm = machine_with(&code, engine, 1);
        // inc dword [0x3000]; cmp dword [0x3000],1; jne +20; the same again; mov eax,[0x3000]; mov [0x3004],eax; iret
        let mut handler = vec![0xff, 0x05, 0x00, 0x30, 0, 0, 0x83, 0x3d, 0x00, 0x30, 0, 0, 1, 0x75, 20];
        handler.extend(SEND_NMI);
        handler.extend([0xa1, 0x00, 0x30, 0, 0, 0xa3, 0x04, 0x30, 0, 0, 0xcf]);
        vm.write_memory(Gpa(HANDLER), &handler).unwrap();
        let gate = HANDLER | 8 << 16 | 0x8e00 << 32;
        vm.write_memory(Gpa(IDT + 8 * 2), &gate.to_le_bytes()).unwrap();
        vm.set_registers(0, &[("idtr_base".into(), IDT), ("idtr_limit".into(), 0x7ff)]).unwrap();
        vm.start().unwrap();
        assert_eq!(vm.wait(Some(LONG)).unwrap().as_deref(), Some("poweroff"));
        let inside = u32::from_le_bytes(vm.read_memory(Gpa(COUNT.0 + 4), 4).unwrap().try_into().unwrap());
        assert_eq!((count(&vm), inside), (2, 1), "{engine}");
    }
}
