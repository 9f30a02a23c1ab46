//! What a shard's links have done, counted by the shard's own thread.
//!
//! Plain numbers without atomics: a snapshot is copied out when status or metrics ask for one.

use kvar_base::{MissReason, PutOutcome, Refusal};
use kvar_wire::AttachDeclined;
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use std::ops::AddAssign;

/// Misses by reason; prints as a map of words to counts, zero ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Misses([u64; MissReason::ALL.len()]);

impl Misses {
    /// Counts one.
    pub fn add(&mut self, reason: MissReason) {
        self.0[reason as usize] += 1;
    }

    /// Each reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (MissReason, u64)> + '_ {
        MissReason::ALL
            .into_iter()
            .map(|reason| (reason, self.0[reason as usize]))
    }
}

impl AddAssign for Misses {
    fn add_assign(&mut self, other: Self) {
        self.0
            .iter_mut()
            .zip(other.0)
            .for_each(|(count, more)| *count += more);
    }
}

impl Serialize for Misses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(reason, count)| (reason.word(), count)))
    }
}

/// Clients with which no memory is shared although they asked, by reason; prints as a map of words
/// to counts, zero ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Declined([u64; AttachDeclined::ALL.len()]);

impl Declined {
    /// Counts one.
    pub fn add(&mut self, why: AttachDeclined) {
        self.0[why as usize] += 1;
    }

    /// Each reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (AttachDeclined, u64)> + '_ {
        AttachDeclined::ALL
            .into_iter()
            .map(|why| (why, self.0[why as usize]))
    }
}

impl AddAssign for Declined {
    fn add_assign(&mut self, other: Self) {
        self.0
            .iter_mut()
            .zip(other.0)
            .for_each(|(count, more)| *count += more);
    }
}

impl Serialize for Declined {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(why, count)| (why.word(), count)))
    }
}

/// Puts by outcome; prints as a map of words to counts, zero ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Puts {
    stored: u64,
    exists: u64,
    in_progress: u64,
    refused: [u64; Refusal::ALL.len()],
}

impl Puts {
    /// Counts one.
    pub fn add(&mut self, outcome: PutOutcome) {
        match outcome {
            PutOutcome::Stored => self.stored += 1,
            PutOutcome::Exists => self.exists += 1,
            PutOutcome::InProgress => self.in_progress += 1,
            PutOutcome::Refused(refusal) => self.refused[refusal as usize] += 1,
        }
    }

    /// Each outcome with its count.
    pub fn iter(&self) -> impl Iterator<Item = (PutOutcome, u64)> + '_ {
        let plain = [
            (PutOutcome::Stored, self.stored),
            (PutOutcome::Exists, self.exists),
            (PutOutcome::InProgress, self.in_progress),
        ];
        let refused = Refusal::ALL
            .into_iter()
            .map(|refusal| (PutOutcome::Refused(refusal), self.refused[refusal as usize]));
        plain.into_iter().chain(refused)
    }
}

impl AddAssign for Puts {
    fn add_assign(&mut self, other: Self) {
        self.stored += other.stored;
        self.exists += other.exists;
        self.in_progress += other.in_progress;
        self.refused
            .iter_mut()
            .zip(other.refused)
            .for_each(|(count, more)| *count += more);
    }
}

impl Serialize for Puts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (outcome, count) in self.iter() {
            map.serialize_entry(outcome.word(), &count)?;
        }
        map.end()
    }
}

/// Work that was dropped because nobody waited for it any more, by where it was found. (Engines count
/// what they find themselves.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overdue {
    /// Blocks in line for room in their link's budget.
    pub line: u64,
    /// Asks on their way to an engine.
    pub asked: u64,
    /// Answers whose bytes waited for a slow link.
    pub link: u64,
}

impl AddAssign for Overdue {
    fn add_assign(&mut self, other: Self) {
        self.line += other.line;
        self.asked += other.asked;
        self.link += other.link;
    }
}

