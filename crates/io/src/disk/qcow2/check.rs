//! Whether the tables of an image agree with one another: every cluster is counted as often as it is used. A cluster that is
//! counted more often is lost space; one that is counted less often would be given away while it is used.

use std::collections::HashMap;
use std::io;

use super::super::host_file::HostFile;
use super::damaged;
use super::snapshots::{self, Snapshot};
use super::tables::{COMPRESSED, COPIED, Place, Tables, get_table, offset};

/// Entries of all L1 tables together: more would be an image that is made to take time.
const MOST_ENTRIES: usize = 1 << 24;
const MOST_SENTENCES: usize = 20;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters that are used.
    pub used: u64,
    /// Clusters that are counted more often than they are used: space, and nothing else.
    pub leaks: u64,
    /// Everything that can cost data.
    pub errors: u64,
    /// The first of them.
    pub sentences: Vec<String>,
}

impl Report {
    fn error(&mut self, sentence: String) {
        self.errors += 1;
        if self.sentences.len() < MOST_SENTENCES {
            self.sentences.push(sentence);
        }
    }
}

struct Check<'a> {
    file: &'a HostFile,
    tables: &'a Tables,
    uses: HashMap<u64, u32>,
    report: Report,
}

impl Check<'_> {
    fn count(&mut self, what: &str, at: u64, bytes: u64, times: u32) {
        let bits = self.tables.header.cluster_bits;
        let (first, last) = (at >> bits, (at + bytes.max(1) - 1) >> bits);
        if last >= self.tables.end {
            self.report.error(format!("{what} at {at:#x} is behind the end of the file"));
            return;
        }
        for cluster in first..=last {
            *self.uses.entry(cluster).or_default() += times;
        }
    }

    /// Counts an L1 table's tables: each by how often it is named.
    fn l1(&mut self, table: &[u64], named: &mut HashMap<u64, u32>) {
        for entry in table.iter().filter(|entry| offset(**entry) != 0) {
            let at = offset(*entry);
            if !at.is_multiple_of(self.tables.header.cluster())
                || at >> self.tables.header.cluster_bits >= self.tables.end
            {
                self.report.error(format!("an L2 table would be at {at:#x}"));
                continue;
            }
            *named.entry(at).or_default() += 1;
        }
    }

    /// Counts what an L2 table names.
    fn l2(&mut self, at: u64, times: u32) -> io::Result<()> {
        self.count("an L2 table", at, 1, times);
        for entry in get_table(self.file, at, self.tables.header.l2_entries() as usize)? {
            if entry & COMPRESSED != 0 {
                if let Place::Compressed { at, size } = self.tables.place(entry)? {
                    // Its last sector may be the file's last, and begun only.
                    let bits = self.tables.header.cluster_bits;
                    let size = size.min((self.tables.end << bits).saturating_sub(at));
                    self.count("a compressed cluster", at, size, times);
                }
            } else if offset(entry) != 0 {
                let at = offset(entry);
                if at.is_multiple_of(self.tables.header.cluster()) {
                    self.count("a cluster", at, 1, times);
                } else {
                    self.report.error(format!("a cluster would be at {at:#x}"));
                }
            }
        }
        Ok(())
    }
}

/// How often each cluster of the file is used, and what is wrong beside the refcounts.
fn uses(file: &HostFile, tables: &Tables) -> io::Result<(HashMap<u64, u32>, Report)> {
    let header = &tables.header;
    let (list, list_bytes) = snapshots::read(file, header)?;
    let mut check = Check { file, tables, uses: HashMap::new(), report: Report::default() };
    check.count("the header", 0, 1, 1);
    check.count("the L1 table", header.l1_offset, tables.l1.len() as u64 * 8, 1);
    let table = u64::from(header.refcounts_clusters) << header.cluster_bits;
    check.count("the refcount table", header.refcounts_offset, table, 1);
    for block in tables.blocks_in_file() {
        check.count("a block of refcounts", block, 1, 1);
    }
    if !list.is_empty() {
        check.count("the list of snapshots", header.snapshots_offset, list_bytes, 1);
    }
    let mut named = HashMap::new();
    check.l1(&tables.l1, &mut named);
    let mut entries = tables.l1.len();
    for Snapshot { l1_offset, l1_entries, .. } in &list {
        entries += *l1_entries as usize;
        if entries > MOST_ENTRIES {
            return Err(damaged("its snapshots have too many tables".into()));
        }
        let table = get_table(file, *l1_offset, *l1_entries as usize)?;
        check.count("the L1 table of a snapshot", *l1_offset, u64::from(*l1_entries) * 8, 1);
        check.l1(&table, &mut named);
    }
    for (at, times) in named {
        check.l2(at, times)?;
    }
    check.report.used = check.uses.len() as u64;
    Ok((check.uses, check.report))
}

