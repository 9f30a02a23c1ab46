//! `kvar bench layers`: how long an engine would wait before each layer of a prompt that it loads layer
//! by layer.
//!
//! ```text
//!   load    layer 0 | layer 1 | layer 2 | ...              of all blocks, in this order
//!   engine  wait 0 | compute | wait 1 | compute | ...      compute: assumed, a sleep of that long
//! ```
//!
//! The wait before layer 0 is the price of beginning; what is waited before the others is load that
//! the compute did not hide. With a compute of 0 it is how the layers come at full speed.
//!
//! Left to others: what a real engine computes in that time, and on which core.

use super::load::Random;
use crate::arguments::NodeArguments;
use crate::connect::connect;
use crate::failure::Failure;
use hdrhistogram::Histogram;
use kvar_base::{BlockId, PutOutcome};
use kvar_client::{CallOptions, Client, LayerItem, PutItem};
use serde::Serialize;
use std::time::{Duration, Instant};

/// A load that takes longer than this is not one that anybody waits for.
const DEADLINE: Duration = Duration::from_secs(10);

/// The largest block there is.
const BLOCK_BYTES_MAX: usize = 16 << 20;

/// What to load, and what to assume.
pub(crate) struct Settings {
    pub(crate) node: NodeArguments,
    pub(crate) blocks: u64,
    pub(crate) layers: usize,
    pub(crate) section_bytes: usize,
    pub(crate) compute: Duration,
    pub(crate) rounds: u64,
}

/// What was found; times in microseconds.
#[derive(Serialize)]
pub(crate) struct Found {
    blocks: u64,
    layers: usize,
    section_bytes: usize,
    rounds: u64,
    link: &'static str,
    /// As assumed, and as it was: a sleep is never exact.
    compute_us: f64,
    compute_p50_us: f64,
    /// From the call until the last layer was there.
    load_p50_us: f64,
    /// Bytes a second of that.
    load_bytes_per_s: f64,
    /// What the engine waited in all, before the first layer and before the others.
    first_wait_p50_us: f64,
    later_waits_p50_us: f64,
    /// Share of the load that the engine did not wait for.
    hidden: f64,
    by_layer: Vec<Layer>,
}

/// The wait before one layer.
#[derive(Serialize)]
struct Layer {
    wait_p50_us: f64,
    wait_p99_us: f64,
}

