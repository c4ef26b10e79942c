//! What interrupt controllers send to local APICs.

/// Intel SDM (2024-12) Vol. 3A 12.6.1 "Interrupt Command Register (ICR)", Delivery Mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    StartUp,
    /// The vector comes from the PIC, at the acknowledgement.
    ExtInt,
    Reserved,
}

impl DeliveryMode {
    /// From the low three bits; the rest is ignored.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::StartUp,
            7 => DeliveryMode::ExtInt,
            _ => DeliveryMode::Reserved,
        }
    }
}

/// One message on the (virtual) APIC bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub vector: u8,
    pub mode: DeliveryMode,
    /// Whom: an APIC identifier, or a set of them if `logical`. All ones is everybody.
    pub destination: u32,
    pub logical: bool,
    /// Level-triggered: its end is told to the I/O APIC.
    pub level: bool,
}
