//! Names the build: translations that are kept on disk may only be run by the translator that made them, with the same
//! layout of the structures that they reach into. So the name covers the sources of all that decides either, the compiler,
//! and how it was told to compile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// FNV-1a (Fowler, Noll, Vo), twice over with different starts: a name, not a protection.
struct Hash([u64; 2]);

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().chain(&bytes.len().to_le_bytes()) {
            for word in &mut self.0 {
                *word = (*word ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn main() {
    let mut hash = Hash([0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142]);
    for folder in ["src", "../memory/src", "../x86/src", "../host/src"] {
        println!("cargo::rerun-if-changed={folder}");
        let mut files = Vec::new();
        sources(Path::new(folder), &mut files);
        files.sort();
        for file in files {
            hash.add(file.to_string_lossy().as_bytes());
            hash.add(&fs::read(&file).unwrap_or_default());
        }
    }
    let mut variables: Vec<_> = std::env::vars().filter(|(name, _)| is_decisive(name)).collect();
    variables.sort();
    for (name, value) in variables {
        hash.add(name.as_bytes());
        hash.add(value.as_bytes());
    }
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    if let Ok(output) = Command::new(compiler).arg("-vV").output() {
        hash.add(&output.stdout);
    }
    println!("cargo::rustc-env=RINGZERO_BUILD={:016x}{:016x}", hash.0[0], hash.0[1]);
}

fn is_decisive(name: &str) -> bool {
    matches!(name, "PROFILE" | "OPT_LEVEL" | "DEBUG" | "TARGET" | "CARGO_ENCODED_RUSTFLAGS" | "CARGO_PKG_VERSION")
        || name.starts_with("CARGO_FEATURE_")
        || name.starts_with("CARGO_CFG_")
}
