//! Translations that outlive the machine: they are kept in a file of the user's, and every later machine of that user takes
//! from it what it would have to translate again.
//!
//! A translation is a function of the guest's bytes, the virtual address, the mode, what the guest has enabled, and the
//! translator itself; so it may be used wherever these are the same. The file is named for the translator's build and the
//! host's processor, groups by address, mode and, for a kernel's code, the kernel; the bytes are compared in full, block by block. Nothing that a guest can do
//! puts anything else into the file.

mod file;
pub mod near;
pub mod record;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::private::PrivateFolder;

pub use self::file::GroupKey;
use self::file::{KeptFile, Seal, Writer};
use self::record::{Block, Record};

/// Fewer new blocks are not worth a file.
const WORTH_BLOCKS: u64 = 256;
/// New records must be at least this part of the file for it to be written again.
const WORTH_PART: u64 = 64;
/// New records in memory at a time; the others wait in a file without a name.
const IN_MEMORY: usize = 1 << 20;
/// New records of one machine, and bytes of the file: groups that were not used for longest go.
const MOST_NEW: u64 = 64 << 20;
const MOST_KEPT: u64 = if cfg!(test) { 4 << 20 } else { 96 << 20 };
/// Variants of one page's code add up; more than this are not kept.
const MOST_GROUP: usize = 256 << 10;
/// How long the end of a machine waits for another that writes.
const PATIENCE: Duration = Duration::from_millis(500);
/// Files of other builds go when nobody wrote them for so long.
const OTHERS_AGE: Duration = Duration::from_secs(14 * 24 * 3600);

const SECRET: &str = "secret";
const LOCK: &str = "lock";

/// The kept translations of one user, as one machine sees them. Shared by the translators of the machine.
#[derive(Debug)]
pub struct Kept {
    place: PathBuf,
    store: OnceLock<Option<Store>>,
    system: OnceLock<u32>,
    /// Translators that have not finished.
    users: AtomicUsize,
}

#[derive(Debug)]
pub struct Store {
    folder: PrivateFolder,
    name: String,
    seal: SealOf,
    file: Option<KeptFile>,
    fresh: Mutex<Fresh>,
    pub blocks_noted: AtomicU64,
    /// Groups that were read, and those that turned out to be damaged.
    pub groups_read: AtomicU64,
    pub groups_refused: AtomicU64,
}

/// A seal that is not shown.
struct SealOf(Seal);

impl std::fmt::Debug for SealOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

/// Records of this machine: each behind its group's key.
#[derive(Debug, Default)]
struct Fresh {
    log: Vec<u8>,
    spool: Option<File>,
    size: u64,
    used: HashSet<GroupKey>,
}

impl Kept {
    /// Translations below `place`, which is made where it is missing.
    #[must_use]
    pub fn new(place: PathBuf) -> Kept {
        Kept { place, store: OnceLock::new(), system: OnceLock::new(), users: AtomicUsize::new(0) }
    }

    /// For a translator of this version. `None` when the folder or what is in it cannot be used: then nothing is kept.
    pub fn join(&self, version: [u8; 32]) -> Option<&Store> {
        let store = self.store.get_or_init(|| Store::open(&self.place, version).ok()).as_ref()?;
        self.users.fetch_add(1, Ordering::AcqRel);
        Some(store)
    }

    #[must_use]
    pub fn store(&self) -> Option<&Store> {
        self.store.get()?.as_ref()
    }

    /// Which system this machine runs, told by the `first` page of code that was looked for.
    pub fn system(&self, first: impl FnOnce() -> Vec<u8>) -> u32 {
        *self.system.get_or_init(|| {
            let [a, b, c, d, ..] = *blake3::hash(&first()).as_bytes();
            u32::from_le_bytes([a, b, c, d])
        })
    }

    /// A translator is done: the last one writes the file. A failure leaves the file as it was.
    pub fn leave(&self) {
        if let Some(store) = self.store()
            && self.users.fetch_sub(1, Ordering::AcqRel) == 1
        {
            let _ = store.save();
        }
    }
}

