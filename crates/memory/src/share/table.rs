//! The shared pages of a group: which page has which hash, how many use it, and the pool's file. A page that nobody uses
//! goes back to the system at once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use hashbrown::HashTable;
use host::map::{memfd, punch_hole};
use x86::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Page;

/// The file grows by so many pages: 16 MiB that cost nothing as long as nothing is written.
const STEP: u32 = 4096;
/// Of the pages of the file, one in so many may be a hole before holes are looked for.
const HOLES: u32 = 8;

/// Which file a pool is: device and inode.
pub type Identity = (u64, u64);

pub fn identity(file: &File) -> io::Result<Identity> {
    let found = file.metadata()?;
    Ok((found.dev(), found.ino()))
}

#[derive(Debug)]
pub struct Table {
    pool: File,
    /// Pages that the file has.
    length: u32,
    /// Pages that it may have.
    limit: u32,
    /// The page that has a hash.
    by_hash: HashTable<u32>,
    /// For each page its hash, and how many use it; 0 for a page that is free.
    hashes: Vec<u64>,
    users: Vec<u32>,
    in_use: u32,
    /// Where holes are looked for next.
    next: u32,
    /// Pages before it are not given out: who uses them is not known yet.
    first: u32,
    /// Mixed into hashes: VMs choose these, and shall not choose where in our tables they are.
    secret: u64,
}

impl Table {
    /// A pool of at most `limit` pages.
    pub fn new(limit: u32, secret: u64) -> io::Result<Table> {
        Ok(Table::of(memfd(c"ringzero-shared", 0)?, 0, limit, secret))
    }

    /// The pool of a sharer that is gone, as a VM that can read it has it. Which of its pages are in use must be said by
    /// [`Table::claim`]; until [`Table::all_have_claimed`] the others stay as they are.
    pub fn adopt(file: &File, wanted: Identity, limit: u32, secret: u64) -> io::Result<Table> {
        let refused = |why: &str| io::Error::new(io::ErrorKind::PermissionDenied, why.to_string());
        if identity(file)? != wanted {
            return Err(refused("it is not the pool of the group"));
        }
        // A descriptor that can only read names the file all the same; whether we may write it, the system decides.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let pool = File::options().read(true).write(true).open(path)?;
        let found = pool.metadata()?;
        let length = u32::try_from(found.len() / PAGE_SIZE).map_err(|_| refused("it is too large"))?;
        if identity(&pool)? != wanted || !found.is_file() || !found.len().is_multiple_of(PAGE_SIZE) || length > limit {
            return Err(refused("it is not like a pool"));
        }
        let mut table = Table::of(pool, length, limit, secret);
        table.first = length;
        table.hashes = vec![0; length as usize];
        table.users = vec![0; length as usize];
        Ok(table)
    }

    fn of(pool: File, length: u32, limit: u32, secret: u64) -> Table {
        let (by_hash, hashes, users) = (HashTable::new(), Vec::new(), Vec::new());
        Table { pool, length, limit, by_hash, hashes, users, in_use: 0, next: 0, first: 0, secret }
    }

