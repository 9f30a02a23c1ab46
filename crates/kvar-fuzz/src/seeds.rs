//! Inputs that a target understands: from the golden files, and made here. The fuzzer begins with
//! them, since no bytes of chance get past a magic number.

use crate::disk::{ID, OFFSET, device};
use kvar_base::ContentCheck;
use kvar_engine::layout::{
    CHUNK_BYTES, ChunkPlace, ImagePlan, PAGE, PageHead, PageKind, Record, encode_chunk, encode_page,
};
use kvar_wire::HEADER_BYTES;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// Where kinds stand in a frame.
const KIND: usize = 4;

/// Name and bytes of the inputs that belong to a target.
#[must_use]
pub fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    match target {
        "superblock" => vec![named("planned", without_tail(&device().encode()))],
        "page" => pages(),
        "chunk" => vec![named("empty", Vec::new()), named("filled", chunk())],
        "section_directory" => [2, 3, 84, 85, 90]
            .map(|sections| named(&format!("sections-{sections}"), directory(sections)))
            .to_vec(),
        "recovery" => edits(),
        "frame" => frames(),
        "message" => messages(),
        "handshake" => vec![
            named("node", conversation(&["hello", "proof"])),
            named("client", conversation(&["challenge", "welcome"])),
            named("refused", conversation(&["failure"])),
            named(
                "all",
                conversation(&["hello", "challenge", "proof", "welcome"]),
            ),
        ],
        _ => Vec::new(),
    }
}

fn named(name: &str, bytes: Vec<u8>) -> (String, Vec<u8>) {
    (name.to_owned(), bytes)
}

/// Targets put zeros behind what is too short.
fn without_tail(bytes: &[u8]) -> Vec<u8> {
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    bytes[..end].to_vec()
}

fn head(kind: PageKind) -> PageHead {
    PageHead {
        kind,
        segment: 3,
        generation: 5,
        page_number: 0,
        page_count: 1,
        used_pages: 40,
        opened_sequence: 1000,
    }
}

fn pages() -> Vec<(String, Vec<u8>)> {
    let records: Vec<Record> = (1..18).map(|number| Record::bare(2, &ID, number)).collect();
    let encoded = |kind: PageKind, records: &[Record]| {
        let mut page = vec![0; PAGE];
        encode_page(&mut page, &device(), OFFSET, &head(kind), records);
        page
    };
    let mut fields = vec![1, 0, 1, 40];
    fields.extend_from_slice(&[3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    fields.extend_from_slice(&1000_u64.to_le_bytes());
    records
        .iter()
        .for_each(|record| fields.extend_from_slice(record.as_bytes()));
    vec![
        named("header", encoded(PageKind::Header, &[])),
        named("directory", encoded(PageKind::Directory, &records)),
        named("footer", encoded(PageKind::Footer, &records)),
        named("fields", fields),
    ]
}

fn chunk() -> Vec<u8> {
    let mut bytes = vec![0; CHUNK_BYTES];
    for (at, byte) in bytes.iter_mut().take(600).enumerate() {
        *byte = at as u8;
    }
    let place = ChunkPlace {
        shard: 0,
        chunk: 1,
        chunks: 3,
        number: 9,
    };
    encode_chunk(&mut bytes, &device(), OFFSET, place, 500);
    without_tail(&bytes)
}

fn directory(sections: u32) -> Vec<u8> {
    let sections: Vec<_> = (0..sections)
        .map(|at| (at * 50 + 1, ContentCheck(u64::from(at))))
        .collect();
    let plan = ImagePlan::new(&sections);
    let mut image = vec![0; plan.bytes as usize];
    plan.encode(&ID, &mut image);
    image.truncate(plan.directory_pages * PAGE);
    image
}

/// Edits of a device: its superblock, a header, records, a checkpoint; nothing at all.
fn edits() -> Vec<(String, Vec<u8>)> {
    let device = device();
    let page = |offset: u64| ((offset / PAGE as u64) as u16).to_le_bytes();
    let edit = |kind: u8, page: [u8; 2], at: u16, bytes: &[u8]| {
        let at = at.to_le_bytes();
        let mut edit = vec![kind, page[0], page[1], at[0], at[1], bytes.len() as u8];
        edit.extend_from_slice(bytes);
        edit
    };
    let segment = |number: u32, within: u32| page(device.offset(0, number, within));
    let area = device.areas().next().unwrap_or(1);
    vec![
        named("nothing", Vec::new()),
        named("superblock", edit(0, page(0), 20, &[0xff; 8])),
        named("header", edit(0, segment(0, 0), 8, &[0xff; 4])),
        named("record-place", edit(1, segment(0, area), 40, &[0xff; 24])),
        named("record-sequence", edit(1, segment(0, area), 0, &[0xff; 16])),
        named("second-segment", edit(1, segment(1, area), 64, &[0; 32])),
        named("checkpoint-head", edit(2, page(0), 0, &[0xff; 16])),
        named("checkpoint-entry", edit(2, page(4096), 900, &[0xa5; 40])),
    ]
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/wire")
}

/// The golden frames of all versions, by name.
fn frames() -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let versions = std::fs::read_dir(golden()).into_iter().flatten().flatten();
    for version in versions {
        let files = std::fs::read_dir(version.path())
            .into_iter()
            .flatten()
            .flatten();
        for file in files {
            let path = file.path();
            if let (Some(name), Ok(bytes)) = (path.file_stem(), std::fs::read(&path)) {
                found.push(named(&name.to_string_lossy(), bytes));
            }
        }
    }
    found.sort();
    found
}

fn messages() -> Vec<(String, Vec<u8>)> {
    frames()
        .into_iter()
        .map(|(name, frame)| {
            let mut bytes = vec![frame[KIND]];
            bytes.extend_from_slice(&frame[HEADER_BYTES..]);
            (name, bytes)
        })
        .collect()
}

fn conversation(names: &[&str]) -> Vec<u8> {
    let frames = frames();
    let mut bytes = Vec::new();
    for wanted in names {
        let Some((_, frame)) = frames.iter().find(|(name, _)| name == wanted) else {
            continue;
        };
        let message = &frame[HEADER_BYTES..];
        bytes.push(frame[KIND]);
        bytes.extend_from_slice(&(message.len() as u16).to_le_bytes());
        bytes.extend_from_slice(message);
    }
    bytes
}