/// What the links of a shard (or of all shards, summed) have done since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkCounters {
    /// Links open now.
    pub links_open: u64,
    /// Those of them that share memory with their client.
    pub links_shared: u64,
    /// Links accepted.
    pub links_accepted: u64,
    /// Links turned away because there were `connections_max`.
    pub links_refused: u64,
    /// Links that came to share memory.
    pub links_attached: u64,
    /// Clients that asked to share memory and do not, by reason; their links stayed on TCP.
    pub attach_declined: Declined,
    /// Memory of the staging regions of the links open now, in bytes.
    pub staging_bytes: u64,
    /// Clients that asked for a staging region and have none, by reason.
    pub stage_declined: Declined,
    /// Handshakes that failed: wrong key, version, namespace, or too slow.
    pub handshakes_failed: u64,
    /// Links closed because the peer broke the protocol.
    pub protocol_errors: u64,
    /// Lookup requests.
    pub lookups: u64,
    /// Ids looked up.
    pub lookup_ids: u64,
    /// Blocks served.
    pub get_hits: u64,
    /// Of the blocks (or parts of blocks) served, those that were written into a staging region.
    pub gets_placed: u64,
    /// Blocks asked for and not served, by reason.
    pub get_misses: Misses,
    /// Puts by outcome.
    pub puts: Puts,
    /// Remove requests.
    pub removes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Purge requests.
    pub purges: u64,
    /// Requests whose client no longer wanted the answer.
    pub cancels: u64,
    /// What was dropped because nobody waited for it any more, by where that was.
    pub overdue: Overdue,
    /// Payload bytes received.
    pub payload_bytes_in: u64,
    /// Payload bytes that have left on links.
    pub payload_bytes_out: u64,
}

impl AddAssign for LinkCounters {
    fn add_assign(&mut self, other: Self) {
        self.links_open += other.links_open;
        self.links_shared += other.links_shared;
        self.links_attached += other.links_attached;
        self.attach_declined += other.attach_declined;
        self.staging_bytes += other.staging_bytes;
        self.stage_declined += other.stage_declined;
        self.links_accepted += other.links_accepted;
        self.links_refused += other.links_refused;
        self.handshakes_failed += other.handshakes_failed;
        self.protocol_errors += other.protocol_errors;
        self.lookups += other.lookups;
        self.lookup_ids += other.lookup_ids;
        self.get_hits += other.get_hits;
        self.gets_placed += other.gets_placed;
        self.get_misses += other.get_misses;
        self.puts += other.puts;
        self.removes += other.removes;
        self.flushes += other.flushes;
        self.purges += other.purges;
        self.cancels += other.cancels;
        self.overdue += other.overdue;
        self.payload_bytes_in += other.payload_bytes_in;
        self.payload_bytes_out += other.payload_bytes_out;
    }
}

/// What was asked of one namespace since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NamespaceCounters {
    /// Blocks served.
    pub hits: u64,
    /// Blocks asked for and not served.
    pub misses: u64,
    /// Blocks stored.
    pub stored: u64,
    /// Lookups answered while the mode was not `load`.
    pub observed_lookups: u64,
    /// Leading blocks that these found: what would have been loaded.
    pub observed_blocks: u64,
}

impl AddAssign for NamespaceCounters {
    fn add_assign(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.stored += other.stored;
        self.observed_lookups += other.observed_lookups;
        self.observed_blocks += other.observed_blocks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_and_print_as_words() {
        let mut counters = LinkCounters::default();
        counters.get_misses.add(MissReason::Corrupt);
        counters.puts.add(PutOutcome::Stored);
        counters.puts.add(PutOutcome::Refused(Refusal::Busy));
        let mut sum = counters;
        sum += counters;
        let json = serde_json::to_value(sum).unwrap();
        assert_eq!(json["get_misses"]["corrupt"], 2);
        assert_eq!(json["get_misses"]["absent"], 0);
        assert_eq!(json["puts"]["stored"], 2);
        assert_eq!(json["puts"]["busy"], 2);
    }
}
