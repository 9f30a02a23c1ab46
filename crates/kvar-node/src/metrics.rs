//! `/metrics`: the node's report in OpenMetrics text.
//!
//! Every number comes from one report taken at the scrape, so that the lines of one page belong
//! together. Names begin with `kvar_`; a unit ends the name; counters get `_total`.
//!
//! | file | question |
//! |---|---|
//! | `gauges`, `counters` | what is the node, and what has it done? |
//! | `labelled` | why did what happens happen? |
//! | `each` | what of one device, tier or namespace? |

mod counters;
mod each;
mod gauges;
mod labelled;

use crate::report::NodeReport;
use each::{DEVICE_GAUGES, NAMESPACE_COUNTERS, NAMESPACE_GAUGES, TIER_GAUGES};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// What the page is.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A name, what it says, its unit, and the value now.
type Gauge = (&'static str, &'static str, Option<Unit>, f64);
/// The same of what only grows.
type Counter = (&'static str, &'static str, Option<Unit>, u64);

/// Everything of one page.
#[derive(Debug)]
struct Page {
    gauges: Vec<Gauge>,
    counters: Vec<Counter>,
    labelled: Vec<Labelled>,
    namespaces: Vec<(Labels, Vec<f64>, Vec<u64>)>,
    devices: Vec<(Labels, Vec<f64>)>,
    tiers: Vec<(Labels, Vec<f64>)>,
    info: Vec<(&'static str, String)>,
}

/// Names and values that tell lines of one metric apart.
type Labels = Vec<(&'static str, String)>;

/// A counter by a word.
#[derive(Debug)]
struct Labelled {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    counts: Vec<(String, u64)>,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, unit, value) in &self.gauges {
            let gauge = ConstGauge::new(*value);
            let line = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
            gauge.encode(line)?;
        }
        for (name, help, unit, value) in &self.counters {
            let counter = ConstCounter::new(*value);
            let line =
                encoder.encode_descriptor(name, help, unit.as_ref(), counter.metric_type())?;
            counter.encode(line)?;
        }
        for Labelled {
            name,
            help,
            label,
            counts,
        } in &self.labelled
        {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (word, count) in counts {
                let labels = [(*label, word.as_str())];
                ConstCounter::new(*count).encode(lines.encode_family(&labels)?)?;
            }
        }
        for (gauges, of_each) in [
            (&DEVICE_GAUGES[..], &self.devices),
            (&TIER_GAUGES[..], &self.tiers),
        ] {
            for (number, (name, help)) in gauges.iter().enumerate() {
                let kind = ConstGauge::new(0_f64).metric_type();
                let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
                for (labels, values) in of_each {
                    ConstGauge::new(values[number]).encode(lines.encode_family(labels)?)?;
                }
            }
        }
        for (number, (name, help)) in NAMESPACE_GAUGES.iter().enumerate() {
            let kind = ConstGauge::new(0_f64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, values, _) in &self.namespaces {
                ConstGauge::new(values[number]).encode(lines.encode_family(labels)?)?;
            }
        }
        for (number, (name, help)) in NAMESPACE_COUNTERS.iter().enumerate() {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, _, values) in &self.namespaces {
                ConstCounter::new(values[number]).encode(lines.encode_family(labels)?)?;
            }
        }
        let one = ConstGauge::new(1_i64);
        let mut info = encoder.encode_descriptor(
            "kvar_build_info",
            "Always 1; version, device and mode of this node as labels",
            None,
            one.metric_type(),
        )?;
        one.encode(info.encode_family(&self.info)?)
    }
}

/// The page of a report.
pub(crate) fn page(report: &NodeReport<'_>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collect(report)));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

fn collect(report: &NodeReport<'_>) -> Page {
    Page {
        gauges: gauges::gauges(report),
        counters: counters::counters(report),
        labelled: labelled::labelled(report),
        devices: each::devices(report),
        namespaces: each::namespaces(report),
        tiers: each::tiers(report),
        info: vec![
            ("version", report.facts.version.to_owned()),
            ("uuid", report.facts.uuid.clone()),
            ("insecure", report.facts.insecure.to_string()),
        ],
    }
}

/// A counter of the engines, over all shards.
fn sum(report: &NodeReport<'_>, field: fn(&kvar_engine::Counters) -> u64) -> u64 {
    let shards = report.shards.iter();
    shards.map(|shard| field(&shard.engine.counters)).sum()
}
