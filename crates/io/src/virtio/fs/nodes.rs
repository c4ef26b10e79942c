//! The files that the driver knows, by the numbers that it knows them by.
//!
//! A node is no open file but a place: the folder that it is in, and its name there. So a guest can know as many as it likes
//! without taking this process's descriptors, and what a saved machine keeps of them means something in another process.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use host::folder::Status;

/// The folder itself.
pub const ROOT: u64 = 1;
/// Nodes that a guest may know at once: some hundred bytes each.
const MOST_NODES: usize = 1 << 20;
/// Folders within folders: more only where somebody moves them about meanwhile.
const DEEPEST: usize = 1024;

/// Which file it is, whatever its name. An inode's number alone may be that of a later file.
type Key = (u64, u64, (i64, u32));

#[derive(Debug, Default)]
struct Node {
    /// Folder and name; the last that was heard of is the last. None when the file was removed.
    names: Vec<(u64, OsString)>,
    /// How often the driver was told of it.
    lookups: u64,
    key: Option<Key>,
}

/// What a saved machine keeps of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    pub number: u64,
    pub lookups: u64,
    pub names: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug)]
pub struct Nodes {
    by_number: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
}

impl Default for Nodes {
    fn default() -> Self {
        Nodes { by_number: HashMap::new(), by_key: HashMap::new(), next: ROOT + 1 }
    }
}

fn key(status: &Status) -> Key {
    (status.device, status.inode, status.born)
}

impl Nodes {
    /// The path of a node below the root, which is empty.
    pub fn path(&self, number: u64) -> Result<PathBuf, i32> {
        let (mut names, mut at) = (Vec::new(), number);
        while at != ROOT {
            let (folder, name) = self.place(at)?;
            names.push(name);
            at = folder;
            if names.len() > DEEPEST {
                return Err(libc::ELOOP);
            }
        }
        Ok(names.iter().rev().collect())
    }

    /// The folder that a node is in, and its name there.
    pub fn place(&self, number: u64) -> Result<(u64, &OsStr), i32> {
        let node = self.by_number.get(&number).ok_or(libc::ESTALE)?;
        node.names.last().map(|(folder, name)| (*folder, name.as_os_str())).ok_or(libc::ESTALE)
    }

    /// The number of the file that has this name, which the driver is told of once more.
    pub fn tell(&mut self, folder: u64, name: &OsStr, status: &Status) -> Result<u64, i32> {
        let key = key(status);
        let number = match self.by_key.get(&key) {
            Some(number) => *number,
            None if self.by_number.len() >= MOST_NODES => return Err(libc::ENFILE),
            None => {
                let number = self.next;
                self.next += 1;
                self.by_key.insert(key, number);
                self.by_number.insert(number, Node { key: Some(key), ..Node::default() });
                number
            }
        };
        if let Some(node) = self.by_number.get_mut(&number) {
            node.lookups = node.lookups.saturating_add(1);
            let place = (folder, name.to_os_string());
            if status.mode & libc::S_IFMT == libc::S_IFDIR {
                // A folder has one name. Where it had another, somebody has moved it.
                node.names.clear();
            } else {
                node.names.retain(|known| *known != place);
            }
            node.names.push(place);
        }
        Ok(number)
    }