    /// A descriptor of the pool that can only read.
    pub fn pool_to_read(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.pool.as_raw_fd()))
    }

    pub fn identity(&self) -> io::Result<Identity> {
        identity(&self.pool)
    }

    /// A hash as our tables have it.
    pub fn mixed(&self, hash: u64) -> u64 {
        xxh3_64_with_seed(&hash.to_le_bytes(), self.secret)
    }

    /// The page with a hash.
    pub fn find(&self, hash: u64) -> Option<u32> {
        self.by_hash.find(self.mixed(hash), |page| self.hashes[*page as usize] == hash).copied()
    }

    /// One more uses a page that is in use.
    pub fn add_user(&mut self, page: u32) -> bool {
        match self.users.get_mut(page as usize) {
            Some(users) if *users > 0 && *users < u32::MAX => {
                *users += 1;
                true
            }
            _ => false,
        }
    }

    /// So many use a page no more.
    pub fn remove_users(&mut self, page: u32, count: u32) {
        let Some(users) = self.users.get_mut(page as usize) else { return };
        let before = *users;
        *users = before.saturating_sub(count);
        if before == 0 || *users > 0 {
            return;
        }
        self.in_use -= 1;
        self.forget_hash(page);
        if page < self.first {
            // Others who use it may not have said so yet.
            return;
        }
        // A page that stays in the file only costs memory until it is written again.
        let _ = punch_hole(&self.pool, u64::from(page) * PAGE_SIZE, PAGE_SIZE);
        if page + 1 == self.users.len() as u32 && !self.is_adopted() {
            let end = self.users.iter().rposition(|users| *users > 0).map_or(0, |last| last + 1);
            self.users.truncate(end);
            self.hashes.truncate(end);
        }
    }

    fn forget_hash(&mut self, page: u32) {
        let mixed = self.mixed(self.hashes[page as usize]);
        if let Ok(found) = self.by_hash.find_entry(mixed, |other| *other == page) {
            found.remove();
        }
    }

    /// Puts contents into free pages, each of which one uses then; neighbours stay neighbours where they can. `None` for those
    /// for which there is no page, or no memory.
    pub fn add(&mut self, contents: &[(&Page, u64)]) -> Vec<Option<u32>> {
        let mut room = 0..0;
        let mut add = |(content, hash): &(&Page, u64)| {
            // Contents of one batch may be equal, too.
            if let Some(page) = self.find(*hash) {
                return self.add_user(page).then_some(page);
            }
            let page = match room.next() {
                Some(page) => page,
                None => {
                    room = self.reserve(contents.len() as u32)?;
                    room.next()?
                }
            };
            self.make_room(page)?;
            self.pool.write_all_at(*content, u64::from(page) * PAGE_SIZE).ok()?;
            self.enter(page, *hash);
            Some(page)
        };
        contents.iter().map(&mut add).collect()
    }

    fn is_free(&self, page: u32) -> bool {
        page >= self.first && page < self.limit && self.users.get(page as usize).is_none_or(|users| *users == 0)
    }

    /// Finds free pages that are neighbours, as many as wanted or, near the limit, fewer. They stay free until they are written.
    fn reserve(&mut self, count: u32) -> Option<Range<u32>> {
        let end = self.users.len() as u32;
        // Searching pays where there are many holes; before all have claimed, what looks like one may be none.
        if !self.is_adopted() && end - self.in_use > end / HOLES {
            let mut run = 0;
            for page in (self.next.min(end)..end).chain(0..self.next.min(end)) {
                run = if page == 0 || !self.is_free(page) { 0 } else { run } + u32::from(self.is_free(page));
                if run == count {
                    self.next = page + 1;
                    return Some(page + 1 - count..page + 1);
                }
            }
        }
        let start = end.max(self.first);
        if start < self.limit {
            return Some(start..start.saturating_add(count).min(self.limit));
        }
        (self.first..end).find(|page| self.is_free(*page)).map(|page| page..page + 1)
    }

    /// Makes the file, and what we know of its pages, reach to a page.
    fn make_room(&mut self, page: u32) -> Option<()> {
        if page >= self.length {
            let length = (page + 1).next_multiple_of(STEP).min(self.limit);
            self.pool.set_len(u64::from(length) * PAGE_SIZE).ok()?;
            self.length = length;
        }
        let end = self.users.len().max(page as usize + 1);
        self.users.resize(end, 0);
        self.hashes.resize(end, 0);
        Some(())
    }

    /// A page with content has its first user.
    fn enter(&mut self, page: u32, hash: u64) {
        self.users[page as usize] = 1;
        self.hashes[page as usize] = hash;
        self.in_use += 1;
        // Two pages of the same hash: contents that differ, or that two had found before a sharer was gone.
        if self.find(hash).is_none() {
            let (hashes, secret) = (&self.hashes, self.secret);
            let mixed = |page: &u32| xxh3_64_with_seed(&hashes[*page as usize].to_le_bytes(), secret);
            self.by_hash.insert_unique(mixed(&page), page, mixed);
        }
    }

    /// A VM uses a page of a pool that was adopted.
    pub fn claim(&mut self, page: u32, seed: u64) -> io::Result<bool> {
        if page >= self.first {
            return Ok(self.add_user(page));
        }
        if self.add_user(page) {
            return Ok(true);
        }
        let mut content = [0; PAGE_SIZE as usize];
        self.pool.read_exact_at(&mut content, u64::from(page) * PAGE_SIZE)?;
        self.enter(page, super::hash(&content, seed));
        Ok(true)
    }

    /// No VM is left that could claim a page: what nobody uses is given back.
    pub fn all_have_claimed(&mut self) {
        let mut page = 0;
        while page < self.first {
            let is_free = |page: &u32| self.users[*page as usize] == 0;
            let start = page;
            page = (start..self.first).find(|page| !is_free(page)).unwrap_or(self.first);
            if page > start {
                let _ = punch_hole(&self.pool, u64::from(start) * PAGE_SIZE, u64::from(page - start) * PAGE_SIZE);
            }
            page = (page..self.first).find(is_free).unwrap_or(self.first);
        }
        self.first = 0;
    }

    /// Whether it waits for claims.
    pub fn is_adopted(&self) -> bool {
        self.first > 0
    }

    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// How often all pages are used.
    pub fn uses(&self) -> u64 {
        self.users.iter().map(|users| u64::from(*users)).sum()
    }

    /// Bytes that the table takes, beside its pool.
    pub fn size(&self) -> u64 {
        (self.by_hash.allocation_size() + self.hashes.capacity() * 8 + self.users.capacity() * 4) as u64
    }

    /// What is not as it must be: for audits and tests.
    pub fn audit(&self, seed: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut content = [0; PAGE_SIZE as usize];
        for (page, users) in self.users.iter().enumerate() {
            if self.pool.read_exact_at(&mut content, page as u64 * PAGE_SIZE).is_err() {
                wrong.push(format!("page {page} is beyond the pool"));
            } else if *users > 0 && super::hash(&content, seed) != self.hashes[page] {
                wrong.push(format!("page {page} is not what was put there"));
            } else if *users == 0 && page as u32 >= self.first && content.iter().any(|byte| *byte != 0) {
                wrong.push(format!("page {page} is free and keeps a content"));
            }
        }
        let in_use = self.users.iter().filter(|users| **users > 0).count();
        if in_use != self.in_use as usize {
            wrong.push(format!("{in_use} pages are used, and {} counted", self.in_use));
        }
        let is_free = |page: &&u32| self.users.get(**page as usize).is_none_or(|users| *users == 0);
        if let Some(page) = self.by_hash.iter().find(is_free) {
            wrong.push(format!("page {page} is found by its hash and free"));
        }
        wrong
    }
}
