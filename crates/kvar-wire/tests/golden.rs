//! Frames of released versions stay readable: `golden/wire/v1/*.bin` at the root of the tree.
//!
//! A golden frame is header and message of a sample, without payload. They are never changed; a
//! new sample is added with `KVAR_GOLDEN=write`, which writes only what is missing.

mod samples;

use kvar_base::MapEpoch;
use kvar_wire::{HEADER_BYTES, Header, Kind, decode};
use std::path::PathBuf;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden/wire/v1")
}

#[test]
fn frames_of_version_1_are_written_and_read_as_ever() {
    for (number, (name, message, payload)) in samples::samples().into_iter().enumerate() {
        let mut bytes = Vec::new();
        let request = 0x0102_0304_0506_0700 + number as u64;
        message
            .encode(&mut bytes, request, MapEpoch(9), payload)
            .unwrap();
        let path = folder().join(format!("{name}.bin"));
        if !path.exists() && std::env::var("KVAR_GOLDEN").is_ok_and(|word| word == "write") {
            std::fs::create_dir_all(folder()).unwrap();
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
    let samples = samples::samples();
    for kind in Kind::ALL {
        assert!(
            samples
                .iter()
                .any(|(_, message, _)| message.kind() == *kind),
            "{kind:?}"
        );
    }
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(
            samples.iter().any(|(sample, ..)| *sample == name),
            "{name} has no sample"
        );
    }
}
