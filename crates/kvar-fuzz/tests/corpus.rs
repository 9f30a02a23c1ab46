//! The fuzz targets without a fuzzer: over `fuzz/corpus`, and over mutations of it by seed.
//!
//! `KVAR_CORPUS=write` writes what is missing in the corpus; `KVAR_MUTATIONS=100000` tries that
//! many of each target. What a fuzzer finds is added to the corpus as a file and stays there.

use kvar_fuzz::{TARGETS, Target, mutate, seeds};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target.name)
}

fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder(target))
        .expect("every target has a corpus; run this test with KVAR_CORPUS=write")
        .map(|entry| {
            let path = entry.expect("a folder that can be read").path();
            let name = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            (name, std::fs::read(&path).expect("a file that can be read"))
        })
        .collect();
    files.sort();
    files
}

fn check(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target");
    if std::env::var("KVAR_CORPUS").is_ok_and(|word| word == "write") {
        std::fs::create_dir_all(folder(target)).unwrap();
        for (name, bytes) in seeds(target.name) {
            let path = folder(target).join(name);
            if !path.exists() {
                std::fs::write(path, bytes).unwrap();
            }
        }
    }
    let corpus = corpus(target);
    assert!(!corpus.is_empty());
    for (file, bytes) in &corpus {
        let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
        assert!(
            ran.is_ok(),
            "fuzz/corpus/{name}/{file} breaks target {name}"
        );
    }
    let inputs: Vec<Vec<u8>> = corpus.into_iter().map(|(_, bytes)| bytes).collect();
    let wanted = std::env::var("KVAR_MUTATIONS")
        .ok()
        .and_then(|text| text.parse().ok());
    for seed in 0..wanted.unwrap_or(u64::from(target.mutations)) {
        let bytes = mutate(&inputs, seed);
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&bytes))).is_err() {
            let path = std::env::temp_dir().join(format!("kvar-fuzz-{name}-{seed}"));
            let kept = std::fs::write(&path, &bytes);
            panic!(
                "mutation {seed} breaks target {name}; its bytes ({kept:?}): {}; keep them in fuzz/corpus/{name}",
                path.display()
            );
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        #[test]
        fn every_target_is_run_here_and_by_the_fuzzer() {
            let run = [$(stringify!($name)),*];
            let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
            let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
            for target in TARGETS {
                assert!(run.contains(&target.name), "{} is not run", target.name);
                let bin = format!("name = \"{}\"", target.name);
                assert!(manifest.contains(&bin), "fuzz/Cargo.toml has no {bin}");
                let file = fuzz.join("fuzz_targets").join(format!("{}.rs", target.name));
                assert!(file.exists(), "{} is missing", file.display());
            }
        }
    };
}

targets! { superblock page chunk section_directory recovery frame message handshake }
