//! The queue alone.

use memory::GuestMemory;
use x86::Gpa;

use super::{Driver, INDIRECT, NEXT, PLACE, RAM, Random, WRITE, memory};
use crate::virtio::queue::{Broken, MOST_ENTRIES, Place, Progress, Queue, Rules};

const ALL: Rules = Rules { indirect: true, event_index: true };

fn queue(memory: &GuestMemory, rules: Rules) -> Queue {
    Queue::new(memory, PLACE, rules, Progress::default()).unwrap()
}

#[test]
fn a_chain_is_read_written_and_given_back() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    let mut queue = queue(&memory, Rules::default());
    assert!(queue.pop(&memory).unwrap().is_none());
    memory.write(Gpa(0x8ffe), b"abcdef").unwrap();
    driver.descriptor(PLACE.descriptors, 5, 0x8ffe, 4, NEXT, 2);
    driver.descriptor(PLACE.descriptors, 2, 0x9002, 2, NEXT, 7);
    driver.descriptor(PLACE.descriptors, 7, 0xa000, 3, WRITE | NEXT, 0);
    driver.descriptor(PLACE.descriptors, 0, 0xb000, 3, WRITE, 0);
    driver.offer(5);
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable_bytes(), chain.writable_bytes()), (5, 6, 6));
    let mut bytes = [0; 4];
    assert!(chain.read(1, &mut bytes));
    assert_eq!(&bytes, b"bcde");
    assert!(!chain.read(3, &mut bytes), "past the end");
    assert!(chain.write(2, b"XYZ") && !chain.write(4, b"XYZ") && !chain.write(u64::MAX, b"X"));
    let mut written = [0; 2];
    memory.read(Gpa(0xb000), &mut written).unwrap();
    assert_eq!(&written, b"YZ");
    queue.push(&memory, 5, 5).unwrap();
    assert_eq!((driver.used_index(), driver.used(0)), (1, (5, 5)));
    assert!(queue.wants_interrupt(&memory).unwrap());
    assert!(!queue.wants_interrupt(&memory).unwrap(), "told once");
    driver.set_16(PLACE.driver, 1);
    queue.push(&memory, 5, 5).unwrap();
    assert!(!queue.wants_interrupt(&memory).unwrap(), "the driver asked not to be told");
}

#[test]
fn indirect_tables_and_event_indices() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    let mut queue = queue(&memory, ALL);
    let table = Gpa(0x5000);
    driver.descriptor(PLACE.descriptors, 3, table.0, 32, INDIRECT, 0);
    driver.descriptor(table, 0, 0x8000, 512, NEXT, 1);
    driver.descriptor(table, 1, 0x9000, 16, WRITE, 0);
    for _ in 0..3 {
        driver.offer(3);
        let chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!((chain.head(), chain.readable_bytes(), chain.writable_bytes()), (3, 512, 16));
    }
    queue.want_notification(&memory, true).unwrap();
    assert_eq!(driver.get_16(PLACE.device.add(4 + 8 * 8)), 3, "after the third request");
    // The driver wants to be told of the third: used_event is 2.
    driver.set_16(PLACE.driver.add(4 + 2 * 8), 2);
    let told: Vec<bool> = (0..4)
        .map(|_| {
            queue.push(&memory, 3, 0).unwrap();
            queue.wants_interrupt(&memory).unwrap()
        })
        .collect();
    assert_eq!(told, [false, false, true, false]);
}