fn hours() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| (time.as_secs() / 3600) as u32)
}

/// The user's secret, made at the first use.
fn secret(folder: &PrivateFolder) -> io::Result<[u8; 32]> {
    let mut secret = [0; 32];
    let read = |secret: &mut [u8; 32]| folder.read(SECRET).and_then(|mut file| file.read_exact(secret));
    if read(&mut secret).is_ok() {
        return Ok(secret);
    }
    let _lock = folder.lock(LOCK, PATIENCE)?;
    // Somebody else may have been faster. One that cannot be read whole is replaced, and with it goes all that it sealed.
    if read(&mut secret).is_ok() {
        return Ok(secret);
    }
    if !host::random::fill(&mut secret) {
        return Err(io::Error::other("the system gives no random numbers"));
    }
    let new = "new-secret";
    folder.create(new)?.write_all(&secret)?;
    folder.rename(new, SECRET)?;
    Ok(secret)
}

impl Store {
    fn open(place: &std::path::Path, version: [u8; 32]) -> io::Result<Store> {
        let folder = PrivateFolder::open(place)?;
        let seal = Seal { secret: secret(&folder)?, version };
        let name = format!("{}.code", blake3::Hash::from(version).to_hex().get(..16).unwrap_or_default());
        let file = folder.read(&name).ok().and_then(|file| KeptFile::open(file, &seal));
        Ok(Store {
            folder,
            name,
            seal: SealOf(seal),
            file,
            fresh: Mutex::default(),
            blocks_noted: AtomicU64::new(0),
            groups_read: AtomicU64::new(0),
            groups_refused: AtomicU64::new(0),
        })
    }

    fn fresh(&self) -> MutexGuard<'_, Fresh> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of a group, if there is one.
    #[must_use]
    pub fn find(&self, key: GroupKey) -> Option<u32> {
        self.file.as_ref()?.find(key)
    }

    /// Reads the records of a group; none when they are damaged.
    pub fn read(&self, key: GroupKey, place: u32, records: &mut Vec<u8>) {
        let good = self.file.as_ref().is_some_and(|file| file.read(place, &self.seal.0, records));
        let count = if good { &self.groups_read } else { &self.groups_refused };
        count.fetch_add(1, Ordering::Relaxed);
        if good {
            self.fresh().used.insert(key);
        }
    }

    /// Takes note of a block that was just translated.
    pub fn note(&self, key: GroupKey, block: &Block<'_>) {
        let mut fresh = self.fresh();
        if fresh.size > MOST_NEW {
            return;
        }
        let before = fresh.log.len();
        fresh.log.extend_from_slice(&key.pack());
        record::write(block, &mut fresh.log);
        fresh.size += (fresh.log.len() - before) as u64;
        self.blocks_noted.fetch_add(1, Ordering::Relaxed);
        if fresh.log.len() > IN_MEMORY && fresh.spill(&self.folder).is_err() {
            // Without room on the disk nothing more is kept.
            fresh.size = u64::MAX;
            fresh.log = Vec::new();
        }
    }

    /// Nothing new comes for a while: what was noted waits on the disk for the end.
    pub fn rest(&self) {
        let mut fresh = self.fresh();
        if !fresh.log.is_empty() && fresh.spill(&self.folder).is_ok() {
            fresh.log = Vec::new();
        }
    }

    fn is_worth_saving(&self) -> bool {
        let (size, blocks) = (self.fresh().size, self.blocks_noted.load(Ordering::Relaxed));
        let kept = self.file.as_ref().map_or(0, KeptFile::size);
        blocks >= WORTH_BLOCKS && size > kept / WORTH_PART && size != u64::MAX
    }

