//! A translated block as bytes, independent of where its code and its guest page are.
//!
//! A record says which bytes of the guest's page it was made of; it is of use wherever those are the same. It is parsed with
//! every length checked, although only records that this user's own translator wrote ever get here.

use super::super::lower::{Flags, MapEntry, Site};

/// Bytes of the block's page that its translation depends on: its code, and whatever else was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub offset: u16,
    pub size: u16,
}

/// A 32-bit displacement in the code to something outside the block: where it is, and its target from the code cache's
/// start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct External {
    pub at: u32,
    pub target: u32,
}

/// A site and where its number is in the code.
#[derive(Clone, Copy, Debug)]
pub struct SiteUse {
    pub at: u32,
    pub site: Site,
}

/// A block on its way into or out of a record. Parts and sites of a parsed record are read with [`Record::parts`] and its
/// kin.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// The first is the block's code.
    pub parts: &'a [Span],
    /// The page that the parts are of.
    pub page: &'a [u8],
    pub insns: u16,
    pub entry_host: u32,
    pub entry_slot: u32,
    /// Where the block's code is from the code cache's start: sites are relative to that in the record.
    pub start: u32,
    pub code: &'a [u8],
    pub externals: &'a [External],
    pub sites: &'a [Site],
    /// Where the sites' numbers are.
    pub site_uses: &'a [u32],
    pub map: &'a [MapEntry],
}

const SITE: usize = 4 + Site::PACKED;
/// Bytes before the parts.
const HEAD: usize = 36;

/// Appends the record of a block.
pub fn write(block: &Block<'_>, out: &mut Vec<u8>) {
    let begin = out.len();
    let counts = [block.parts.len(), block.externals.len(), block.sites.len(), block.map.len(), block.code.len()];
    out.extend_from_slice(&[0; 4]);
    for count in counts {
        out.extend_from_slice(&(count as u32).to_le_bytes());
    }
    for word in [block.entry_host, block.entry_slot, block.insns.into()] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for part in block.parts {
        out.extend_from_slice(&part.offset.to_le_bytes());
        out.extend_from_slice(&part.size.to_le_bytes());
    }
    for part in block.parts {
        out.extend_from_slice(&block.page[usize::from(part.offset)..][..usize::from(part.size)]);
    }
    for external in block.externals {
        out.extend_from_slice(&external.at.to_le_bytes());
        out.extend_from_slice(&external.target.to_le_bytes());
    }
    for (site, at) in block.sites.iter().zip(block.site_uses) {
        out.extend_from_slice(&at.to_le_bytes());
        out.extend_from_slice(&site.pack(block.start));
    }
    for entry in block.map {
        out.extend_from_slice(&entry.host.to_le_bytes());
        out.extend_from_slice(&entry.guest.to_le_bytes());
        out.extend_from_slice(&u16::from(entry.flags == Flags::Host).to_le_bytes());
    }
    out.extend_from_slice(block.code);
    let size = (out.len() - begin) as u32;
    out[begin..begin + 4].copy_from_slice(&size.to_le_bytes());
}

