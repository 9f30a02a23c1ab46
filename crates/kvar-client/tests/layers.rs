//! Gets layer by layer against a node that may do anything: what was said to be there is there, is what
//! was written and of one version; what is missing is missing from there on; everything ends in time.
//! Puts layer by layer beside whole ones: each finds its room in the node's window, and holds up nobody.

mod peer;

use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_client::*;
use peer::{LIMITS, Mood, PATIENCE, Peer, SLACK, key, until};
use proptest::prelude::*;
use std::time::{Duration, Instant};

fn client(peer: &Peer) -> Client {
    let config = ClientConfig {
        deadline: PATIENCE,
        connect_timeout: Duration::from_secs(5),
        ..ClientConfig::new(&peer.address.to_string(), key())
    };
    Client::connect(config).unwrap()
}

fn id(n: u64) -> BlockId {
    BlockId::from_name(&key(), &n.to_string())
}

fn section(block: u64, section: usize, len: u32) -> Vec<u8> {
    let seed = block * 1000 + section as u64 + 1;
    let byte = |at: u64| (seed.wrapping_mul(at + 0x9e37_79b9) >> 7) as u8;
    (0..u64::from(len)).map(byte).collect()
}

/// Puts blocks `0..count`, each of sections of these lengths.
fn put(client: &Client, count: u64, lengths: &[u32]) {
    for block in 0..count {
        let bytes = (0..).zip(lengths).map(|(at, len)| section(block, at, *len));
        let item = PutItem::of_pieces(id(block), bytes.collect::<Vec<_>>());
        assert_eq!(client.put(vec![item]), [PutOutcome::Stored]);
    }
}

fn get(client: &Client, count: u64, lengths: &[u32], options: CallOptions) -> LayerGet {
    let items = (0..count).map(|block| LayerItem {
        depth: block as u32,
        ..LayerItem::to_vecs(id(block), lengths)
    });
    client.submit_get_layers(items.collect(), options)
}

