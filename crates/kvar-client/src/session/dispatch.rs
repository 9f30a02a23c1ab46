//! Sending what waits, as far as the node's window allows.

use super::{Session, Unit};
use crate::call::{Ask, Board, Call, Owed, Reply, Work};
use crate::connection::{Connection, Open, Phase};
use crate::layer_put::ANNOUNCED_SHARE;
use crate::session::links::Slot;
use kvar_base::{Moment, PutOutcome, Refusal};
use kvar_transport::{SendRefused, Sink};
use kvar_wire::{
    Announce, Flush, Get, GetHints, GetItem, IDS_MAX, ITEMS_MAX, Lease, Lengths, Limits, Lookup,
    MESSAGE_BYTES_MAX, MoreHints, Purge, Put, PutHints, Release, ReleaseAnswer, Remove, Renew,
    RenewAnswer, Stat, Status,
};
use std::collections::VecDeque;
use std::time::Duration;

/// Bytes of one get item on the wire without its list of lengths, and of one length, at most.
const ITEM_BYTES_MAX: usize = 96;
const LENGTH_BYTES_MAX: usize = 5;

/// The call of requests whose answer nobody waits for; calls are numbered from 1.
const NOBODY: u64 = 0;

/// What became of an attempt to send.
enum Sent {
    /// All of the unit.
    All,
    /// Some of it, or nothing: the window is full.
    Full,
    /// The same, but it is the part for puts that wait for their writers that is full.
    Held,
}

impl Session {
    /// Sends what waits; whether anything left.
    pub(super) fn dispatch(&mut self, now: Moment) -> bool {
        self.pay(now);
        let mut small = std::mem::take(&mut self.queues.small);
        let next = std::mem::take(&mut self.board.next_parts);
        small.extend(next.into_iter().map(|(call, next)| Unit {
            call,
            next,
            end: next + 1,
        }));
        let mut gets = std::mem::take(&mut self.queues.gets);
        let mut layer_puts = std::mem::take(&mut self.queues.layer_puts);
        let mut puts = std::mem::take(&mut self.queues.puts);
        let mut any = false;
        for queue in [&mut small, &mut gets] {
            any |= self.send_queue(queue, now).0;
        }
        let (left, ended) = self.send_queue(&mut layer_puts, now);
        any |= left;
        // Whole puts pass those that wait for a writer, but not those that wait for room: small ones
        // would take it piece by piece, and a large announcement would never find any.
        if !matches!(ended, Sent::Full) {
            any |= self.send_queue(&mut puts, now).0;
        }
        self.queues = super::Queues {
            small,
            gets,
            layer_puts,
            puts,
        };
        any
    }

    /// Ends leases of which the answer never came; who asked for them has been told that there is
    /// none. They wait for a link as long as the node would hold them; one that breaks before the node
    /// has answered is followed by another.
    fn pay(&mut self, now: Moment) {
        while let Some(owed) = self.board.owed.front().copied() {
            let Owed { token, until, link } = owed;
            let left = until.since(now);
            if left.is_zero() {
                self.board.owed.pop_front();
                continue;
            }
            let Some(connection) = the_same_or_widest(&mut self.slots, link) else {
                return;
            };
            let deadline_us = u64::try_from(left.as_micros()).unwrap_or(u64::MAX);
            let request = self.next_number;
            let release = Release { token, deadline_us };
            if connection.leases() {
                if connection.send(request, &release).is_err() {
                    return;
                }
                self.next_number += 1;
                connection.requests_open += 1;
                self.board.paying.insert(request, owed);
                let (call, part) = (NOBODY, 0);
                connection.open.insert(request, Open::Small { call, part });
            }
            self.board.owed.pop_front();
        }
    }