    /// Writes what is in the file by now together with this machine's new records to a new file, which then takes the old
    /// one's place: whoever reads meanwhile, or dies in the middle, sees the old one.
    fn save(&self) -> io::Result<()> {
        if !self.is_worth_saving() {
            return Ok(());
        }
        let seal = &self.seal.0;
        let _lock = self.folder.lock(LOCK, PATIENCE)?;
        let (log, used) = {
            let mut fresh = self.fresh();
            (fresh.take_all()?, std::mem::take(&mut fresh.used))
        };
        let mut groups = sort_log(&log);
        let old = self.folder.read(&self.name).ok().and_then(|file| KeptFile::open(file, seal));
        // The newest first, so that what is too much is the oldest.
        let now = hours();
        let mut olds: Vec<_> = old.iter().flat_map(|old| old.entries.iter().enumerate()).collect();
        let hour = |entry: &file::Entry| if used.contains(&entry.key) { now } else { entry.used };
        olds.sort_by_key(|(_, entry)| std::cmp::Reverse(hour(entry)));
        let new_name = "new";
        let mut writer = Writer::new(self.folder.create(new_name)?, seal)?;
        let (mut total, mut records) = (log.len() as u64, Vec::new());
        for (place, entry) in olds {
            let good = old.as_ref().is_some_and(|old| old.read(place as u32, seal, &mut records));
            let added = groups.remove(&entry.key);
            if !good || (added.is_none() && total + u64::from(entry.size) > MOST_KEPT) {
                groups.extend(added.map(|added| (entry.key, added)));
                continue;
            }
            total += u64::from(entry.size);
            match added {
                Some(added) => writer.add(entry.key, now, &merge(&added, &records))?,
                None => writer.add(entry.key, hour(entry), &records)?,
            }
        }
        for (key, added) in groups {
            writer.add(key, now, &merge(&added, &[]))?;
        }
        writer.finish()?;
        self.folder.rename(new_name, &self.name)?;
        for (name, age) in self.folder.list()? {
            if name.ends_with(".code") && name != self.name && age > OTHERS_AGE {
                self.folder.remove(&name)?;
            }
        }
        Ok(())
    }
}

impl Fresh {
    fn spill(&mut self, folder: &PrivateFolder) -> io::Result<()> {
        if self.spool.is_none() {
            let mut number = [0; 8];
            let _ = host::random::fill(&mut number);
            let name = format!("spool-{}-{:016x}", std::process::id(), u64::from_le_bytes(number));
            let file = folder.create(&name)?;
            folder.remove(&name)?;
            self.spool = Some(file);
        }
        if let Some(spool) = &mut self.spool {
            spool.write_all(&self.log)?;
        }
        self.log.clear();
        Ok(())
    }

    /// All records, in the order in which they came.
    fn take_all(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        if let Some(mut spool) = self.spool.take() {
            spool.rewind()?;
            spool.read_to_end(&mut all)?;
        }
        all.append(&mut self.log);
        Ok(all)
    }
}

/// The records of a log by their groups, the newest first.
fn sort_log(mut log: &[u8]) -> HashMap<GroupKey, Vec<&[u8]>> {
    let mut groups = HashMap::<_, Vec<_>>::new();
    while let Some(head) = log.split_off(..GroupKey::SIZE) {
        let (Some(key), Some(record)) = (GroupKey::unpack(head), Record::take(&mut log)) else { break };
        groups.entry(key).or_default().push(record.bytes);
    }
    groups.values_mut().for_each(|records| records.reverse());
    groups
}

/// One group of new and old records, of which the first of several with the same identity counts.
fn merge(added: &[&[u8]], mut old: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut known = HashSet::new();
    let olds = std::iter::from_fn(|| Record::take(&mut old));
    for record in added.iter().filter_map(|bytes| Record::take(&mut &bytes[..])).chain(olds) {
        if all.len() + record.bytes.len() <= MOST_GROUP && known.insert(record.identity()) {
            all.extend_from_slice(record.bytes);
        }
    }
    all
}

#[cfg(test)]
mod tests;