/// Waits for every section in turn and compares what is said to be there; for each block how many
/// sections were.
fn read_all(layers: &LayerGet, lengths: &[u32]) -> Vec<(usize, Option<MissReason>)> {
    let mut found = vec![(0, None); layers.blocks()];
    let mut group = 0..0;
    for at in 0..lengths.len() {
        let misses = layers.wait_section(at, PATIENCE).expect("in time");
        assert!(layers.is_decided(at));
        for (block, miss) in misses.iter().enumerate() {
            match miss {
                None => {
                    assert_eq!(found[block], (at, None), "a miss is one from there on");
                    found[block].0 = at + 1;
                }
                Some(reason) => {
                    assert!(found[block].1.is_none_or(|before| before == *reason));
                    found[block].1 = Some(*reason);
                }
            }
        }
        if at < group.end {
            continue;
        }
        group = layers.group(at);
        let taken = layers.take_section(at).expect("decided, and not taken yet");
        assert!(layers.take_section(at).is_none(), "taken");
        for (block, pieces) in taken.iter().enumerate() {
            assert_eq!(pieces.len(), group.len());
            for (at, piece) in group.clone().zip(pieces) {
                let Filled::Bytes(bytes) = piece else {
                    panic!("{piece:?}")
                };
                if misses[block].is_none() {
                    assert!(
                        *bytes == section(block as u64, at, lengths[at]),
                        "block {block}, section {at}"
                    );
                }
            }
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn blocks_come_section_by_section_as_they_were_written(
        count in 0_u64..7,
        lengths in prop::collection::vec(
            prop_oneof![1_u32..2000, 30_000_u32..40_000, Just(65_536_u32)], 1..9),
        window in prop_oneof![Just(2_u32), Just(256_u32)],
    ) {
        let limits = kvar_wire::Limits { requests_max: window, ..LIMITS };
        let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
        let client = client(&peer);
        put(&client, count, &lengths);
        let layers = get(&client, count, &lengths, CallOptions::default());
        if count > 0 {
            prop_assert_eq!(layers.sections(), lengths.len());
            let found = read_all(&layers, &lengths);
            prop_assert_eq!(found, vec![(lengths.len(), None); count as usize]);
        }
        prop_assert_eq!(layers.finish(), vec![None; count as usize]);
        prop_assert_eq!(client.stats().hits, count, "a block is one hit");
        // All of a section was asked for before the next one of any block.
        let starts: Vec<u16> = peer.items().iter()
            .map(|(item, hints)| {
                assert!(hints.by_layer);
                item.sections.clone().unwrap().start
            })
            .collect();
        prop_assert!(starts.is_sorted());
    }
}

const LENGTHS: [u32; 6] = [65_536, 40_000, 65_536, 50_000, 32_768, 65_536];

#[test]
fn a_section_that_goes_wrong_on_its_way_ends_its_block_there_and_no_other() {
    let peer = Peer::start();
    let client = client(&peer);
    put(&client, 5, &LENGTHS);
    peer.spoil(id(2), 3);
    let layers = get(&client, 5, &LENGTHS, CallOptions::default());
    let found = read_all(&layers, &LENGTHS);
    for (block, found) in found.into_iter().enumerate() {
        let expected = match block {
            2 => (3, Some(MissReason::Corrupt)),
            _ => (6, None),
        };
        assert_eq!(found, expected, "block {block}");
    }
    let ends = layers.finish();
    assert_eq!(ends[2], Some((3, MissReason::Corrupt)));
    let stats = client.stats();
    assert_eq!((stats.hits, stats.checks_failed), (4, 1));
}

#[test]
fn two_versions_of_a_block_are_never_mixed() {
    for window in [1, 256] {
        let limits = kvar_wire::Limits {
            requests_max: window,
            ..LIMITS
        };
        let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
        let client = client(&peer);
        put(&client, 3, &LENGTHS);
        peer.tear(id(1), 2);
        let layers = get(&client, 3, &LENGTHS, CallOptions::default());
        let found = read_all(&layers, &LENGTHS);
        assert_eq!(found[1], (2, Some(MissReason::Version)), "window {window}");
        assert_eq!((found[0], found[2]), ((6, None), (6, None)));
        // Whole, but of another version than before, it is a block like any other.
        peer.tear(id(1), 0);
        let layers = get(&client, 3, &LENGTHS, CallOptions::default());
        assert_eq!(layers.finish(), [None; 3]);
        drop(client);
    }
}

#[test]
fn what_is_behind_a_miss_is_not_asked_for() {
    let limits = kvar_wire::Limits {
        requests_max: 1,
        ..LIMITS
    };
    let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
    let client = client(&peer);
    put(&client, 1, &LENGTHS);
    let layers = get(&client, 3, &LENGTHS, CallOptions::default());
    let found = read_all(&layers, &LENGTHS);
    let absent = (0, Some(MissReason::Absent));
    assert_eq!(found, [(6, None), absent, absent]);
    assert_eq!(peer.items().len(), 6 + 2);
    assert_eq!(layers.finish().len(), 3);
    assert_eq!(client.stats().misses["absent"], 2);
}

#[test]
fn blocks_of_another_shape_are_of_the_wrong_format_and_disturb_nobody() {
    let peer = Peer::start();
    let client = client(&peer);
    put(&client, 4, &LENGTHS);
    let items = vec![
        LayerItem::to_vecs(id(0), &LENGTHS),
        // Fewer sections, more, another length.
        LayerItem::to_vecs(id(1), &LENGTHS[..5]),
        LayerItem::to_vecs(id(2), &[&LENGTHS[..], &[1]].concat()),
        LayerItem::to_vecs(id(3), &[65_536, 40_000, 65_536, 50_001, 32_768, 65_536]),
    ];
    let layers = client.submit_get_layers(items, CallOptions::default());
    let ends = layers.finish();
    let wrong = |section| Some((section, MissReason::WrongFormat));
    assert_eq!(ends, [None, wrong(0), wrong(0), wrong(3)]);
    // No blocks.
    let layers = client.submit_get_layers(Vec::new(), CallOptions::default());
    assert_eq!(layers.wait_section(3, Duration::ZERO), Some(Vec::new()));
    assert!(layers.finish().is_empty());
}

/// Two blocks of no sections took the client's thread down, and with it every call of every clone.
#[test]
fn blocks_without_sections_are_of_the_wrong_format_and_the_client_lives_on() {
    let peer = Peer::start();
    let client = client(&peer);
    put(&client, 1, &LENGTHS);
    let wrong = Some((0, MissReason::WrongFormat));
    for count in 1..4 {
        let layers = get(&client, count, &[], CallOptions::default());
        assert_eq!((layers.sections(), layers.blocks()), (0, count as usize));
        let misses = layers.wait_all(PATIENCE).expect("in time");
        assert!(misses.iter().all(|it| *it == Some(MissReason::WrongFormat)));
        assert_eq!(layers.finish(), vec![wrong; count as usize]);
    }
    // The first says how many all have.
    let mixed = vec![
        LayerItem::to_vecs(id(1), &[]),
        LayerItem::to_vecs(id(0), &LENGTHS),
    ];
    let layers = client.submit_get_layers(mixed, CallOptions::default());
    assert_eq!(layers.finish(), [wrong; 2]);
    let mixed = vec![
        LayerItem::to_vecs(id(0), &LENGTHS),
        LayerItem::to_vecs(id(1), &[]),
    ];
    let layers = client.submit_get_layers(mixed, CallOptions::default());
    assert_eq!(layers.finish(), [None, wrong]);
    // Also where the call ends before it is sent, on the caller's own thread.
    let layers = get(&client, 2, &[], CallOptions::within(Duration::ZERO));
    assert_eq!(layers.finish(), [wrong; 2]);
    let stats = client.stats();
    assert_eq!(stats.hits, 1, "none of them is a hit");
    assert_eq!(stats.misses["wrong_format"], 1 + 2 + 3 + 2 + 1 + 2);
    assert_eq!(
        get(&client, 1, &LENGTHS, CallOptions::default()).finish(),
        [None]
    );
}

#[test]
fn a_node_that_dies_in_the_middle_leaves_what_came_and_ends_the_rest() {
    for after in [0, 1, 7, 13, 29] {
        let peer = Peer::start();
        let client = client(&peer);
        put(&client, 5, &LENGTHS);
        peer.die_after(after);
        let begun = Instant::now();
        let layers = get(&client, 5, &LENGTHS, CallOptions::default());
        let found = read_all(&layers, &LENGTHS);
        assert!(begun.elapsed() < PATIENCE / 2, "long before the deadline");
        let sections: usize = found.iter().map(|(sections, _)| sections).sum();
        assert_eq!(sections, after, "{found:?}");
        for (sections, reason) in found {
            let lost = Some(MissReason::Unreachable);
            assert_eq!(reason, lost.filter(|_| sections < 6));
        }
        // The last section is told before the call as a whole is over.
        until("the call is over", || layers.is_done());
    }
}

#[test]
fn every_section_is_decided_by_the_deadline_whatever_the_node_does() {
    let deadline = Duration::from_millis(150);
    std::thread::scope(|scope| {
        for mood in Mood::ILL {
            scope.spawn(move || {
                let peer = Peer::start();
                let client = client(&peer);
                put(&client, 3, &LENGTHS);
                peer.set(mood);
                for _ in 0..2 {
                    let begun = Instant::now();
                    let layers = get(&client, 3, &LENGTHS, CallOptions::within(deadline));
                    let found = read_all(&layers, &LENGTHS);
                    assert!(begun.elapsed() < deadline + SLACK, "{mood:?}");
                    assert!(found.iter().all(|(count, _)| *count == 0), "{mood:?}");
                    assert!(layers.finish().iter().all(Option::is_some));
                }
            });
        }
    });
}

#[test]
fn a_section_is_not_said_to_be_there_before_it_is() {
    let peer = Peer::start();
    let client = client(&peer);
    put(&client, 2, &LENGTHS);
    peer.set(Mood::Stopped);
    let layers = get(&client, 2, &LENGTHS, CallOptions::default());
    assert_eq!(layers.wait_section(0, Duration::from_millis(20)), None);
    assert_eq!(layers.take_section(0).map(drop), None);
    assert_eq!(layers.wait_all(Duration::ZERO), None);
    assert_eq!(layers.decided_at(0), None);
    peer.set(Mood::Well);
    assert_eq!(layers.wait_section(0, PATIENCE), Some(vec![None, None]));
    assert!(layers.decided_at(0).is_some());
    assert_eq!(layers.finish(), [None, None]);
}

#[test]
fn a_client_that_is_closed_decides_everything() {
    let peer = Peer::start();
    let client = client(&peer);
    put(&client, 2, &LENGTHS);
    peer.set(Mood::Mute);
    let layers = get(&client, 2, &LENGTHS, CallOptions::default());
    drop(client);
    let lost = Some((0, MissReason::Unreachable));
    assert_eq!(layers.finish(), [lost, lost]);
}

#[test]
fn an_older_node_is_told_nothing_it_does_not_know() {
    let peer = Peer::start();
    peer.grow_old(4);
    let client = client(&peer);
    put(&client, 2, &LENGTHS);
    let waiting = CallOptions {
        wait_announced: true,
        ..CallOptions::default()
    };
    let layers = get(&client, 2, &LENGTHS, waiting);
    assert_eq!(layers.finish(), [None, None]);
    let said = kvar_wire::GetHints::default();
    assert!(peer.items().iter().all(|(_, hints)| *hints == said));
    // Nor is a put by layers begun there.
    let item = LayerPutItem {
        id: id(9),
        lengths: vec![5],
        hints: PutHints::default(),
        durable: false,
    };
    let mut layers = client.put_layers(vec![item], CallOptions::default());
    layers.section(0, vec![Box::new(vec![1; 5])]).unwrap();
    let wrong = PutOutcome::Refused(kvar_base::Refusal::WrongFormat);
    assert_eq!(layers.commit().wait(), [wrong]);
}

// ---- puts ---------------------------------------------------------------------------------------

/// A node whose window is one of these.
fn peer_with(bytes_max: u64, requests_max: u32) -> Peer {
    let limits = kvar_wire::Limits {
        block_bytes_max: 1 << 20,
        bytes_max,
        requests_max,
        ..LIMITS
    };
    Peer::start_with("127.0.0.1:0".parse().unwrap(), limits)
}

/// Announces blocks of one section of this length.
fn announce(client: &Client, blocks: std::ops::Range<u64>, len: u32) -> LayerPut {
    let item = |block| LayerPutItem {
        id: id(block),
        lengths: vec![len],
        hints: PutHints::default(),
        durable: false,
    };
    client.put_layers(blocks.map(item).collect(), CallOptions::default())
}

/// Gives their sections and commits them.
fn finish(mut layers: LayerPut, blocks: std::ops::Range<u64>, len: u32) -> Vec<PutOutcome> {
    let source = |block| Box::new(section(block, 0, len)) as Box<dyn PutSource>;
    layers.section(0, blocks.map(source).collect()).unwrap();
    layers.commit().wait()
}

fn whole(client: &Client, blocks: std::ops::Range<u64>, len: u32) -> Pending<Vec<PutOutcome>> {
    let item = |block| PutItem::of_bytes(id(block), section(block, 0, len));
    let options = CallOptions::within(Duration::from_secs(10));
    client.submit_put(blocks.map(item).collect(), options)
}

/// When this returns, everything that was asked for before has been sent, or has found no room.
fn is_tried(client: &Client) {
    // A flush, since that it is not answered in time is held against no node.
    let options = CallOptions::within(Duration::from_millis(1));
    assert_eq!(client.flush(options), Err(ClientError::Deadline));
}

/// The deadline of the announcement holds while the writer computes; once it has committed it waits for
/// the node alone, and no longer than it says.
#[test]
fn a_commit_has_a_deadline_of_its_own() {
    let peer = peer_with(1 << 20, 256);
    let client = client(&peer);
    let item = LayerPutItem {
        id: id(1),
        lengths: vec![40_000],
        hints: PutHints::default(),
        durable: false,
    };
    let begun = Instant::now();
    let hour = CallOptions::within(Duration::from_secs(3600));
    let mut layers = client.put_layers(vec![item], hour);
    peer.set(Mood::Stopped);
    layers
        .section(0, vec![Box::new(section(1, 0, 40_000))])
        .unwrap();
    let late = PutOutcome::Refused(kvar_base::Refusal::Deadline);
    let outcomes = layers.commit_within(Duration::from_millis(50)).wait();
    assert_eq!(outcomes, [late]);
    assert!(begun.elapsed() < Duration::from_secs(600));
}

/// The node counts whole puts and puts by layers as one sum, and refuses what is beyond it at once.
#[test]
fn a_put_by_layers_beside_whole_puts_that_fill_the_window_waits_and_is_not_refused() {
    let peer = peer_with(1 << 20, 256);
    let client = client(&peer);
    peer.set(Mood::Stopped);
    let before = whole(&client, 0..8, 128 << 10);
    is_tried(&client);
    let layers = announce(&client, 8..9, 40_000);
    is_tried(&client);
    peer.set(Mood::Well);
    assert_eq!(finish(layers, 8..9, 40_000), [PutOutcome::Stored]);
    assert_eq!(before.wait(), [PutOutcome::Stored; 8]);
}

/// All puts stood in one queue: behind a put by layers of which the window takes only a part at a time
/// nobody else's left before the writer's commit, which may be a deadline away.
#[test]
fn whole_puts_and_gets_go_on_beside_puts_by_layers_that_wait_for_their_writer() {
    // Half of the window is 8 of these blocks by its bytes, or by its requests.
    for (bytes_max, requests_max) in [(1 << 20, 256), (64 << 20, 16)] {
        let peer = peer_with(bytes_max, requests_max);
        let client = client(&peer);
        let layers = announce(&client, 0..20, 64 << 10);
        let stored = [PutOutcome::Stored; 3];
        assert_eq!(whole(&client, 20..23, 100_000).wait(), stored);
        let got = client.get(vec![GetItem::to_vec(id(20))]);
        assert_eq!(got[0].miss(), None);
        assert!(!layers.is_done());
        assert_eq!(peer.puts().len(), 8 + 3, "the other announcements wait");
        assert_eq!(finish(layers, 0..20, 64 << 10), [PutOutcome::Stored; 20]);
    }
}

/// Whole puts pass a put by layers that waits for a writer, not one that waits for room: else a large
/// one would find none while small ones keep coming.
#[test]
fn whole_puts_do_not_take_the_room_that_an_announcement_waits_for() {
    let peer = peer_with(1 << 20, 256);
    let client = client(&peer);
    peer.set(Mood::Stopped);
    let before = whole(&client, 0..8, 128 << 10);
    is_tried(&client);
    let layers = announce(&client, 8..9, 300_000);
    let after = whole(&client, 9..12, 128 << 10);
    is_tried(&client);
    peer.set(Mood::Well);
    assert_eq!(finish(layers, 8..9, 300_000), [PutOutcome::Stored]);
    assert_eq!(before.wait(), [PutOutcome::Stored; 8]);
    assert_eq!(after.wait(), [PutOutcome::Stored; 3]);
    assert_eq!(peer.puts(), (0..12).map(id).collect::<Vec<_>>());
}