    /// Sends of a queue what can be sent: whether anything left, and why no more.
    fn send_queue(&mut self, queue: &mut VecDeque<Unit>, now: Moment) -> (bool, Sent) {
        let mut any = false;
        while let Some(unit) = queue.front_mut() {
            let Some(call) = self.board.calls.get_mut(&unit.call) else {
                queue.pop_front();
                continue;
            };
            let link = staged_over(&self.slots, unit, call);
            let Some(connection) = the_same_or_widest(&mut self.slots, link) else {
                return (any, Sent::Full);
            };
            let Some(limits) = connection.limits().copied() else {
                return (any, Sent::Full);
            };
            let (ticket, requests_before) = (unit.call, connection.requests_open);
            let deadline_us =
                u64::try_from(call.deadline.since(now).as_micros()).unwrap_or(u64::MAX);
            let mut number = || {
                self.next_number += 1;
                self.next_number - 1
            };
            let sent = match &call.work {
                Work::Small { ask, .. } if !connection.leases() && ask.is_about_a_lease() => {
                    // There is none on a node that gives none.
                    let (call, part, reply) = (unit.call, unit.next, no_lease(ask));
                    self.board.end_small(call, part, reply);
                    Sent::All
                }
                Work::Small { .. } => send_small(connection, unit, call, deadline_us, number()),
                Work::Get { .. } => {
                    send_gets(connection, &limits, unit, call, deadline_us, &mut number)
                }
                Work::Put { .. } => {
                    let board = &mut self.board;
                    send_puts(connection, &limits, unit, board, deadline_us, &mut number)
                }
            };
            // What the window has no room for has not left, and nobody was told of it.
            if connection.requests_open > requests_before {
                any = true;
                if let Some(call) = self.board.calls.get_mut(&ticket) {
                    call.sent.get_or_insert(now);
                    call.link = Some(connection.serial);
                }
            }
            match sent {
                Sent::All => drop(queue.pop_front()),
                Sent::Full | Sent::Held => return (any, sent),
            }
        }
        (any, Sent::All)
    }
}

/// The link over which the node can write the next of these blocks where it is wanted, if there is one.
fn staged_over(slots: &[Slot], unit: &Unit, call: &Call) -> Option<u64> {
    let Work::Get { slots: items, .. } = &call.work else {
        return None;
    };
    let into = &items.get(unit.next)?.item.into;
    let mut links = slots.iter().filter_map(Slot::connection);
    links
        .find(|link| link.slot_of(into).is_some())
        .map(|link| link.serial)
}

/// A link while it stands and its window is not full; once it is gone any other.
fn the_same_or_widest(slots: &mut [Slot], link: Option<u64>) -> Option<&mut Connection> {
    let stands = |slot: &Slot| {
        let connection = slot.connection();
        connection.is_some_and(|it| Some(it.serial) == link)
    };
    match slots.iter().position(stands) {
        Some(at) => widest(&mut slots[at..=at]),
        None => widest(slots),
    }
}

/// The open connection with the least under way, if its window is not full.
fn widest(slots: &mut [Slot]) -> Option<&mut Connection> {
    slots
        .iter_mut()
        .filter_map(|slot| match slot {
            Slot::Linked(connection) => match &connection.phase {
                Phase::Open(limits) if connection.fault.is_none() => {
                    let room = connection.requests_open < u64::from(limits.requests_max);
                    room.then_some(connection)
                }
                _ => None,
            },
            _ => None,
        })
        .min_by_key(|connection| (connection.bytes_open, connection.requests_open))
}

/// A time to live as the wire has it: at least 1, since 0 leaves it to the node.
fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX).max(1)
}

/// What a node that knows no leases would say of one.
fn no_lease(ask: &Ask) -> Reply {
    Reply::Message(match ask {
        Ask::Renew { .. } => RenewAnswer { lasts_ms: 0 }.into(),
        _ => ReleaseAnswer { released: false }.into(),
    })
}