/// A parsed record.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub insns: u32,
    pub entry_host: u32,
    pub entry_slot: u32,
    pub code: &'a [u8],
    /// All of it.
    pub bytes: &'a [u8],
    parts: &'a [u8],
    guest: &'a [u8],
    externals: &'a [u8],
    sites: &'a [u8],
    map: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl<'a> Record<'a> {
    /// Takes the first record off `rest`.
    pub fn take(rest: &mut &'a [u8]) -> Option<Record<'a>> {
        let size = word(rest, 0)? as usize;
        let bytes = rest.get(..size)?;
        let [parts, externals, sites, map, code] =
            [word(bytes, 4)?, word(bytes, 8)?, word(bytes, 12)?, word(bytes, 16)?, word(bytes, 20)?]
                .map(|count| count as usize);
        let (entry_host, entry_slot, insns) = (word(bytes, 24)?, word(bytes, 28)?, word(bytes, 32)?);
        let mut body = bytes.get(HEAD..)?;
        let mut next = |size: usize| body.split_off(..size);
        let parts = next(parts.checked_mul(4)?)?;
        let guest = parts.chunks_exact(4).map(|part| usize::from(half(part, 2).unwrap_or(0))).sum();
        let guest = next(guest)?;
        let externals = next(externals.checked_mul(8)?)?;
        let sites = next(sites.checked_mul(SITE)?)?;
        let map = next(map.checked_mul(8)?)?;
        let code = next(code)?;
        let record = Record { insns, entry_host, entry_slot, code, bytes, parts, guest, externals, sites, map };
        if !record.is_consistent() {
            return None;
        }
        *rest = &rest[size..];
        Some(record)
    }

    /// Passes the first record of `rest` over, and gives the offset at which its block begins.
    pub fn skip(rest: &mut &'a [u8]) -> Option<u16> {
        let bytes = rest.get(..word(rest, 0)? as usize)?;
        let offset = half(bytes, HEAD)?;
        *rest = &rest[bytes.len()..];
        Some(offset)
    }

    /// Whether everything that points into the code or the page is inside it.
    fn is_consistent(&self) -> bool {
        let inside = |at: u32| (at as usize).checked_add(4).is_some_and(|end| end <= self.code.len());
        let entry = |at: u32| (at as usize) < self.code.len();
        self.parts.len() >= 4
            && self.parts().all(|part| part.size > 0 && u32::from(part.offset) + u32::from(part.size) <= 4096)
            && self.externals().all(|external| inside(external.at))
            && self.sites.chunks_exact(SITE).all(|site| word(site, 0).is_some_and(inside))
            && entry(self.entry_host)
            && entry(self.entry_slot)
    }

    pub fn parts(&self) -> impl Iterator<Item = Span> + 'a {
        self.parts.chunks_exact(4).filter_map(|part| Some(Span { offset: half(part, 0)?, size: half(part, 2)? }))
    }

    /// The offset in its page where the block begins.
    pub fn offset(&self) -> u16 {
        half(self.parts, 0).unwrap_or(0)
    }

    /// What the block was made of: each part and the bytes that were there.
    pub fn guest(&self) -> impl Iterator<Item = (Span, &'a [u8])> {
        let mut guest = self.guest;
        self.parts().map_while(move |part| Some((part, guest.split_off(..usize::from(part.size))?)))
    }

    /// The 32-bit displacement at an offset of the code; 0 where there is none.
    pub fn displacement(&self, at: u32) -> u32 {
        word(self.code, at as usize).unwrap_or(0)
    }

    /// What makes two records stand for the same block: the parts and their content.
    pub fn identity(&self) -> (&'a [u8], &'a [u8]) {
        (self.parts, self.guest)
    }

    pub fn externals(&self) -> impl Iterator<Item = External> + 'a {
        self.externals.chunks_exact(8).filter_map(|pair| Some(External { at: word(pair, 0)?, target: word(pair, 4)? }))
    }

    pub fn site_count(&self) -> usize {
        self.sites.len() / SITE
    }

    /// The sites, for a block of this number whose code begins `start` bytes from the code cache's start. `None` for one that
    /// is no site.
    pub fn sites(&self, block: u32, start: u32) -> impl Iterator<Item = Option<SiteUse>> + 'a {
        self.sites.chunks_exact(SITE).map(move |bytes| {
            let site = Site::unpack(bytes.get(4..)?.try_into().ok()?, block, start)?;
            Some(SiteUse { at: word(bytes, 0)?, site })
        })
    }

    pub fn map(&self) -> impl Iterator<Item = MapEntry> + 'a {
        self.map.chunks_exact(8).filter_map(|entry| {
            let flags = if half(entry, 6)? == 1 { Flags::Host } else { Flags::Slot };
            Some(MapEntry { host: word(entry, 0)?, guest: half(entry, 4)?, flags })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Vec<u8> {
        let mut page = [0; 4096];
        page[0x100..0x103].copy_from_slice(&[1, 2, 3]);
        page[0x200] = 9;
        let mut out = Vec::new();
        let block = Block {
            parts: &[Span { offset: 0x100, size: 3 }, Span { offset: 0x200, size: 1 }],
            page: &page,
            insns: 2,
            entry_host: 4,
            entry_slot: 0,
            start: 0x5000,
            code: &[0x90; 24],
            externals: &[External { at: 8, target: 0x1234 }],
            sites: &[Site::Link { block: 7, at: 0x5006, target: -5, flags_in_host: true }],
            site_uses: &[12],
            map: &[MapEntry { host: 3, guest: 2, flags: Flags::Host }],
        };
        write(&block, &mut out);
        out
    }

    #[test]
    fn a_record_comes_back_for_another_place() {
        let bytes = [record(), record()].concat();
        let mut rest = &bytes[..];
        let first = Record::take(&mut rest).unwrap();
        assert_eq!((first.insns, first.entry_host, first.entry_slot, first.offset()), (2, 4, 0, 0x100));
        assert_eq!(first.code, [0x90; 24]);
        assert_eq!(first.externals().collect::<Vec<_>>(), [External { at: 8, target: 0x1234 }]);
        let site = first.sites(9, 0x8000).next().unwrap().unwrap();
        assert_eq!(site.at, 12);
        assert!(matches!(site.site, Site::Link { block: 9, at: 0x8006, target: -5, flags_in_host: true }));
        let map: Vec<_> = first.map().collect();
        assert_eq!((map[0].host, map[0].guest, map[0].flags), (3, 2, Flags::Host));
        assert!(Record::take(&mut rest).is_some() && rest.is_empty());
    }

    #[test]
    fn a_record_says_what_it_was_made_of() {
        let bytes = record();
        let record = Record::take(&mut &bytes[..]).unwrap();
        let guest: Vec<_> = record.guest().collect();
        let span = |offset, size| Span { offset, size };
        assert_eq!(guest, [(span(0x100, 3), &[1, 2, 3][..]), (span(0x200, 1), &[9])], "and what was looked at besides");
    }

    #[test]
    fn records_are_passed_over_by_their_size() {
        let bytes = [record(), record()].concat();
        let mut rest = &bytes[..];
        assert_eq!((Record::skip(&mut rest), rest.len()), (Some(0x100), bytes.len() / 2));
        assert_eq!((Record::skip(&mut rest), Record::skip(&mut rest), rest.len()), (Some(0x100), None, 0));
        for size in 0..bytes.len() / 2 {
            assert!(Record::skip(&mut &bytes[..size]).is_none());
        }
        // One that says it has no bytes would be passed over for ever.
        assert!(Record::skip(&mut &[0; 64][..]).is_none());
    }

    #[test]
    fn nothing_that_a_record_can_hold_leads_outside_of_it() {
        let good = record();
        for size in 0..good.len() {
            assert!(Record::take(&mut &good[..size]).is_none());
        }
        for at in 0..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Some(record) = Record::take(&mut &bad[..]) {
                    let _ = (record.guest().count(), record.map().count(), record.sites(0, 0).count());
                    assert!(record.externals().all(|external| external.at as usize + 4 <= record.code.len()));
                }
            }
        }
    }
}
