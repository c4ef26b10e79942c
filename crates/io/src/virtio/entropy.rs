//! The entropy device: random bytes from the host's kernel. Source: VIRTIO 1.2, 5.4 "Entropy Device".

use super::queue::Chain;
use super::{Answer, Backend};

const DEVICE_TYPE: u16 = 4;
/// What a request may get at once: a driver asks again. Linux asks for 64.
const MOST_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, Default)]
pub struct Entropy;

impl Backend for Entropy {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        0xff_0000
    }

    fn serve(&self, _queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        let wanted = chain.writable_bytes().min(MOST_BYTES as u64) as usize;
        let mut bytes = vec![0; wanted];
        // 5.4.6.1: one byte at least. A host that has none before its own boot is over is no host that runs us.
        let filled = host::random::fill(&mut bytes) && chain.write(0, &bytes);
        Answer::Done(if filled { wanted as u32 } else { 0 })
    }
}