fn send_small(
    connection: &mut Connection,
    unit: &Unit,
    call: &Call,
    deadline_us: u64,
    request: u64,
) -> Sent {
    let Work::Small { ask, .. } = &call.work else {
        return Sent::All;
    };
    let part = unit.next;
    let first = part * IDS_MAX;
    let chunk = |ids: &[_]| ids[first..ids.len().min(first + IDS_MAX)].to_vec();
    let result: Result<(), SendRefused> = match ask {
        Ask::Lookup {
            ids,
            first_depth,
            touch_request,
        } => {
            let first_depth = first_depth.saturating_add(u32::try_from(first).unwrap_or(u32::MAX));
            let (ids, touch_request) = (chunk(ids), *touch_request);
            let body = Lookup {
                ids,
                leading_only: true,
                first_depth,
                touch_request,
                deadline_us,
            };
            connection.send(request, &body)
        }
        Ask::Lease {
            ids,
            first_depth,
            touch_request,
            token,
            client,
            ttl,
        } => {
            let first_depth = first_depth.saturating_add(u32::try_from(first).unwrap_or(u32::MAX));
            let (ids, touch_request) = (chunk(ids), *touch_request);
            if connection.leases() {
                let body = Lease {
                    ids,
                    first_depth,
                    touch_request,
                    token: *token,
                    client: *client,
                    ttl_ms: milliseconds(*ttl),
                    deadline_us,
                };
                connection.send(request, &body)
            } else {
                let body = Lookup {
                    ids,
                    leading_only: true,
                    first_depth,
                    touch_request,
                    deadline_us,
                };
                connection.send(request, &body)
            }
        }
        Ask::Renew { token, ttl } => connection.send(
            request,
            &Renew {
                token: *token,
                ttl_ms: milliseconds(*ttl),
                deadline_us,
            },
        ),
        Ask::Release { token } => connection.send(
            request,
            &Release {
                token: *token,
                deadline_us,
            },
        ),
        Ask::Present { ids } => {
            let (ids, leading_only) = (chunk(ids), false);
            let (first_depth, touch_request) = (0, 0);
            let body = Lookup {
                ids,
                leading_only,
                first_depth,
                touch_request,
                deadline_us,
            };
            connection.send(request, &body)
        }
        Ask::Remove { ids } => connection.send(
            request,
            &Remove {
                ids: chunk(ids),
                deadline_us,
            },
        ),
        Ask::Flush => connection.send(request, &Flush { deadline_us }),
        Ask::Purge => connection.send(request, &Purge { deadline_us }),
        Ask::Stat { id } => connection.send(
            request,
            &Stat {
                id: *id,
                deadline_us,
            },
        ),
        Ask::Status => connection.send(request, &Status {}),
    };
    if result.is_err() {
        return Sent::Full;
    }
    connection.requests_open += 1;
    connection.open.insert(
        request,
        Open::Small {
            call: unit.call,
            part,
        },
    );
    Sent::All
}

fn send_gets(
    connection: &mut Connection,
    limits: &Limits,
    unit: &mut Unit,
    call: &mut Call,
    deadline_us: u64,
    number: &mut dyn FnMut() -> u64,
) -> Sent {
    let Work::Get {
        slots,
        touch_request,
        waits,
        layers,
    } = &mut call.work
    else {
        return Sent::All;
    };
    let hints = GetHints {
        by_layer: layers.is_some(),
        wait_announced: *waits,
    };
    let hints = hints.for_version(connection.version);
    while unit.next < unit.end {
        // Items that ended before they were sent (not sound) are stepped over.
        if slots[unit.next].outcome.is_some() {
            unit.next += 1;
            continue;
        }
        let (first, mut message_bytes, mut bytes) = (unit.next, 0, 0);
        let mut items = Vec::new();
        while unit.next < unit.end && items.len() < ITEMS_MAX {
            let slot = &mut slots[unit.next];
            if slot.outcome.is_some() {
                break;
            }
            slot.cost = cost(&slot.item, limits);
            let listed = match &slot.item.expected {
                Lengths::Each(lengths) => lengths.len(),
                Lengths::Any | Lengths::Equal(..) => 0,
            };
            message_bytes += ITEM_BYTES_MAX + listed * LENGTH_BYTES_MAX;
            let requests = connection.requests_open + items.len() as u64;
            let window_bytes = connection.bytes_open + bytes;
            let fits = requests < u64::from(limits.requests_max)
                && (window_bytes == 0 || window_bytes + slot.cost <= limits.bytes_max)
                && (items.is_empty() || message_bytes < MESSAGE_BYTES_MAX);
            if !fits {
                break;
            }
            bytes += slot.cost;
            items.push(GetItem {
                id: slot.item.id,
                sections: slot.item.sections.clone(),
                expected: slot.item.expected.clone(),
                version: slot.item.version,
                depth: slot.item.depth,
                slot: connection.slot_of(&slot.item.into),
            });
            unit.next += 1;
        }
        if items.is_empty() {
            return Sent::Full;
        }
        let (request, count) = (number(), items.len());
        let body = Get {
            items: items.into(),
            touch_request: *touch_request,
            deadline_us,
            hints,
        };
        if connection.send(request, &body).is_err() {
            unit.next = first;
            return Sent::Full;
        }
        for slot in &mut slots[first..unit.next] {
            slot.is_sent = true;
            slot.is_placed = connection.slot_of(&slot.item.into).is_some();
        }
        connection.requests_open += count as u64;
        connection.bytes_open += bytes;
        connection.open.insert(
            request,
            Open::Get {
                call: unit.call,
                first,
                count,
                left: count,
            },
        );
    }
    Sent::All
}

