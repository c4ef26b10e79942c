//! A sharing group: its shared pages and its members, and what is done with what a member says.
//!
//! All that a member says is answered at once, or is a fault of its own. A page is counted for a member before its number is
//! told, so that no other's release can free it on the way.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use host::random;
use x86::PAGE_SIZE;

use super::hints::{Hint, Hints};
use super::table::{Identity, Table};
use super::wire::{MOST_CONTENTS, NONE, Reply, Request, VERSION};
use super::{Page, hash};

/// Twins that a member is told of with its next answer, at most. The others it finds with its next pass.
const MOST_WISHES: usize = 256;

/// A member's fault, in words.
pub type Fault = String;

#[derive(Debug)]
enum Phase {
    New,
    /// So many held pages are still to be named.
    Registering(u32),
    Ready,
    /// It was asked for contents.
    Asked(Offer),
}

/// What a member has offered, and what it gets.
#[derive(Debug)]
struct Offer {
    pages: Vec<(u32, u64)>,
    answer: Vec<u32>,
    /// Places whose content is wanted: those asked for now, then the others.
    wanted: Vec<u32>,
    asked: usize,
}

/// Which shared pages a member uses, and how often. Most are used once.
#[derive(Debug, Default)]
struct Uses {
    once: hashbrown::HashSet<u32, std::hash::RandomState>,
    /// Uses beyond the first.
    more: HashMap<u32, u32>,
    count: u64,
}

impl Uses {
    fn add(&mut self, page: u32, count: u32) {
        let more = if self.once.insert(page) { count - 1 } else { count };
        if more > 0 {
            *self.more.entry(page).or_default() += more;
        }
        self.count += u64::from(count);
    }

    /// False when it does not use the page.
    fn remove(&mut self, page: u32) -> bool {
        match self.more.get_mut(&page) {
            Some(1) => drop(self.more.remove(&page)),
            Some(more) => *more -= 1,
            None if self.once.remove(&page) => {}
            None => return false,
        }
        self.count -= 1;
        true
    }

    fn all(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.once.iter().map(|page| (*page, 1 + self.more.get(page).copied().unwrap_or(0)))
    }

    fn size(&self) -> u64 {
        (self.once.allocation_size() + self.more.capacity() * 9) as u64
    }
}

#[derive(Debug)]
struct Member {
    /// Pages that the VM has: it cannot use more.
    pages: u64,
    phase: Phase,
    /// It has shared pages of a sharer that is gone, which it will name.
    will_claim: bool,
    uses: Uses,
    wishes: Vec<u32>,
    /// Hints that it gave, and in which generation.
    hints: (u32, u64),
}

/// What a group has done, and has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub members: u64,
    /// Pages of all members together.
    pub guest_pages: u64,
    /// Pages of the pool that are in use, and how often they are.
    pub shared_pages: u64,
    pub uses: u64,
    pub offered: u64,
    /// Offered pages that were there.
    pub found: u64,
    /// Pages that were put into the pool.
    pub added: u64,
    /// Contents that were not any more what had been offered, or that the member had not any more.
    pub stale: u64,
    pub released: u64,
    /// Bytes that all tables take.
    pub metadata_bytes: u64,
}

#[derive(Debug)]
pub struct Group {
    seed: u64,
    /// `None` until the first member hands over the pool of a sharer that is gone.
    table: Option<Table>,
    wanted: Option<Identity>,
    limit: u32,
    secret: u64,
    hints: Hints,
    members: HashMap<u16, Member>,
    /// Whether all members that will claim pages have joined.
    all_are_here: bool,
    /// Pages of all members together.
    guest_pages: u64,
    /// The hash of a page of zeroes, which is never shared.
    of_zeroes: u64,
    counts: Statistics,
}

fn random_number() -> io::Result<u64> {
    let mut bytes = [0; 8];
    let is_there = random::fill(&mut bytes);
    is_there.then(|| u64::from_le_bytes(bytes)).ok_or_else(|| io::Error::other("the system has no randomness yet"))
}

impl Group {
    /// A group with a pool of its own of at most `limit` pages, or with one that its members have already.
    pub fn new(limit: u32, pool: Option<Identity>) -> io::Result<Group> {
        let (seed, secret) = (random_number()?, random_number()?);
        let table = if pool.is_none() { Some(Table::new(limit, secret)?) } else { None };
        Ok(Group {
            seed,
            table,
            wanted: pool,
            limit,
            secret,
            hints: Hints::default(),
            members: HashMap::new(),
            all_are_here: false,
            guest_pages: 0,
            of_zeroes: hash(&[0; PAGE_SIZE as usize], seed),
            counts: Statistics::default(),
        })
    }

