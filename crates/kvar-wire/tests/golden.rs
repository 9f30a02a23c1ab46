//! Frames of released versions stay readable: `golden/wire/v*/*.bin` at the root of the tree.
//!
//! A golden frame is header and message of a sample, without payload. They are never changed; a
//! new sample is added with `KVAR_GOLDEN=write`, which writes only what is missing.

mod samples;

use kvar_base::MapEpoch;
use kvar_wire::{HEADER_BYTES, Header, Kind, Message, decode};
use std::path::PathBuf;

/// A folder a version: in it what that version added.
fn folder(version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../golden/wire/v{version}"))
}

#[test]
fn frames_of_version_1_are_written_and_read_as_ever() {
    frames_are_as_ever(1, samples::samples());
}

#[test]
fn frames_of_version_2_are_written_and_read_as_ever() {
    frames_are_as_ever(2, samples::samples_of_version_2());
}

fn frames_are_as_ever(version: u16, samples: Vec<(&'static str, Message, usize)>) {
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
    let entries = [1, 2].map(|version| std::fs::read_dir(folder(version)).unwrap());
    for entry in entries.into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(
            samples.iter().any(|(sample, ..)| *sample == name),
            "{name} has no sample"
        );
    }
}
