//! Compressed clusters: read, never written. Source: QEMU 7.2, docs/interop/qcow2.txt, "Compressed Clusters Descriptor".

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::super::host_file::HostFile;
use super::damaged;
use super::header::Header;

/// How many are kept: a guest that reads in sequence asks for each several times.
const MOST_KEPT: usize = 4;

/// The clusters that were unpacked last, by their place in the file.
#[derive(Debug, Default)]
pub struct Unpacked(Mutex<Vec<(u64, Arc<Vec<u8>>)>>);

impl Unpacked {
    pub fn get(&self, file: &HostFile, header: &Header, at: u64, size: u64) -> io::Result<Arc<Vec<u8>>> {
        {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, content)) = kept.iter().find(|(place, _)| *place == at) {
                return Ok(Arc::clone(content));
            }
        }
        let content = Arc::new(unpack(file, header, at, size)?);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MOST_KEPT {
            kept.remove(0);
        }
        kept.push((at, Arc::clone(&content)));
        Ok(content)
    }
}

fn unpack(file: &HostFile, header: &Header, at: u64, size: u64) -> io::Result<Vec<u8>> {
    // Its last sector may be the file's last, and begun only.
    let size = size.min(file.length()?.saturating_sub(at));
    let mut packed = vec![0; size as usize];
    file.get(at, &mut packed)?;
    let mut content = vec![0; header.cluster() as usize];
    let is_whole = if header.zstd { unzstd(&packed, &mut content) } else { inflate(&packed, &mut content) };
    if is_whole { Ok(content) } else { Err(damaged(format!("the compressed cluster at {at:#x} cannot be unpacked"))) }
}

/// What lies behind the end of the stream in its last sector is not looked at.
fn inflate(packed: &[u8], content: &mut [u8]) -> bool {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(&mut state, packed, content, 0, flags);
    written == content.len() && matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput)
}

fn unzstd(packed: &[u8], content: &mut [u8]) -> bool {
    let Some(mut context) = zstd_safe::DCtx::try_create() else { return false };
    let whole = content.len();
    let mut output = zstd_safe::OutBuffer::around(content);
    let mut input = zstd_safe::InBuffer::around(packed);
    while output.pos() < whole {
        let before = (input.pos, output.pos());
        if context.decompress_stream(&mut output, &mut input).is_err() || (input.pos, output.pos()) == before {
            return false;
        }
    }
    true
}
