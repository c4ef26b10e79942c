//! What a saved machine keeps of a folder, as bytes: numbers, and lists with their lengths before them.

use super::nodes::NodeState;
use super::protocol::{Arguments, Reply};
use super::server::{HandleState, State};

impl State {
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Reply::default().u32(self.nodes.len() as u32);
        for node in &self.nodes {
            out = out.u64(node.number).u64(node.lookups).u32(node.names.len() as u32);
            for (folder, name) in &node.names {
                out = out.u64(*folder).u32(name.len() as u32);
                out.0.extend(name);
            }
        }
        out = out.u32(self.handles.len() as u32);
        for handle in &self.handles {
            let flags = handle.flags.cast_unsigned();
            out = out.u64(handle.number).u64(handle.node).u32(flags).u32(u32::from(handle.is_folder));
        }
        out.0
    }

    /// # Errors
    /// EINVAL for what [`State::to_bytes`] did not make.
    pub fn from_bytes(bytes: &mut Arguments<'_>) -> Result<State, i32> {
        let mut state = State::default();
        for _ in 0..bytes.u32()? {
            let mut node = NodeState { number: bytes.u64()?, lookups: bytes.u64()?, names: Vec::new() };
            for _ in 0..bytes.u32()? {
                let folder = bytes.u64()?;
                let size = bytes.u32()? as usize;
                node.names.push((folder, bytes.bytes(size)?.to_vec()));
            }
            state.nodes.push(node);
        }
        for _ in 0..bytes.u32()? {
            let (number, node) = (bytes.u64()?, bytes.u64()?);
            let (flags, is_folder) = (bytes.u32()?.cast_signed(), bytes.u32()? != 0);
            state.handles.push(HandleState { number, node, flags, is_folder });
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_was_and_parts_of_one_do_not() {
        let names = vec![(1, b"a\xff".to_vec()), (2, Vec::new())];
        let state = State {
            nodes: vec![NodeState { number: 7, lookups: 2, names }, NodeState { number: 8, lookups: 1, names: vec![] }],
            handles: vec![HandleState { number: 3, node: 7, flags: -1, is_folder: true }],
        };
        let bytes = state.to_bytes();
        assert_eq!(State::from_bytes(&mut Arguments(&bytes)), Ok(state));
        for size in 0..bytes.len() {
            assert!(State::from_bytes(&mut Arguments(&bytes[..size])).is_err(), "{size}");
        }
        assert!(State::from_bytes(&mut Arguments(&[0xff; 64])).is_err());
    }
}