/// Puts the blocks and loads them so many times.
pub(crate) fn run(settings: &Settings) -> Result<Found, Failure> {
    let block_bytes = settings.section_bytes.saturating_mul(settings.layers);
    if !(1..=BLOCK_BYTES_MAX).contains(&block_bytes) {
        return Err(Failure::usage(format!(
            "{} layers of {} bytes make a block of {block_bytes}; a block has 1 byte to 16 MiB",
            settings.layers, settings.section_bytes
        )));
    }
    let connected = connect(&settings.node)?;
    let client = &connected.client;
    let name = |number: u64| {
        let Settings {
            layers,
            section_bytes,
            ..
        } = settings;
        let name = format!("bench layers {layers} x {section_bytes} {number}");
        BlockId::from_name(&connected.key, &name)
    };
    fill(client, settings, name)?;
    let layers = settings.layers;
    let mut waits: Vec<Histogram<u64>> = (0..layers).map(|_| times()).collect();
    let mut computes = times();
    let (mut loads, mut firsts, mut laters) = (times(), times(), times());
    let lengths = vec![settings.section_bytes as u32; layers];
    for round in 0..=settings.rounds {
        let items = (0..settings.blocks).map(|block| LayerItem::to_vecs(name(block), &lengths));
        let items: Vec<LayerItem> = items.collect();
        let options = CallOptions {
            touch_request: round + 1,
            ..CallOptions::within(DEADLINE)
        };
        let begun = Instant::now();
        let get = client.submit_get_layers(items, options);
        let (mut first, mut later) = (Duration::ZERO, Duration::ZERO);
        for (layer, waits) in waits.iter_mut().enumerate() {
            let begun = Instant::now();
            let misses = get.wait_section(layer, DEADLINE * 2);
            let waited = begun.elapsed();
            let reason = misses.map(|misses| misses.into_iter().flatten().next());
            match reason {
                Some(None) => {}
                Some(Some(reason)) => {
                    return Err(Failure::failed(format!(
                        "a block that was put is a miss ({}) at layer {layer}; give the node more \
                         memory, or the bench fewer blocks",
                        reason.word()
                    )));
                }
                None => return Err(Failure::failed("the client did not end its call")),
            }
            // The first round only warms up.
            if round > 0 {
                waits.saturating_record(nanoseconds(waited));
            }
            if layer == 0 {
                first = waited;
            } else {
                later += waited;
            }
            if !settings.compute.is_zero() && layer + 1 < layers {
                let begun = Instant::now();
                std::thread::sleep(settings.compute);
                computes.saturating_record(nanoseconds(begun.elapsed()));
            }
        }
        let came = get.decided_at(layers - 1).unwrap_or(begun);
        if round > 0 {
            loads.saturating_record(nanoseconds(came.saturating_duration_since(begun)));
            firsts.saturating_record(nanoseconds(first));
            laters.saturating_record(nanoseconds(later));
        }
    }
    let median = |histogram: &Histogram<u64>| at(histogram, 0.5);
    let load_us = median(&loads);
    let bytes = settings.blocks as f64 * (layers * settings.section_bytes) as f64;
    let waited_us = median(&firsts) + median(&laters);
    Ok(Found {
        blocks: settings.blocks,
        layers,
        section_bytes: settings.section_bytes,
        rounds: settings.rounds,
        link: client.stats().link(),
        compute_us: settings.compute.as_secs_f64() * 1e6,
        compute_p50_us: if computes.is_empty() {
            0.0
        } else {
            median(&computes)
        },
        load_p50_us: load_us,
        load_bytes_per_s: bytes / load_us * 1e6,
        first_wait_p50_us: median(&firsts),
        later_waits_p50_us: median(&laters),
        hidden: (1.0 - waited_us / load_us).max(0.0),
        by_layer: waits
            .iter()
            .map(|waits| Layer {
                wait_p50_us: median(waits),
                wait_p99_us: at(waits, 0.99),
            })
            .collect(),
    })
}

fn fill(
    client: &Client,
    settings: &Settings,
    name: impl Fn(u64) -> BlockId,
) -> Result<(), Failure> {
    let mut random = Random::new(7);
    for block in 0..settings.blocks {
        let section = |_| random.bytes(settings.section_bytes);
        let sections: Vec<Vec<u8>> = (0..settings.layers).map(section).collect();
        let item = PutItem::of_pieces(name(block), sections);
        let options = CallOptions::within(DEADLINE);
        let outcome = client.submit_put(vec![item], options).wait();
        if !matches!(outcome[..], [PutOutcome::Stored | PutOutcome::Exists]) {
            return Err(Failure::failed(format!(
                "block {block} was not stored ({}); the node's status says why",
                outcome
                    .first()
                    .map_or("no answer", |outcome| outcome.word())
            )));
        }
    }
    Ok(())
}

/// Room for times in nanoseconds, up to a minute.
fn times() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds and digits are valid")
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// In microseconds.
fn at(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

impl Found {
    /// Prints the curve the way a person reads it.
    pub(crate) fn print(&self) {
        println!(
            "{} blocks of {} layers of {} bytes over {}: {:.0} us, {:.2} GB/s",
            self.blocks,
            self.layers,
            self.section_bytes,
            self.link,
            self.load_p50_us,
            self.load_bytes_per_s / 1e9
        );
        println!(
            "a layer's compute: {:.0} us assumed, {:.0} us was; {:.0} % of the load hidden",
            self.compute_us,
            self.compute_p50_us,
            self.hidden * 100.0
        );
        println!("{:>5} {:>12} {:>12}", "layer", "wait p50 us", "wait p99 us");
        for (number, layer) in self.by_layer.iter().enumerate() {
            println!(
                "{number:>5} {:>12.1} {:>12.1}",
                layer.wait_p50_us, layer.wait_p99_us
            );
        }
        println!(
            "in all {:.1} us before the first layer, {:.1} us before the others",
            self.first_wait_p50_us, self.later_waits_p50_us
        );
    }
}