    /// The pool, to read; `None` as long as it is not known.
    pub fn pool(&self) -> Option<io::Result<(File, Identity)>> {
        let both = |table: &Table| Ok((table.pool_to_read()?, table.identity()?));
        self.table.as_ref().map(both)
    }

    /// Which pool the group has, or waits for.
    pub fn identity(&self) -> io::Result<Identity> {
        match (&self.table, self.wanted) {
            (Some(table), _) => table.identity(),
            (None, Some(wanted)) => Ok(wanted),
            (None, None) => Err(io::Error::other("the group has no pool")),
        }
    }

    /// A VM of so many pages comes, which `will_claim` shared pages or has none yet; gives its number, or `None` when there are
    /// too many.
    pub fn join(&mut self, pages: u64, will_claim: bool) -> Option<u16> {
        let number = (0..u16::MAX).find(|number| !self.members.contains_key(number))?;
        let (uses, wishes) = (Uses::default(), Vec::new());
        self.guest_pages += pages;
        self.members.insert(number, Member { pages, phase: Phase::New, will_claim, uses, wishes, hints: (0, 0) });
        Some(number)
    }

    /// A VM is gone: what it used goes back.
    pub fn leave(&mut self, number: u16) {
        let Some(member) = self.members.remove(&number) else { return };
        self.guest_pages -= member.pages;
        if let Some(table) = &mut self.table {
            member.uses.all().for_each(|(page, count)| table.remove_users(page, count));
        }
        self.free_what_nobody_claims();
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// All VMs that used the pool before have joined, or are gone.
    pub fn all_are_here(&mut self) {
        self.all_are_here = true;
        self.free_what_nobody_claims();
    }

    /// Frees what is left of an earlier sharer's pages, once all who may name some have done so.
    fn free_what_nobody_claims(&mut self) {
        let is_done = |member: &Member| !member.will_claim || matches!(member.phase, Phase::Ready | Phase::Asked(_));
        if let Some(table) = self.table.as_mut().filter(|table| table.is_adopted())
            && self.all_are_here
            && self.members.values().all(is_done)
        {
            table.all_have_claimed();
        }
    }

    /// Does what a member says; what it is answered is appended.
    pub fn handle(
        &mut self,
        number: u16,
        request: Request,
        files: &mut Vec<OwnedFd>,
        replies: &mut Vec<Reply>,
    ) -> Result<(), Fault> {
        let files = std::mem::take(files);
        let member = self.members.get_mut(&number).ok_or("it is no member")?;
        match (&mut member.phase, request) {
            (Phase::New, Request::Register { version, held }) => {
                if version != VERSION {
                    return Err(format!("it speaks version {version}, and the sharer {VERSION}"));
                }
                if u64::from(held) > member.pages {
                    return Err(format!("it uses {held} shared pages, and has {}", member.pages));
                }
                member.phase = Phase::Registering(held);
                self.take_pool(held, files)?;
            }
            (Phase::Registering(rest), Request::Held(held)) if *rest > 0 => {
                *rest = rest.checked_sub(held.len() as u32).ok_or("it names more shared pages than it announced")?;
                self.claim(number, &held)?;
            }
            (Phase::Ready, Request::Offer(pages)) => self.offer(number, pages, replies)?,
            (Phase::Asked(_), Request::Content(contents)) => self.content(number, contents, replies)?,
            (Phase::Ready, Request::Release(pages)) => {
                for page in pages {
                    self.release(number, page)?;
                }
            }
            (phase, request) => {
                let words = match request {
                    Request::Register { .. } => "registers",
                    Request::Held(_) => "names shared pages",
                    Request::Offer(_) => "offers pages",
                    Request::Content(_) => "sends contents",
                    Request::Release(_) => "releases pages",
                };
                let state = match phase {
                    Phase::New => "before it has registered",
                    Phase::Registering(_) => "while it registers",
                    Phase::Ready => "when that is not due",
                    Phase::Asked(_) => "when it was asked for contents",
                };
                return Err(format!("it {words} {state}"));
            }
        }
        if let Some(member) = self.members.get_mut(&number)
            && matches!(member.phase, Phase::Registering(0))
        {
            member.phase = Phase::Ready;
            replies.push(Reply::Welcome { seed: self.seed });
            self.free_what_nobody_claims();
        }
        Ok(())
    }

    /// The first member that has used the pool of a sharer that is gone brings it along.
    fn take_pool(&mut self, held: u32, files: Vec<OwnedFd>) -> Result<(), Fault> {
        let file = files.into_iter().next().map(File::from);
        match (&self.table, file, self.wanted) {
            (Some(table), Some(file), _) => {
                let is_it = table.identity().is_ok_and(|own| super::table::identity(&file).is_ok_and(|its| its == own));
                is_it.then_some(()).ok_or_else(|| "the pool that it uses is another one".into())
            }
            (None, Some(file), Some(wanted)) => {
                let table = Table::adopt(&file, wanted, self.limit, self.secret);
                self.table = Some(table.map_err(|error| format!("its pool cannot be used: {error}"))?);
                Ok(())
            }
            (Some(_), None, _) if held == 0 => Ok(()),
            _ => Err("it comes without the pool that it uses".into()),
        }
    }

    fn claim(&mut self, number: u16, held: &[(u32, u32)]) -> Result<(), Fault> {
        let (Some(member), Some(table)) = (self.members.get_mut(&number), &mut self.table) else { return Ok(()) };
        for (page, count) in held {
            if *count == 0 || member.uses.count + u64::from(*count) > member.pages {
                return Err(format!("it uses shared page {page} {count} times, which is not possible"));
            }
            for _ in 0..*count {
                match table.claim(*page, self.seed) {
                    Ok(true) => member.uses.add(*page, 1),
                    Ok(false) => return Err(format!("it uses shared page {page}, which is free")),
                    Err(error) => return Err(format!("shared page {page}, which it uses, cannot be read: {error}")),
                }
            }
        }
        Ok(())
    }

    fn release(&mut self, number: u16, page: u32) -> Result<(), Fault> {
        let (Some(member), Some(table)) = (self.members.get_mut(&number), &mut self.table) else { return Ok(()) };
        if !member.uses.remove(page) {
            return Err(format!("it releases shared page {page}, which it does not use"));
        }
        table.remove_users(page, 1);
        self.counts.released += 1;
        Ok(())
    }

    /// The page with a hash, if it is there, counted for a member.
    fn look_up(&mut self, number: u16, hash: u64) -> Option<u32> {
        let (member, table) = (self.members.get_mut(&number)?, self.table.as_mut()?);
        // A VM cannot use more shared pages than it has pages. Without this one could fill the pool alone.
        if member.uses.count >= member.pages {
            return None;
        }
        let page = table.find(hash).filter(|page| table.add_user(*page))?;
        member.uses.add(page, 1);
        self.counts.found += 1;
        Some(page)
    }

    fn offer(&mut self, number: u16, pages: Vec<(u32, u64)>, replies: &mut Vec<Reply>) -> Result<(), Fault> {
        self.counts.offered += pages.len() as u64;
        let mut offer = Offer { answer: vec![NONE; pages.len()], wanted: Vec::new(), asked: 0, pages };
        for place in 0..offer.pages.len() {
            let (ppn, hash) = offer.pages[place];
            if hash == self.of_zeroes {
                continue;
            }
            if let Some(page) = self.look_up(number, hash) {
                offer.answer[place] = page;
            } else if self.has_twin(number, ppn, hash) {
                offer.wanted.push(place as u32);
            }
        }
        self.ask_or_answer(number, offer, replies)
    }

    /// Whether a page was offered before that may be equal; whoever offered it is told that it has a twin.
    fn has_twin(&mut self, number: u16, ppn: u32, hash: u64) -> bool {
        let Some(table) = &self.table else { return false };
        let mixed = table.mixed(hash);
        let hint = Hint { member: number, ppn };
        match self.hints.get(mixed) {
            Some(known) if known != hint => {
                if let Some(other) = self.members.get_mut(&known.member)
                    && other.wishes.len() < MOST_WISHES
                {
                    other.wishes.push(known.ppn);
                }
                true
            }
            _ => {
                self.remember(number, mixed, hint);
                false
            }
        }
    }

    /// Remembers a hint. A VM that gives more of them than it has pages would make us forget those of others.
    fn remember(&mut self, number: u16, mixed: u64, hint: Hint) {
        let Some(member) = self.members.get_mut(&number) else { return };
        let generation = self.hints.generation();
        if member.hints.0 != generation {
            member.hints = (generation, 0);
        }
        if member.hints.1 < member.pages {
            member.hints.1 += 1;
            self.hints.insert(mixed, hint, self.guest_pages);
        }
    }

    fn content(&mut self, number: u16, contents: Vec<(u32, Box<Page>)>, replies: &mut Vec<Reply>) -> Result<(), Fault> {
        let member = self.members.get_mut(&number).ok_or("it is no member")?;
        let Phase::Asked(mut offer) = std::mem::replace(&mut member.phase, Phase::Ready) else {
            return Err("it sends contents that nobody asked for".into());
        };
        let mut asked: Vec<u32> = offer.wanted.drain(..offer.asked).collect();
        let mut good: Vec<(u32, &Page, u64)> = Vec::new();
        for (place, content) in &contents {
            let position = asked.iter().position(|other| other == place);
            asked.swap_remove(position.ok_or("it sends a content that nobody asked for")?);
            let wanted = offer.pages[*place as usize].1;
            // A guest may have changed it since.
            if hash(content, self.seed) == wanted {
                good.push((*place, content, wanted));
            } else {
                self.counts.stale += 1;
            }
        }
        self.counts.stale += asked.len() as u64;
        let room = member.pages.saturating_sub(member.uses.count);
        good.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        let table = self.table.as_mut().ok_or("the group has no pool")?;
        let before = table.in_use();
        let added = table.add(&good.iter().map(|(_, content, hash)| (*content, *hash)).collect::<Vec<_>>());
        self.counts.added += u64::from(table.in_use() - before);
        for ((place, _, _), page) in good.iter().zip(added) {
            if let Some(page) = page {
                member.uses.add(page, 1);
                offer.answer[*place as usize] = page;
            }
        }
        self.ask_or_answer(number, offer, replies)
    }

    /// Asks for the next contents, or, when none is wanted any more, answers.
    fn ask_or_answer(&mut self, number: u16, mut offer: Offer, replies: &mut Vec<Reply>) -> Result<(), Fault> {
        // Pages of this offer that have an equal one in it, or found one meanwhile.
        for place in 0..offer.pages.len() {
            let hash = offer.pages[place].1;
            if offer.answer[place] == NONE && hash != self.of_zeroes {
                offer.answer[place] = self.look_up(number, hash).unwrap_or(NONE);
            }
        }
        offer.wanted.retain(|place| offer.answer[*place as usize] == NONE);
        let member = self.members.get_mut(&number).ok_or("it is no member")?;
        offer.asked = offer.wanted.len().min(MOST_CONTENTS);
        if offer.asked > 0 {
            replies.push(Reply::Want(offer.wanted[..offer.asked].to_vec()));
            member.phase = Phase::Asked(offer);
            return Ok(());
        }
        let mut wishes = std::mem::take(&mut member.wishes);
        let is_open =
            |wish: &u32| offer.pages.iter().zip(&offer.answer).all(|((ppn, _), page)| ppn != wish || *page == NONE);
        wishes.retain(is_open);
        if !wishes.is_empty() {
            replies.push(Reply::Again(wishes));
        }
        replies.push(Reply::Answer(offer.answer));
        Ok(())
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let members = self.members.values();
        let of_members: u64 = members.map(|member| member.uses.size() + size_of::<Member>() as u64).sum();
        let of_table = self.table.as_ref().map_or(0, Table::size);
        Statistics {
            members: self.members.len() as u64,
            guest_pages: self.guest_pages,
            shared_pages: self.table.as_ref().map_or(0, |table| u64::from(table.in_use())),
            uses: self.table.as_ref().map_or(0, Table::uses),
            metadata_bytes: of_members + of_table + self.hints.size(),
            ..self.counts
        }
    }

    /// What is not as it must be: the pool against its table, and the table against what members use.
    #[must_use]
    pub fn audit(&self) -> Vec<String> {
        let Some(table) = &self.table else { return Vec::new() };
        let mut wrong = table.audit(self.seed);
        let uses: u64 =
            self.members.values().flat_map(|member| member.uses.all()).map(|(_, count)| u64::from(count)).sum();
        if uses != table.uses() {
            wrong.push(format!("members use shared pages {uses} times, and {} are counted", table.uses()));
        }
        wrong
    }
}
