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

impl Message {
    /// What a device sends by writing `data` to `address`: Intel SDM (2024-12) Vol. 3A 12.11 "Message Signalled Interrupts".
    /// `None` when the address is not the local APICs' (a device would write to memory there; ours do not).
    #[must_use]
    pub fn signalled(address: u64, data: u32) -> Option<Message> {
        if address >> 20 != 0xfee {
            return None;
        }
        let logical = address & 1 << 2 != 0;
        let destination = (address >> 12) as u32 & 0xff;
        Some(Message {
            vector: data as u8,
            mode: DeliveryMode::from_bits(data >> 8),
            destination: if destination == 0xff && !logical { u32::MAX } else { destination },
            logical,
            // Devices signal events; a level would need a message for its end too, and no system asks for it.
            level: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signalled_messages_name_their_receivers() {
        let message = Message::signalled(0xfee0_3000, 0x4061).unwrap();
        assert_eq!((message.vector, message.mode, message.destination), (0x61, DeliveryMode::Fixed, 3));
        assert!(!message.logical && !message.level);
        let message = Message::signalled(0xfee0_500c, 0x0161).unwrap();
        assert_eq!((message.mode, message.destination, message.logical), (DeliveryMode::LowestPriority, 5, true));
        assert_eq!(Message::signalled(0xfeef_f000, 0).unwrap().destination, u32::MAX);
        assert_eq!(Message::signalled(0xfeef_f004, 0).unwrap().destination, 0xff);
        assert!(Message::signalled(0xfed0_0000, 0).is_none() && Message::signalled(0x1_fee0_0000, 0).is_none());
    }
}