/// Looks at everything, and changes nothing.
pub fn check(file: &HostFile, tables: &mut Tables) -> io::Result<Report> {
    tables.forget();
    let (mut uses, mut report) = uses(file, tables)?;
    check_copied(file, tables, &uses, &mut report)?;
    for index in 0..tables.refcount_blocks() {
        for (cluster, count) in tables.counted(file, index)? {
            match u32::from(count).cmp(&uses.remove(&cluster).unwrap_or(0)) {
                std::cmp::Ordering::Greater => report.leaks += 1,
                std::cmp::Ordering::Less => {
                    report.error(format!("cluster {cluster} is used more often than it is counted"))
                }
                std::cmp::Ordering::Equal => {}
            }
        }
    }
    for cluster in uses.keys() {
        report.error(format!("cluster {cluster} is used and not counted"));
    }
    Ok(report)
}

/// A cluster of the disk as it is may be written to if it is used once, and is marked so.
fn check_copied(file: &HostFile, tables: &mut Tables, uses: &HashMap<u64, u32>, report: &mut Report) -> io::Result<()> {
    for (index, entry) in tables.l1.clone().into_iter().enumerate().filter(|(_, entry)| offset(*entry) != 0) {
        let is_once = |entry: u64| uses.get(&(offset(entry) >> tables.header.cluster_bits)) == Some(&1);
        if (entry & COPIED != 0) != is_once(entry) {
            report.error(format!("the mark of L2 table {index} is wrong"));
        }
        if offset(entry) >> tables.header.cluster_bits >= tables.end {
            continue;
        }
        for entry in get_table(file, offset(entry), tables.header.l2_entries() as usize)? {
            let is_data = entry & COMPRESSED == 0 && offset(entry) != 0;
            if is_data && (entry & COPIED != 0) != is_once(entry) {
                report.error(format!("the mark of the cluster at {:#x} is wrong", offset(entry)));
            }
        }
    }
    Ok(())
}

/// Sets all marks of the disk as it is now by how often clusters are used.
pub fn set_copied(file: &HostFile, tables: &mut Tables, uses: &HashMap<u64, u32>) -> io::Result<()> {
    let bits = tables.header.cluster_bits;
    let marked = |entry: u64| {
        let is_once = uses.get(&(offset(entry) >> bits)) == Some(&1);
        if entry & COMPRESSED != 0 || offset(entry) == 0 {
            entry & !COPIED
        } else if is_once {
            entry | COPIED
        } else {
            entry & !COPIED
        }
    };
    for index in 0..tables.l1.len() {
        let entry = tables.l1[index];
        if offset(entry) == 0 {
            continue;
        }
        let table = get_table(file, offset(entry), tables.header.l2_entries() as usize)?;
        let new: Vec<u64> = table.iter().map(|entry| marked(*entry)).collect();
        if new != table {
            file.set(offset(entry), &super::tables::table_bytes(&new))?;
        }
        if marked(entry) != entry {
            file.set(tables.header.l1_offset + 8 * index as u64, &marked(entry).to_be_bytes())?;
            tables.l1[index] = marked(entry);
        }
    }
    tables.forget();
    Ok(())
}

/// Makes the refcounts anew from what is used.
///
/// # Errors
/// When more is wrong than they: nothing was changed then.
pub fn repair(file: &HostFile, tables: &mut Tables) -> io::Result<()> {
    tables.forget();
    let (uses, report) = uses(file, tables)?;
    if let Some(sentence) = report.sentences.first() {
        return Err(damaged(sentence.clone()));
    }
    // The last cluster may not be whole.
    file.set_length(tables.end << tables.header.cluster_bits)?;
    for (cluster, count) in &uses {
        let count = u16::try_from(*count).map_err(|_| damaged("a cluster is used too often".into()))?;
        if tables.refcount(file, *cluster)? != count {
            tables.set_refcount(file, *cluster, count)?;
        }
    }
    // Blocks that were made for it count themselves.
    for index in 0..tables.refcount_blocks() {
        for (cluster, _) in tables.counted(file, index)? {
            if !uses.contains_key(&cluster) && !tables.metadata.contains(&cluster) {
                tables.set_refcount(file, cluster, 0)?;
            }
        }
    }
    set_copied(file, tables, &uses)
}
