//! A put's destination as a sink: payload is received straight into the owner's memory, each
//! section where it will be stored.

use crate::mail::Ticket;
use kvar_transport::Sink;
use std::ops::Range;

/// A ticket that a link is receiving into, and which of its sections come.
#[derive(Debug)]
pub(crate) struct Filling(pub(crate) Ticket, Range<usize>);

impl Filling {
    /// All of the block.
    pub(crate) fn whole(ticket: Ticket) -> Self {
        let all = 0..ticket.ticket.sections();
        Self(ticket, all)
    }

    /// Some of its sections.
    pub(crate) fn sections(ticket: Ticket, sections: Range<usize>) -> Self {
        Self(ticket, sections)
    }
}

impl Sink for Filling {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        let ticket = &mut self.0.ticket;
        // One section is by far the usual case; it needs no list.
        let ranges: smallvec::SmallVec<[_; 4]> = self
            .1
            .clone()
            .map(|section| ticket.section_range(section))
            .collect();
        let (mut rest, mut at) = (ticket.buffer_mut(), 0);
        for range in ranges {
            let (piece, after) = rest
                .split_at_mut(range.start - at)
                .1
                .split_at_mut(range.len());
            visit(piece);
            (rest, at) = (after, range.end);
        }
    }

    fn len(&self) -> usize {
        let ticket = &self.0.ticket;
        let length = |section| ticket.section_range(section).len();
        self.1.clone().map(length).sum()
    }
}
