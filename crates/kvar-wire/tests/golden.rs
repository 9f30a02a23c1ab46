//! Frames of released versions stay readable: `golden/wire/v*/*.bin` at the root of the tree.
//!
//! A golden frame is header and message of a sample, without payload. They are never changed; a
//! new sample is added with `KVAR_GOLDEN=write`, which writes only what is missing.

mod samples;

use kvar_base::MapEpoch;
use kvar_wire::{HEADER_BYTES, Header, Kind, Message, Put, VERSIONS, decode};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// A folder a version: in it what that version added.
fn folder(version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../golden/wire/v{version}"))
}

/// Versions that have a folder.
fn folders() -> BTreeSet<u16> {
    let root = folder(0);
    let entries = std::fs::read_dir(root.parent().unwrap()).unwrap();
    let number = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let number = name.strip_prefix('v').and_then(|text| text.parse().ok());
        number.unwrap_or_else(|| panic!("golden/wire/{name} is no version: v1, v2, ..."))
    };
    entries.map(number).collect()
}

fn versions() -> impl Iterator<Item = u16> {
    VERSIONS.oldest..=VERSIONS.newest
}

#[test]
fn frames_of_every_version_are_written_and_read_as_ever() {
    for version in versions() {
        frames_are_as_ever(version, samples::added_by(version));
    }
    assert_eq!(folders(), versions().collect(), "folders of golden/wire");
}

fn frames_are_as_ever(version: u16, samples: Vec<samples::Sample>) {
    for (number, (name, message, payload)) in samples.into_iter().enumerate() {
        let mut bytes = Vec::new();
        let request = 0x0102_0304_0506_0700 + number as u64;
        message
            .encode(&mut bytes, request, MapEpoch(9), payload)
            .unwrap();
        let path = folder(version).join(format!("{name}.bin"));
        if !path.exists() && std::env::var("KVAR_GOLDEN").is_ok_and(|word| word == "write") {
            std::fs::create_dir_all(folder(version)).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|error| {
            panic!(
                "{}: {error}; a new sample? Run this test with KVAR_GOLDEN=write",
                path.display()
            )
        });
        assert_eq!(
            bytes, golden,
            "{name} is written differently now: that breaks every peer"
        );

        let header = Header::decode(golden.first_chunk().unwrap()).unwrap();
        assert_eq!(
            (header.request, header.epoch),
            (request, MapEpoch(9)),
            "{name}"
        );
        assert_eq!(header.payload_len as usize, payload, "{name}");
        assert_eq!(
            decode(&header, &golden[HEADER_BYTES..]).unwrap(),
            message,
            "{name}"
        );
    }
}

#[test]
fn every_kind_has_a_golden_frame_and_every_file_a_sample() {
    let samples = samples::all();
    for kind in Kind::ALL {
        assert!(
            samples
                .iter()
                .any(|(_, message, _)| message.kind() == *kind),
            "{kind:?}"
        );
    }
    let entries = folders()
        .into_iter()
        .map(|version| std::fs::read_dir(folder(version)).unwrap());
    for entry in entries.flatten() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(
            samples.iter().any(|(sample, ..)| *sample == name),
            "{name} has no sample"
        );
    }
}

/// A put without the hints of version 3 is the same bytes in every version, so that an old node takes
/// it; and what an old node cannot take is not said to it.
#[test]
fn hints_that_an_older_version_does_not_know_are_left_out() {
    let samples = samples::added_by(3);
    let put = |name: &str| {
        let found = samples.iter().find(|(sample, ..)| *sample == name);
        match &found.expect("a sample").1 {
            Message::Put(put) => put.clone(),
            other => panic!("{other:?}"),
        }
    };
    let length = |put: &Put| {
        let mut bytes = Vec::new();
        kvar_wire::encode(&mut bytes, 1, MapEpoch(1), put, 0).unwrap();
        bytes.len()
    };
    for name in ["put_hints", "put_handover"] {
        let full = put(name);
        let mut old = full.clone();
        old.hints = full.hints.for_version(2);
        assert_eq!(full.hints.for_version(3), full.hints);
        assert_eq!(old.hints.depth, full.hints.depth);
        assert!(!old.hints.handover);
        assert!(length(&old) < length(&full), "{name}");
    }
}

/// To a client of before there were modes a Welcome is what it was, byte for byte.
#[test]
fn a_welcome_without_a_mode_is_the_same_in_every_version() {
    let samples = samples::added_by(5);
    let Some((_, Message::Welcome(welcome), _)) = samples
        .iter()
        .find(|(name, ..)| *name == "welcome_mode")
        .cloned()
    else {
        panic!("a sample");
    };
    let bytes = |welcome: &kvar_wire::Welcome| {
        let mut bytes = Vec::new();
        kvar_wire::encode(&mut bytes, 1, MapEpoch(1), welcome, 0).unwrap();
        bytes.split_off(HEADER_BYTES)
    };
    let plain = kvar_wire::Welcome {
        mode: None,
        ..welcome.clone()
    };
    let (long, short) = (bytes(&welcome), bytes(&plain));
    assert_eq!(long.len(), short.len() + 1);
    assert_eq!(long[..short.len()], short);
}

/// A get whose bytes all go through the link is the same bytes in every version; and places that say
/// nothing, or of which there are not as many as blocks, are refused.
#[test]
fn places_of_a_get_stand_behind_all_else_and_fit_its_items() {
    let samples = samples::added_by(6);
    let found = samples.iter().find(|(name, ..)| *name == "get_placed");
    let Some((_, Message::Get(get), _)) = found.cloned() else {
        panic!("a sample");
    };
    let encoded = |get: &kvar_wire::Get| {
        let mut bytes = Vec::new();
        kvar_wire::encode(&mut bytes, 1, MapEpoch(1), get, 0).unwrap();
        bytes.split_off(HEADER_BYTES)
    };
    let mut plain = get.clone();
    plain.items.iter_mut().for_each(|item| item.slot = None);
    let (long, short) = (encoded(&get), encoded(&plain));
    assert_eq!(long[..short.len()], short);
    // Hints that say nothing, and three places: none, at 0, none.
    let read = |tail: &[u8]| {
        let message = [&short, tail].concat();
        let (mut head, request) = (Vec::new(), 1);
        kvar_wire::encode(&mut head, request, MapEpoch(1), &plain, 0).unwrap();
        let check = |bytes: &[u8]| (kvar_base::check::crc64(bytes) as u32).to_le_bytes();
        head[24..28].copy_from_slice(&(message.len() as u32).to_le_bytes());
        let of_header = check(&head[..32]);
        head[32..36].copy_from_slice(&of_header);
        head[36..40].copy_from_slice(&check(&message));
        let header = Header::decode(head.first_chunk().unwrap()).unwrap();
        decode(&header, &message)
    };
    assert!(read(&[0, 0, 3, 0, 1, 0, 9, 0]).is_ok());
    for (tail, why) in [
        (&[0, 0][..], "left out"),
        (&[0, 0, 3, 0, 0, 0], "left out"),
        (&[0, 0, 2, 0, 1, 0, 9], "2 places for 3 blocks"),
        (&[0, 0, 3, 0, 1, 0, 9, 0, 0], "too many"),
        (&[0, 0, 3, 0, 1, 0], "end"),
    ] {
        let error = read(tail).unwrap_err().to_string();
        assert!(error.to_lowercase().contains(why), "{tail:?}: {error}");
    }
}