#[test]
fn what_no_device_can_work_with_is_refused() {
    let memory = memory();
    let at = |entries, descriptors, driver, device| {
        let place = Place { entries, descriptors: Gpa(descriptors), driver: Gpa(driver), device: Gpa(device) };
        Queue::new(&memory, place, ALL, Progress::default()).err()
    };
    assert_eq!(at(0, 0, 0, 0), Some(Broken::Size(0)));
    assert_eq!(at(6, 0, 0, 0), Some(Broken::Size(6)));
    assert_eq!(at(2 * MOST_ENTRIES, 0, 0, 0), Some(Broken::Size(2 * MOST_ENTRIES)));
    assert_eq!(at(8, 8, 0, 0), Some(Broken::Place(Gpa(8))));
    assert_eq!(at(8, 0, RAM - 20, 0), Some(Broken::Place(Gpa(RAM - 20))), "two bytes short");
    assert_eq!(at(8, 0, RAM - 22, 0), None);
    assert_eq!(at(8, 0, 0, u64::MAX - 3), Some(Broken::Place(Gpa(u64::MAX - 3))));
    assert_eq!(at(8, 0xffff_ffff_ffff_fff0, 0, 0), Some(Broken::Place(Gpa(0xffff_ffff_ffff_fff0))));

    // The head, and descriptors from 0 on: address, size, flags, next.
    let table = PLACE.descriptors;
    type Descriptor = (u64, u32, u16, u16);
    let cases: [(u16, &[Descriptor], Broken); 13] = [
        (8, &[], Broken::Descriptor(8)),
        (0, &[(0x8000, 1, NEXT, 9)], Broken::Descriptor(9)),
        (0, &[(0x8000, 1, NEXT, 0)], Broken::Chain),
        (0, &[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)], Broken::Chain),
        (0, &[(0x8000, 1, WRITE | NEXT, 1), (0x8000, 1, 0, 0)], Broken::Order),
        (0, &[(RAM - 1, 2, 0, 0)], Broken::Buffer { address: Gpa(RAM - 1), size: 2 }),
        (0, &[(u64::MAX, 2, 0, 0)], Broken::Buffer { address: Gpa(u64::MAX), size: 2 }),
        (0, &[(0, u32::MAX, 0, 0)], Broken::Buffer { address: Gpa(0), size: u32::MAX }),
        (0, &[(0x5000, 8, INDIRECT, 0)], Broken::Indirect(8)),
        (0, &[(0x5000, 0, INDIRECT, 0)], Broken::Indirect(0)),
        (0, &[(0x5000, 16 * 9, INDIRECT, 0)], Broken::Indirect(16 * 9)),
        (0, &[(0x5000, 16, INDIRECT | NEXT, 1)], Broken::Indirect(16)),
        (0, &[(RAM, 16, INDIRECT, 0)], Broken::Buffer { address: Gpa(RAM), size: 16 }),
    ];
    for (head, descriptors, broken) in cases {
        let mut driver = Driver::new(&memory);
        let mut queue = queue(&memory, ALL);
        for (index, (address, size, flags, next)) in descriptors.iter().enumerate() {
            driver.descriptor(table, index as u16, *address, *size, *flags, *next);
        }
        driver.offer(head);
        assert_eq!(queue.pop(&memory).err(), Some(broken));
    }
    let mut driver = Driver::new(&memory);
    driver.descriptor(table, 0, 0x5000, 16, INDIRECT, 0);
    driver.descriptor(Gpa(0x5000), 0, 0x6000, 16, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue(&memory, ALL).pop(&memory).err(), Some(Broken::Indirect(16)), "one within another");
    assert_eq!(queue(&memory, Rules::default()).pop(&memory).err(), Some(Broken::Indirect(16)), "not agreed on");
    driver.set_16(PLACE.driver.add(2), 9);
    assert_eq!(queue(&memory, ALL).pop(&memory).err(), Some(Broken::Index { from: 0, to: 9 }));
}

#[test]
fn random_rings_break_the_queue_and_nothing_else() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut served, mut broken) = (0, 0);
    for _ in 0..3000 {
        let memory = memory();
        let mut driver = Driver::new(&memory);
        for index in 0..8 {
            let size = if random.below(4) == 0 { random.next() as u32 } else { 16 * random.below(9) as u32 };
            let kinds = if random.below(3) == 0 { 8 } else { 4 };
            let flags = random.below(kinds) as u16;
            driver.descriptor(PLACE.descriptors, index, random.address(), size, flags, random.below(9) as u16);
        }
        let mut queue = queue(&memory, Rules { indirect: random.below(2) == 0, event_index: random.below(2) == 0 });
        for _ in 0..random.below(12) {
            driver.offer(random.below(9) as u16);
        }
        // Whatever the driver wrote, there are no more requests than entries.
        for _ in 0..=8 {
            match queue.pop(&memory) {
                Ok(None) => break,
                Ok(Some(chain)) => {
                    served += 1;
                    let mut bytes = vec![0; chain.readable_bytes().min(1 << 16) as usize];
                    assert!(chain.read(0, &mut bytes), "buffers were checked");
                    let bytes = vec![0xff; chain.writable_bytes().min(1 << 16) as usize];
                    assert!(chain.write(0, &bytes));
                    queue.push(&memory, chain.head(), 0).unwrap();
                    let _ = queue.wants_interrupt(&memory).unwrap();
                    queue.want_notification(&memory, true).unwrap();
                }
                Err(_) => {
                    broken += 1;
                    break;
                }
            }
        }
        assert_eq!(queue.progress().available, queue.progress().used);
    }
    assert!(served > 300 && broken > 300, "{served} served, {broken} broken: both are tried");
}
