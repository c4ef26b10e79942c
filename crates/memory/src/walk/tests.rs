use super::*;
use x86::fault::page_fault as code;

const P: u64 = entry::PRESENT;
const W: u64 = entry::WRITABLE;
const U: u64 = entry::USER;

fn paging() -> Paging {
    Paging {
        enabled: true,
        root: Gpa(0x1000),
        write_protect: true,
        no_execute: true,
        smep: true,
        smap: true,
        smap_implicit: true,
        global: true,
        user_keys: 0,
        supervisor_keys: 0,
    }
}

/// Tables that map Gva 0 through 0x2000, 0x3000 and 0x4000 with `leaf` in the last one.
fn memory_with(leaf: u64) -> GuestMemory {
    let memory = GuestMemory::new(1 << 20).unwrap();
    for (table, value) in [(0x1000, 0x2000 | P | W | U), (0x2000, 0x3000 | P | W | U), (0x3000, 0x4000 | P | W | U)] {
        memory.write(Gpa(table), &u64::to_le_bytes(value)).unwrap();
    }
    memory.write(Gpa(0x4000), &leaf.to_le_bytes()).unwrap();
    memory
}

fn word(memory: &GuestMemory, address: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(Gpa(address), &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_read_sets_accessed_and_a_write_sets_dirty() {
    let memory = memory_with(0x9000 | P | W | U);
    let read = walk(&memory, None, &paging(), Gva(0x123), Access::read(true)).unwrap();
    assert_eq!(read.gpa, Gpa(0x9123));
    assert!(!read.writable, "the dirty bit must be set before stores may skip the walk");
    assert_eq!(word(&memory, 0x4000), 0x9000 | P | W | U | entry::ACCESSED);
    assert_eq!(word(&memory, 0x1000) & entry::ACCESSED, entry::ACCESSED);
    let write = walk(&memory, None, &paging(), Gva(0x123), Access::write(true)).unwrap();
    assert!(write.writable);
    assert_eq!(word(&memory, 0x4000) & entry::DIRTY, entry::DIRTY);
}

#[test]
fn faults_carry_the_right_code() {
    let absent = memory_with(0);
    let error =
        |memory: &GuestMemory, access| walk(memory, None, &paging(), Gva(0), access).unwrap_err().error.unwrap();
    assert_eq!(error(&absent, Access::write(true)), code::WRITE | code::USER);
    let kernel = memory_with(0x9000 | P | W);
    assert_eq!(error(&kernel, Access::read(true)), code::PRESENT | code::USER);
    let read_only = memory_with(0x9000 | P | U | entry::NX);
    assert_eq!(error(&read_only, Access::write(true)), code::PRESENT | code::WRITE | code::USER);
    assert_eq!(error(&read_only, Access::fetch(true)), code::PRESENT | code::FETCH | code::USER);
    let user = memory_with(0x9000 | P | W | U);
    assert_eq!(error(&user, Access::read(false)), code::PRESENT, "SMAP");
    assert_eq!(error(&user, Access::fetch(false)), code::PRESENT | code::FETCH, "SMEP");
    let reserved = memory_with(0x9000 | P | 1 << 45);
    assert_eq!(error(&reserved, Access::read(false)), code::PRESENT | code::RESERVED);
}

#[test]
fn a_faulting_access_leaves_the_leaf_untouched() {
    let memory = memory_with(0x9000 | P | W);
    walk(&memory, None, &paging(), Gva(0), Access::read(true)).unwrap_err();
    assert_eq!(word(&memory, 0x4000), 0x9000 | P | W);
}

#[test]
fn large_pages_map_whole_ranges() {
    let memory = memory_with(0);
    memory.write(Gpa(0x3000), &(0x20_0000 | P | W | entry::LARGE | entry::GLOBAL).to_le_bytes()).unwrap();
    let translation = walk(&memory, None, &paging(), Gva(0x12_3456), Access::read(false)).unwrap();
    assert_eq!(translation.gpa, Gpa(0x32_3456));
    assert_eq!(translation.page_size, 2 << 20);
    assert!(translation.global);
    memory.write(Gpa(0x3000), &(0x20_2000 | P | W | entry::LARGE).to_le_bytes()).unwrap();
    let misplaced = walk(&memory, None, &paging(), Gva(0), Access::read(false)).unwrap_err();
    assert_eq!(misplaced.error.unwrap() & code::RESERVED, code::RESERVED);
}

#[test]
fn protection_keys_take_rights_away_from_data_accesses() {
    const AD: u32 = 1 << 4;
    const WD: u32 = 2 << 4;
    let key = 2 << entry::KEY_SHIFT;
    let user = memory_with(0x9000 | P | W | U | entry::DIRTY | key);
    let supervisor = memory_with(0x9000 | P | W | entry::DIRTY | key);
    let free = Paging { smap: false, smap_implicit: false, smep: false, ..paging() };
    let pkru = |keys| Paging { user_keys: keys, ..free };
    let pkrs = |keys| Paging { supervisor_keys: keys, ..free };
    let error = |memory: &GuestMemory, paging: Paging, access: Access| {
        walk(memory, None, &paging, Gva(0), access).err().and_then(|fault| fault.error).unwrap_or(0)
    };
    let locked = code::PRESENT | code::KEY;
    assert_eq!(error(&user, pkru(AD), Access::read(true)), locked | code::USER);
    assert_eq!(error(&user, pkru(AD), Access::read(false)), locked, "of the kernel, too");
    assert_eq!(error(&user, pkru(AD), Access::fetch(true)), 0);
    assert_eq!(error(&user, pkru(AD << 2), Access::write(true)), 0, "another key");
    assert_eq!(error(&user, pkrs(AD), Access::write(true)), 0, "another register");
    assert_eq!(error(&user, pkru(WD), Access::write(true)), locked | code::WRITE | code::USER);
    assert_eq!(error(&user, pkru(WD), Access::write(false)), locked | code::WRITE);
    assert_eq!(error(&user, Paging { write_protect: false, ..pkru(WD) }, Access::write(false)), 0);
    assert_eq!(error(&supervisor, pkru(AD), Access::read(false)), 0);
    assert_eq!(error(&supervisor, pkrs(AD), Access::read(false)), locked);
    assert_eq!(error(&supervisor, pkrs(WD), Access::write(false)), locked | code::WRITE);
    assert_eq!(error(&supervisor, pkrs(AD), Access::read(true)), locked | code::USER, "two reasons");
    // What a read learns must not let a store pass.
    let read = |memory: &GuestMemory, paging: Paging| walk(memory, None, &paging, Gva(0), Access::read(false)).unwrap();
    assert!(read(&user, free).writable && !read(&user, pkru(WD)).writable);
    assert!(read(&user, Paging { write_protect: false, ..pkru(WD) }).writable);
}