/// What an item takes of the node's window: its length, or where nobody knows it yet the length
/// of an eager block, by agreement.
fn cost(item: &crate::items::GetItem, limits: &Limits) -> u64 {
    let place = Sink::len(&item.into) as u64;
    let bytes = match &item.expected {
        Lengths::Any if place == 0 => u64::from(limits.eager_bytes_max),
        Lengths::Any => place,
        Lengths::Equal(count, len) => u64::from(*count) * u64::from(*len),
        Lengths::Each(lengths) => lengths.iter().map(|len| u64::from(*len)).sum(),
    };
    bytes.min(limits.bytes_max)
}

fn send_puts(
    connection: &mut Connection,
    limits: &Limits,
    unit: &mut Unit,
    board: &mut Board,
    deadline_us: u64,
    number: &mut dyn FnMut() -> u64,
) -> Sent {
    let version = connection.version;
    while unit.next < unit.end {
        let item = unit.next;
        // The last item to end takes the call off the board.
        let Some(slot) = board.put_slot(unit.call, item) else {
            return Sent::All;
        };
        if slot.outcome.is_some() {
            unit.next += 1;
            continue;
        }
        let bytes = slot.put.bytes;
        if bytes > u64::from(limits.block_bytes_max) {
            unit.next += 1;
            board.end_put(unit.call, item, PutOutcome::Refused(Refusal::TooBig));
            continue;
        }
        if slot.layers.is_some() {
            match announce(connection, limits, unit, board, deadline_us, number) {
                Sent::All => continue,
                full => return full,
            }
        }
        // The node counts what was announced and waits for its writer like any other put.
        let open = connection.bytes_open + connection.announced_open;
        let fits = connection.requests_open < u64::from(limits.requests_max)
            && (open == 0 || open + bytes <= limits.bytes_max);
        if !fits {
            return Sent::Full;
        }
        let put = &mut slot.put;
        let body = Put {
            id: put.id,
            sections: std::mem::take(&mut put.sections),
            hints: put.hints.for_version(version),
            durable: put.durable,
            deadline_us,
        };
        let request = number();
        let eager = bytes <= u64::from(limits.eager_bytes_max);
        let sent = match put.source.take() {
            Some(source) if eager => connection
                .push(request, &body, source)
                .map_err(|source| put.source = Some(source)),
            source => {
                put.source = source;
                connection.send(request, &body).map_err(drop)
            }
        };
        if sent.is_err() {
            put.sections = body.sections;
            return Sent::Full;
        }
        unit.next += 1;
        connection.requests_open += 1;
        connection.bytes_open += bytes;
        connection.open.insert(
            request,
            Open::Put {
                call: unit.call,
                item,
            },
        );
    }
    Sent::All
}

/// Announces the next block of a put by layers.
fn announce(
    connection: &mut Connection,
    limits: &Limits,
    unit: &mut Unit,
    board: &mut Board,
    deadline_us: u64,
    number: &mut dyn FnMut() -> u64,
) -> Sent {
    let (call, item) = (unit.call, unit.next);
    if connection.version < kvar_wire::VERSION_WITH_LAYERS {
        unit.next += 1;
        board.end_put(call, item, PutOutcome::Refused(Refusal::WrongFormat));
        return Sent::All;
    }
    let Some(slot) = board.put_slot(call, item) else {
        return Sent::All;
    };
    let (put, Some(layers)) = (&slot.put, &mut slot.layers) else {
        return Sent::All;
    };
    let (announced, requests_max) = (connection.announced_open, u64::from(limits.requests_max));
    let has_share = announced == 0
        || (announced + put.bytes <= limits.bytes_max / ANNOUNCED_SHARE
            && connection.announced_requests < requests_max / ANNOUNCED_SHARE);
    if !has_share {
        return Sent::Held;
    }
    // The node counts whole puts and these as one sum.
    let open = connection.bytes_open + announced;
    let fits = connection.requests_open < requests_max
        && (open == 0 || open + put.bytes <= limits.bytes_max);
    if !fits {
        return Sent::Full;
    }
    let PutHints {
        traffic_class,
        recompute_us,
        handover,
        ..
    } = put.hints;
    let body = Announce {
        id: put.id,
        lengths: layers.lengths.clone(),
        hints: put.hints,
        more_hints: MoreHints {
            traffic_class,
            recompute_us,
            handover,
        },
        durable: put.durable,
        deadline_us,
    };
    let request = number();
    if connection.send(request, &body).is_err() {
        return Sent::Full;
    }
    layers.announced = Some((connection.serial, request));
    connection.requests_open += 1;
    connection.announced_requests += 1;
    connection.announced_open += put.bytes;
    unit.next += 1;
    connection.open.insert(request, Open::Put { call, item });
    Sent::All
}
