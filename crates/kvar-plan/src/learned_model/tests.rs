//! The learned model on rows of requests short enough to follow by hand.
//!
//! What must always be true: what it counts as a hit was put before and not given up since, and
//! memory, flash and ghosts stay within the capacity they were given.

use super::*;

/// Three segments of four blocks each.
const SHAPE: FlashShape = FlashShape {
    segments: 3,
    blocks_per_segment: 4,
    block_bytes: 64 << 10,
};

fn store(dram_blocks: u64, admit: Admit) -> LearnedModel {
    LearnedModel::new(10_000, dram_blocks, SHAPE, admit)
}

/// One request: looks all of it up, puts what is missing.
fn ask(store: &mut LearnedModel, blocks: std::ops::Range<u32>, request: u64) -> usize {
    let blocks: Vec<u32> = blocks.collect();
    let hits = store.lookup(&blocks, request);
    store.put(&blocks[hits..], hits, request);
    hits
}

/// Every block is where the model thinks, once, and no more than fit.
fn check(store: &LearnedModel) {
    let lengths = store.orders.iter();
    let dram: usize = lengths.map(|it| it.unwritten.len() + it.copies.len()).sum();
    assert!(dram as u64 <= store.dram_blocks && dram as u64 == store.dram_len());
    for (number, block) in (0..).zip(&store.blocks) {
        let on_flash = block.segment != NOWHERE;
        let orders = &store.orders[store.tenant(number).index()];
        assert_eq!(orders.copies.contains(&number), block.in_dram && on_flash);
        assert_eq!(
            orders.unwritten.contains(&number),
            block.in_dram && !on_flash
        );
        if on_flash {
            let segment = &store.segments[(block.segment - store.oldest) as usize];
            assert!(segment.blocks.contains(&number));
        }
    }
    for segment in &store.segments {
        assert!(segment.blocks.len() as u64 <= SHAPE.blocks_per_segment);
    }
    assert!(store.segments.len() as u64 <= SHAPE.segments);
}

#[test]
fn what_fits_memory_is_never_written() {
    let mut store = store(8, Admit::ByWorth);
    for request in 0..50 {
        assert_eq!(
            ask(&mut store, 0..8, request),
            if request == 0 { 0 } else { 8 }
        );
    }
    check(&store);
    assert_eq!(store.writes(), Writes { put: 0, again: 0 });
}

#[test]
fn dram_and_flash_together_hold_their_sum() {
    let mut store = store(4, Admit::ByWorth);
    for chain in 0..4 {
        ask(&mut store, chain * 10..chain * 10 + 4, u64::from(chain));
    }
    check(&store);
    // Three chains fill the flash, the last is in memory alone.
    let found: usize = (0..4)
        .map(|chain| {
            ask(
                &mut store,
                chain * 10..chain * 10 + 4,
                100 + u64::from(chain),
            )
        })
        .sum();
    assert_eq!(found, 16);
    check(&store);
}

#[test]
fn a_chain_is_written_whole_once_its_tail_is() {
    let mut store = store(6, Admit::ByWorth);
    ask(&mut store, 0..6, 1);
    ask(&mut store, 10..11, 2);
    assert_eq!(store.writes().put, 6);
    check(&store);
}

#[test]
fn admit_all_writes_every_block_at_its_put() {
    let mut store = store(4, Admit::All);
    for request in 0..20_u32 {
        ask(
            &mut store,
            request * 10..request * 10 + 3,
            u64::from(request),
        );
        check(&store);
    }
    assert_eq!(store.writes().put, 60);
}

#[test]
fn a_loop_that_does_not_fit_is_hit_in_part() {
    // Ten chains in turn, four of which fit: LRU hits none of them.
    let mut store = store(4, Admit::ByWorth);
    let (mut hits, rounds) = (0, 400);
    for request in 0..rounds * 10_u32 {
        let chain = request % 10;
        let found = ask(&mut store, chain * 10..chain * 10 + 4, u64::from(request));
        if request >= rounds * 5 {
            hits += found;
        }
    }
    check(&store);
    let rate = hits as f64 / f64::from(rounds * 5 * 4);
    assert!(rate > 0.05, "{rate}; LRU has none");
}

#[test]
fn blocks_as_large_as_segments_are_no_trouble() {
    let shape = FlashShape {
        segments: 2,
        blocks_per_segment: 1,
        block_bytes: 16 << 20,
    };
    let mut store = LearnedModel::new(1000, 1, shape, Admit::ByWorth);
    for request in 0..500_u32 {
        ask(
            &mut store,
            request % 7 * 10..request % 7 * 10 + 2,
            u64::from(request),
        );
    }
}

/// Prompts that come back twice, after more than memory holds, and make way to new ones; among twice
/// as many of the same length that never come back, and would fill flash in a few rounds.
#[test]
fn a_kind_that_never_returns_is_kept_out_where_it_is_named() {
    let shape = FlashShape {
        segments: 20,
        blocks_per_segment: 60,
        ..SHAPE
    };
    let hits_and_writes = |names: [u8; 2]| {
        let mut store = LearnedModel::new(100_000, 100, shape, Admit::ByWorth);
        let (mut request, mut hits, mut stranger) = (0, 0, 10_000);
        for round in 0..40 {
            for prompt in 0..30 {
                store.set_traffic_class(names[0]);
                let first = (round * 10 + prompt) * 5;
                let found = ask(&mut store, first..first + 5, request);
                hits += if round >= 20 { found } else { 0 };
                store.set_traffic_class(names[1]);
                for other in 1..=2 {
                    ask(&mut store, stranger..stranger + 5, request + other);
                    stranger += 5;
                }
                request += 3;
            }
        }
        (hits, store.writes().put + store.writes().again)
    };
    let (hits, writes) = hits_and_writes([0, 0]);
    let (named_hits, named_writes) = hits_and_writes([1, 2]);
    assert!(named_hits * 2 > hits * 3, "{named_hits} {hits}");
    assert!(named_writes * 4 < writes * 3, "{named_writes} {writes}");
    // One name for all is no name.
    assert_eq!((hits, writes), hits_and_writes([2, 2]));
}
