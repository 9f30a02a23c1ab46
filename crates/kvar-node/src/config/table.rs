//! The table of settings: key, default, form, help, and how a value is read.
//!
//! What must always be true: a default can be read by its own reader; help says why this default.

use super::{
    DataPath, LIST_SEPARATOR, LogFormat, MissingDevice, NamespaceConfig, SHARDS_MAX, SPIN_US_MAX,
    Setting,
};
use kvar_base::ByteSize;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

/// Every setting, in the order in which the sample shows them.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "data",
        default: "./kvar-data",
        form: "path[=size][,big]",
        help: "Where blocks are stored: a file, made at first start, or a raw block device. Given \
               several times (in a file: a list), blocks are spread over all by size. \
               The namespace key is written beside the first. With ,big behind it a device is of the \
               second tier: blocks are put on the others (,fast, the default), and what those have \
               no room for any more goes down to it.",
        is_switch: false,
        is_list: true,
        set: |config, text| {
            let paths = text.split(LIST_SEPARATOR).map(DataPath::parse);
            config.data = paths.collect::<Result<_, _>>()?;
            Ok(())
        },
    },
    Setting {
        key: "size",
        default: "",
        form: "size",
        help: "Size of each data file that has none of its own. Needed when the file is made; afterwards it may be left \
               out, and must be the same where it is given. Of a block device it is the most that is \
               used.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.size = Some(size(text)?);
            Ok(())
        },
    },
    Setting {
        key: "missing_device",
        default: "start",
        form: "\"start\" or \"refuse\"",
        help: "What a start does when a device of the store is not there. start serves from the \
               others and says so loudly, because a cache that lacks a part is better than none; \
               refuse is for those who would rather look first.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.missing_device = match text {
                "start" => MissingDevice::Start,
                "refuse" => MissingDevice::Refuse,
                _ => return Err(format!("{text:?} is not one of start, refuse")),
            };
            Ok(())
        },
    },
    Setting {
        key: "dram",
        default: "1GiB",
        form: "size",
        help: "Payload bytes kept in memory, over all shards: the first tier, and where every put \
               lands. The process needs this plus the index and a fixed part besides.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.dram = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "prefault",
        default: "true",
        form: "true or false",
        help: "Takes the memory of dram from the system at start, in the background, and not when a \
               put first needs it: the first puts are as fast as later ones, and memory that is not \
               there is missed at once. false leaves what is never used to others.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.prefault = yes_no(text)?;
            Ok(())
        },
    },
    Setting {
        key: "shards",
        default: "auto",
        form: "number or \"auto\"",
        help: "Threads that each own a part of the device, one a core. Fixed when the device is \
               made; auto takes the device's number, and one a core for a new one.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shards = match text {
                "auto" => None,
                _ => Some(number(text, 1, u64::from(SHARDS_MAX))? as u32).and_then(NonZeroU32::new),
            };
            Ok(())
        },
    },
    Setting {
        key: "listen",
        default: "127.0.0.1:7411",
        form: "address:port",
        help: "Where clients connect. Port 0 takes a free one (see ready_file). Beyond loopback \
               only with insecure, because links are not encrypted.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.listen = address(text)?;
            Ok(())
        },
    },
    Setting {
        key: "admin",
        default: "127.0.0.1:7412",
        form: "address:port",
        help: "Where the admin HTTP answers: /livez, /readyz, /metrics, /v1/status. Port 0 takes \
               a free one.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.admin = address(text)?;
            Ok(())
        },
    },
    Setting {
        key: "insecure",
        default: "false",
        form: "true or false",
        help: "Allows listening beyond loopback although links are not encrypted. Shows in log, \
               metrics and status.",
        is_switch: true,
        is_list: false,
        set: |config, text| {
            config.insecure = match text {
                "true" => true,
                "false" => false,
                _ => return Err(format!("{text:?} is neither true nor false")),
            };
            Ok(())
        },
    },
    Setting {
        key: "flush_after",
        default: "1s",
        form: "duration",
        help: "How long an acknowledged block may be in memory only. A kill loses at most about \
               twice this; shorter writes smaller pieces.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.flush_after = duration(text)?;
            Ok(())
        },
    },
    Setting {
        key: "shutdown_flush",
        default: "30s",
        form: "duration",
        help: "How long a clean stop (SIGTERM) may take to write what is in memory only. What is \
               not written by then is dropped, and the log says how many blocks.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shutdown_flush = duration(text)?;
            Ok(())
        },
    },
    Setting {
        key: "handover_wait",
        default: "60s",
        form: "duration",
        help: "How long a block that one engine hands over to another (the put's hint) is kept in \
               memory for its one reader; a time to live of its own goes before. Then it makes way first.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.handover_wait = duration(text)?;
            Ok(())
        },
    },
    Setting {
        key: "expected_block_bytes",
        default: "64KiB",
        form: "size",
        help: "Usual size of a block; a new device gets an index with room for that many. Too \
               large a guess evicts blocks before the device is full, too small a one costs memory.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.expected_block_bytes = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "scrub",
        default: "4MiB",
        form: "size a second",
        help: "How much each shard reads back and verifies in the background, while nothing else is \
               asked of it, at most once a day all of it. 0 turns it off.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.scrub = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "flash_write_budget",
        default: "1x",
        form: "\"unlimited\", a size a day or drive writes a day",
        help: "What each device is written a day without asking what for: every block within \
               flush_after. One device full may be saved up. Beyond it a block is written when it \
               leaves memory, if it is worth a place; a kill loses what memory alone holds then.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.flash_write_budget = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "flash_write_limit",
        default: "unlimited",
        form: "\"unlimited\", a size a day or drive writes a day",
        help: "What each device is never written more than, a day, but for what is asked for: durable \
               puts, flush, a clean stop. Beyond it what leaves memory is gone.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.flash_write_limit = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "flash_endurance",
        default: "1825",
        form: "drive writes",
        help: "How often each device may be written over in its life, for the forecast of its wear: \
               its maker's drive writes a day times the days of the warranty (1 a day for 5 years: 1825; \
               for QLC 0.3 a day is usual).",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.flash_endurance = number(text, 1, 10_000_000)?;
            Ok(())
        },
    },
    Setting {
        key: "discard",
        default: "false",
        form: "true or false",
        help: "Tells a block device which parts are free before they are written again. For drives \
               that are shared or kept part empty; on a file it does nothing.",
        is_switch: true,
        is_list: false,
        set: |config, text| {
            config.discard = yes_no(text)?;
            Ok(())
        },
    },
    Setting {
        key: "io_engine",
        default: "auto",
        form: "\"auto\", \"io_uring\" or \"threads\"",
        help: "What moves bytes between memory and device. auto takes io_uring and falls back to \
               threads where the system refuses it; the status says which and why.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.io_engine = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "spin_us",
        default: "0",
        form: "microseconds",
        help: "How long a shard looks for work before it sleeps. A wake-up costs 60-80 us on a \
               virtual machine; spinning spends a core to save them.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.spin_us = number(text, 0, SPIN_US_MAX)?;
            Ok(())
        },
    },
    Setting {
        key: "link_budget",
        default: "64MiB",
        form: "size",
        help: "Payload bytes that one link may have on its way at once; bounds what a slow client \
               can hold. At least one largest block.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.link_budget = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "link_requests",
        default: "256",
        form: "number",
        help: "Requests that one link may have open at once. A client learns it at connect.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.link_requests = number(text, 1, 65_536)? as u32;
            Ok(())
        },
    },
    Setting {
        key: "connections_max",
        default: "1024",
        form: "number",
        help: "Links open at once over all shards; one more is told so and closed.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.connections_max = number(text, 1, 1_000_000)? as u32;
            Ok(())
        },
    },
    Setting {
        key: "shared_memory",
        default: "auto",
        form: "\"auto\", \"on\" or \"off\"",
        help: "With which clients links go through shared memory instead of TCP: auto, those that come \
               over loopback; on, all of this host; off, none. They must ask for it and hold the \
               namespace's key, and fall back to TCP where it cannot be.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shared_memory = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "shared_memory_link",
        default: "2MiB",
        form: "size",
        help: "Memory of one such link: two rings, each the largest power of two that fits half of it. \
               Reserved when the link comes to share; more lets a slow reader lag further behind \
               and makes nothing faster.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shared_memory_link = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "shared_memory_links",
        default: "64",
        form: "number",
        help: "Links that may share memory at once: two for each engine on a host of 16 cards, and as \
               many again. One more stays on TCP.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shared_memory_links = number(text, 0, 65_536)? as u32;
            Ok(())
        },
    },
    Setting {
        key: "shared_memory_staging",
        default: "256MiB",
        form: "size",
        help: "Memory of all staging regions together: places that clients on this host ask for, so that                what they read is written where they look at it, without a copy of their own. Taken when                a client asks, first come, first served; one that gets none reads as before. 0: none.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.shared_memory_staging = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "mode",
        default: "load",
        form: "\"off\", \"observe\", \"save\" or \"load\"",
        help: "How much engines use the store where nobody has said otherwise with kvar mode: off, \
               nothing; observe, lookups that are counted; save, puts too; load, everything. load, \
               because that is what a store is for; observe to see first what it would bring.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.mode = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "log",
        default: "info",
        form: "level or filter",
        help: "What is logged: error, warn, info, debug, trace, or a filter by module such as \
               \"info,kvar_node=debug\".",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.log = text.to_owned();
            Ok(())
        },
    },
    Setting {
        key: "log_format",
        default: "text",
        form: "\"text\" or \"json\"",
        help: "How log lines look. They go to standard error.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.log_format = match text {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err(format!("{text:?} is not one of text, json")),
            };
            Ok(())
        },
    },
    Setting {
        key: "key_file",
        default: "",
        form: "path",
        help: "Where the key of the default namespace is. Empty: the data path with .key added. \
               Written at first start with mode 0600.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.key_file = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    },
    Setting {
        key: "ready_file",
        default: "",
        form: "path",
        help: "Written, as JSON with listen, admin and key_file, once the node serves; removed \
               when it stops. For scripts that start it on port 0.",
        is_switch: false,
        is_list: false,
        set: |config, text| {
            config.ready_file = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    },
    Setting {
        key: "namespace",
        default: "",
        form: "name[,share=N][,key_file=path]",
        help: "A namespace beside the default one: blocks and keys of its own, and a share of memory \
               and devices (a weight, 1 by default; 0: what the others leave) that no other's \
               flood can take. Given several times; in a file a table each: [[namespace]] with \
               name, share and key_file, behind all other settings. The name default sets the \
               default one's share. The key file is written beside the data, as DATA.NAME.key, at the \
               first start with that name. At most 31; a name that is gone keeps its place.",
        is_switch: false,
        is_list: true,
        set: |config, text| {
            let texts = text.split(LIST_SEPARATOR).filter(|text| !text.is_empty());
            config.namespaces = texts
                .map(NamespaceConfig::parse)
                .collect::<Result<_, _>>()?;
            Ok(())
        },
    },
];

pub(super) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse()
        .map_err(|error: kvar_base::ByteSizeError| error.to_string())
}

fn yes_no(text: &str) -> Result<bool, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is neither true nor false"))
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration: write 250ms, 1s, 30s or 2m"))
}

fn number(text: &str, min: u64, max: u64) -> Result<u64, String> {
    text.replace('_', "")
        .parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| format!("{text:?} is not a whole number from {min} to {max}"))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    use std::net::ToSocketAddrs;
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    // A host name is asked of the resolver only when it is one, so that a check of a file with
    // plain addresses never touches the network.
    text.to_socket_addrs()
        .ok()
        .and_then(|mut found| found.next())
        .ok_or_else(|| format!("{text:?} is not an address: write 127.0.0.1:7411 or [::1]:7411"))
}