    /// The driver does not know the node any more, so often.
    pub fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.by_number.get_mut(&number) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 {
            let key = node.key;
            self.by_number.remove(&number);
            self.unlist(number, key);
        }
    }

    fn unlist(&mut self, number: u64, key: Option<Key>) {
        if let Some(key) = key
            && self.by_key.get(&key) == Some(&number)
        {
            self.by_key.remove(&key);
        }
    }

    /// A name is no more; `status` is that of what had it.
    pub fn removed(&mut self, folder: u64, name: &OsStr, status: &Status) {
        self.lose_name(key(status), folder, name);
    }

    fn lose_name(&mut self, key: Key, folder: u64, name: &OsStr) {
        let Some(number) = self.by_key.get(&key).copied() else { return };
        let Some(node) = self.by_number.get_mut(&number) else { return };
        node.names.retain(|(known, other)| *known != folder || other != name);
        if node.names.is_empty() {
            // Another file may have its inode's number soon.
            node.key = None;
            self.by_key.remove(&key);
        }
    }

    /// A name is another's now, or a file has another name.
    pub fn moved(&mut self, status: &Status, from: (u64, &OsStr), to: (u64, &OsStr)) {
        let Some(number) = self.by_key.get(&key(status)) else { return };
        if let Some(node) = self.by_number.get_mut(number) {
            node.names.retain(|(folder, name)| (*folder, name.as_os_str()) != from);
            node.names.push((to.0, to.1.to_os_string()));
        }
    }

    pub fn state(&self) -> Vec<NodeState> {
        let in_bytes = |(folder, name): &(u64, OsString)| (*folder, name.as_bytes().to_vec());
        let states = self.by_number.iter().map(|(number, node)| NodeState {
            number: *number,
            lookups: node.lookups,
            names: node.names.iter().map(in_bytes).collect(),
        });
        let mut states: Vec<_> = states.collect();
        states.sort_by_key(|state| state.number);
        states
    }

    /// Takes over the nodes of a saved machine; `status_of` finds out what is there by now.
    pub fn restore(&mut self, states: &[NodeState], status_of: impl Fn(&Nodes, u64) -> Option<Status>) {
        *self = Nodes::default();
        for state in states.iter().filter(|state| state.number > ROOT && state.lookups > 0).take(MOST_NODES) {
            let names = state.names.iter().map(|(folder, name)| (*folder, OsStr::from_bytes(name).to_os_string()));
            let node = Node { names: names.collect(), lookups: state.lookups, key: None };
            self.by_number.insert(state.number, node);
            self.next = self.next.max(state.number.saturating_add(1));
        }
        let mut taken = HashSet::new();
        let found: Vec<(u64, Key)> = states
            .iter()
            .filter_map(|state| Some((state.number, key(&status_of(self, state.number)?))))
            .filter(|(_, key)| taken.insert(*key))
            .collect();
        for (number, key) in found {
            if let Some(node) = self.by_number.get_mut(&number) {
                node.key = Some(key);
                self.by_key.insert(key, number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(inode: u64, mode: u32) -> Status {
        Status { inode, mode, ..Status::default() }
    }

    #[test]
    fn a_file_is_one_node_whatever_its_names() {
        let mut nodes = Nodes::default();
        let folder = nodes.tell(ROOT, "f".as_ref(), &status(10, libc::S_IFDIR)).unwrap();
        let file = nodes.tell(folder, "a".as_ref(), &status(11, libc::S_IFREG)).unwrap();
        assert_eq!(nodes.tell(ROOT, "b".as_ref(), &status(11, libc::S_IFREG)).unwrap(), file);
        assert_eq!(nodes.path(file).unwrap(), PathBuf::from("b"));
        nodes.removed(ROOT, "b".as_ref(), &status(11, libc::S_IFREG));
        assert_eq!(nodes.path(file).unwrap(), PathBuf::from("f/a"));
        nodes.moved(&status(10, libc::S_IFDIR), (ROOT, "f".as_ref()), (ROOT, "g".as_ref()));
        assert_eq!(nodes.path(file).unwrap(), PathBuf::from("g/a"));
        nodes.removed(folder, "a".as_ref(), &status(11, libc::S_IFREG));
        assert_eq!(nodes.path(file), Err(libc::ESTALE));
        // Its inode's number is a new file's now.
        assert_ne!(nodes.tell(ROOT, "new".as_ref(), &status(11, libc::S_IFREG)).unwrap(), file);
        nodes.forget(file, 1);
        assert!(nodes.path(file).is_err() && nodes.by_number.contains_key(&file));
        nodes.forget(file, u64::MAX);
        assert!(!nodes.by_number.contains_key(&file));
        nodes.forget(ROOT, 1);
        assert_eq!(nodes.path(ROOT).unwrap(), PathBuf::new());
        assert_eq!(nodes.path(77), Err(libc::ESTALE));
    }

    #[test]
    fn folders_that_are_in_each_other_have_no_path() {
        let mut nodes = Nodes::default();
        let one = nodes.tell(ROOT, "a".as_ref(), &status(1, libc::S_IFDIR)).unwrap();
        let two = nodes.tell(one, "b".as_ref(), &status(2, libc::S_IFDIR)).unwrap();
        nodes.tell(two, "a".as_ref(), &status(1, libc::S_IFDIR)).unwrap();
        assert_eq!(nodes.path(two), Err(libc::ELOOP));
    }

    #[test]
    fn nodes_are_saved_and_come_back() {
        let mut nodes = Nodes::default();
        let folder = nodes.tell(ROOT, "f".as_ref(), &status(10, libc::S_IFDIR)).unwrap();
        let file = nodes.tell(folder, "a".as_ref(), &status(11, libc::S_IFREG)).unwrap();
        nodes.tell(ROOT, "b".as_ref(), &status(11, libc::S_IFREG)).unwrap();
        let saved = nodes.state();
        let mut again = Nodes::default();
        again.restore(&saved, |nodes, number| {
            (nodes.path(number).unwrap().as_os_str() == "b").then(|| status(99, libc::S_IFREG))
        });
        assert_eq!(again.state(), saved);
        assert_eq!(again.tell(ROOT, "b".as_ref(), &status(99, libc::S_IFREG)).unwrap(), file);
        assert!(again.tell(ROOT, "c".as_ref(), &status(5, libc::S_IFREG)).unwrap() > file);
    }
}
