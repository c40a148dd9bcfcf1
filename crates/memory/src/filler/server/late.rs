//! Pages that come while the processes run already: faults on them wait, and each is put in as it comes.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

use super::super::view::Extent;
use super::{FillError, Result, STEP_BYTES, Server};
use crate::late::Awaited;
use crate::pages::PageRange;
use crate::store::Key;

/// Late pages, and who waits for them.
pub(super) struct Waiting {
    awaited: Arc<Awaited>,
    /// Address spaces and the pages in them that somebody waits for; at most one for each thread.
    faults: RefCell<Vec<Fault>>,
    /// Pages that were asked for.
    asked: RefCell<HashSet<(Key, u64)>>,
}

struct Fault {
    space: u64,
    address: u64,
    key: Key,
    page: PageRange,
}

impl Waiting {
    pub(super) fn new(awaited: Arc<Awaited>) -> Self {
        Self { awaited, faults: RefCell::default(), asked: RefCell::default() }
    }

    /// Whether what belongs at `address`, where `extent` begins, has not come yet. The fault is remembered, and the page
    /// asked for, then.
    pub(super) fn awaits(&self, space: u64, address: u64, extent: &Extent) -> bool {
        let key = extent.source.key;
        let page = super::super::view::page_at(extent.offset);
        if self.awaited.first(key, page).is_none() {
            return false;
        }
        self.faults.borrow_mut().push(Fault { space, address, key, page });
        if self.asked.borrow_mut().insert((key, page.start)) {
            // If nobody hears it, nothing comes any more, which the receiving thread tells.
            let _ = self.awaited.want(key, page.start);
        }
        true
    }

    /// The first part of a source within a range that has not come yet.
    pub(super) fn first(&self, key: Key, within: PageRange) -> Option<PageRange> {
        self.awaited.first(key, within)
    }

    pub(super) fn has_arrived(&self) -> bool {
        self.awaited.has_arrived()
    }

    /// Faults whose pages have come.
    fn served(&self) -> Vec<Fault> {
        let mut faults = self.faults.borrow_mut();
        faults.extract_if(.., |fault| self.awaited.first(fault.key, fault.page).is_none()).collect()
    }
}

impl Server {
    /// Answers who waited for what has come, and puts in some of it. Forgets late pages once there are none.
    pub(super) fn take_late(&mut self, held: bool) -> Result<()> {
        let Some(late) = &self.late else { return Ok(()) };
        let over = late.awaited.is_over().map_err(FillError::Late)?;
        let (awaited, served) = (Arc::clone(&late.awaited), late.served());
        for Fault { space, address, .. } in served {
            self.serve_fault(space, address)?;
        }
        let mut left = if held || !self.placed { 0 } else { STEP_BYTES };
        while left > 0
            && let Some((key, part)) = awaited.next_arrived()
        {
            if !self.put_in(key, part)? {
                // An address space is being changed; it is told next.
                awaited.again(key, part);
                break;
            }
            left = left.saturating_sub(part.bytes());
        }
        if over {
            self.late = None;
        }
        Ok(())
    }
}
