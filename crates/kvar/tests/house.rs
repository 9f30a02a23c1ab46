//! The house rules that a compiler does not check: which crate may use which, whose licences and
//! sources we take, where `unsafe` may live, and that the papers are in step with the code.

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Who may use whom (besides kvar-base, which everyone may). The map of ARCHITECTURE.md.
const MAP: &[(&str, &[&str])] = &[
    ("kvar-base", &[]),
    ("kvar-io", &[]),
    ("kvar-wire", &[]),
    ("kvar-policy", &[]),
    ("kvar-engine", &["kvar-io", "kvar-policy"]),
    ("kvar-transport", &["kvar-io"]),
    ("kvar-client", &["kvar-transport", "kvar-wire"]),
    (
        "kvar-node",
        &["kvar-engine", "kvar-io", "kvar-transport", "kvar-wire"],
    ),
    ("kvar-plan", &["kvar-policy"]),
    (
        "kvar",
        &[
            "kvar-client",
            "kvar-engine",
            "kvar-io",
            "kvar-node",
            "kvar-plan",
            "kvar-transport",
            "kvar-wire",
        ],
    ),
    ("kvar-python", &["kvar-client"]),
    ("kvar-sim", &["kvar-engine", "kvar-io"]),
    ("kvar-fuzz", &["kvar-engine", "kvar-io", "kvar-wire"]),
];

/// Crates whose purpose needs `unsafe`, and the files that may hold it.
const UNSAFE: &[&str] = &["crates/kvar-io/src", "crates/kvar-python/src"];

/// Licences we can ship under Apache-2.0 with notice.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    "0BSD",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the workspace is there")
}

fn metadata() -> Metadata {
    MetadataCommand::new()
        .current_dir(root())
        .exec()
        .expect("cargo metadata works in a cargo test")
}

fn ours(metadata: &Metadata) -> Vec<&Package> {
    metadata
        .packages
        .iter()
        .filter(|package| package.source.is_none())
        .collect()
}

#[test]
fn crates_use_only_what_the_map_allows() {
    let metadata = metadata();
    let map: BTreeMap<&str, &[&str]> = MAP.iter().copied().collect();
    let mut drawn = String::new();
    let mut wrong = Vec::new();
    for package in ours(&metadata) {
        let name = package.name.as_str();
        let Some(allowed) = map.get(name) else {
            wrong.push(format!(
                "{name} is not on the map: add it here and to ARCHITECTURE.md"
            ));
            continue;
        };
        let used: BTreeSet<&str> = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind == DependencyKind::Normal)
            .map(|dependency| dependency.name.as_str())
            .filter(|name| name.starts_with("kvar"))
            .collect();
        drawn += &format!(
            "{name} -> {}\n",
            used.iter().copied().collect::<Vec<_>>().join(", ")
        );
        for other in used {
            if other != "kvar-base" && !allowed.contains(&other) {
                wrong.push(format!("{name} may not use {other}"));
            }
        }
    }
    println!("{drawn}");
    assert!(wrong.is_empty(), "{}\n{drawn}", wrong.join("\n"));
}

#[test]
fn pure_crates_bring_no_sockets_files_or_clocks() {
    let metadata = metadata();
    let forbidden = [
        "mio",
        "tokio",
        "socket2",
        "rustix",
        "libc",
        "io-uring",
        "getrandom",
        "rand",
    ];
    for package in ours(&metadata) {
        if !["kvar-wire", "kvar-policy", "kvar-plan"].contains(&package.name.as_str()) {
            continue;
        }
        for dependency in package
            .dependencies
            .iter()
            .filter(|one| one.kind == DependencyKind::Normal)
        {
            assert!(
                !forbidden.contains(&dependency.name.as_str()),
                "{} may not use {}",
                package.name,
                dependency.name
            );
        }
        for file in files(
            &root()
                .join("crates")
                .join(package.name.as_str())
                .join("src"),
            "rs",
        ) {
            let text = std::fs::read_to_string(&file).expect("a source file is text");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for call in ["std::net", "std::fs", "Instant::now", "SystemTime::now"] {
                assert!(!code.contains(call), "{} uses {call}", file.display());
            }
        }
    }
}

#[test]
fn everything_we_link_has_a_licence_and_a_source_we_accept() {
    for package in &metadata().packages {
        let Some(source) = &package.source else {
            continue;
        };
        assert!(
            source.is_crates_io(),
            "{} comes from {source}",
            package.name
        );
        let licence = package.license.clone().unwrap_or_default();
        let accepted = licence.replace('/', " OR ").split(" OR ").any(|one| {
            one.trim_matches(['(', ')', ' '])
                .split(" AND ")
                .all(|part| LICENCES.contains(&part.trim_matches(['(', ')', ' '])))
        });
        assert!(accepted, "{} has the licence {licence:?}", package.name);
    }
}

#[test]
fn unsafe_lives_where_it_may() {
    let root = root();
    for file in files(&root.join("crates"), "rs") {
        let text = std::fs::read_to_string(&file).expect("a source file is text");
        let place = file
            .strip_prefix(&root)
            .expect("it is below the root")
            .to_string_lossy()
            .into_owned();
        let uses = text.contains("allow(unsafe_code)");
        let allowed =
            UNSAFE.iter().any(|prefix| place.starts_with(prefix)) || place.contains("/tests/");
        assert!(!uses || allowed, "{place} allows unsafe code");
    }
}

#[test]
fn papers_name_every_crate_and_link_only_to_what_is_there() {
    let root = root();
    let read = |name: &str| {
        std::fs::read_to_string(root.join(name)).unwrap_or_else(|_| panic!("{name} is missing"))
    };
    let architecture = read("ARCHITECTURE.md");
    for package in ours(&metadata()) {
        assert!(
            architecture.contains(&format!("`{}`", package.name)),
            "ARCHITECTURE.md does not name {}",
            package.name
        );
    }
    for paper in files(&root, "md") {
        let text = std::fs::read_to_string(&paper).expect("a paper is text");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let there = paper.parent().expect("a file has a folder").join(target);
            assert!(
                there.exists(),
                "{} links to {link}, which is not there",
                paper.display()
            );
        }
    }
    for name in [
        "README.md",
        "SPECIFICATION.md",
        "CHANGELOG.md",
        "LICENSE",
        "docs/internals/glossary.md",
    ] {
        assert!(!read(name).is_empty());
    }
}

/// A claim is worth what its command shows. One named a test that lay in another crate, and showed nothing.
#[test]
fn every_command_of_the_specification_finds_its_tests() {
    let root = root();
    let text = std::fs::read_to_string(root.join("SPECIFICATION.md")).expect("it is there");
    let is_command = |span: &&str| span.starts_with("-p ") || span.contains("cargo nextest run");
    let commands: Vec<&str> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(is_command)
        .collect();
    assert!(commands.len() > 40, "{commands:?}");
    for command in commands {
        let (mut crates, mut tests, mut filters) = (Vec::new(), Vec::new(), Vec::new());
        let after_run = command.split("nextest run").last().unwrap_or_default();
        let mut words = after_run.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                "-p" => crates.push(root.join("crates").join(words.next().unwrap_or_default())),
                "--test" => tests.push(words.next().unwrap_or_default()),
                "-E" => {
                    let set = words.next().and_then(|set| set.strip_prefix("'test("));
                    filters.push(set.and_then(|set| set.strip_suffix(")'")).unwrap_or(word));
                }
                filter => filters.push(filter),
            }
        }
        let mut found = Vec::new();
        for folder in &crates {
            assert!(folder.exists(), "`{command}`: no {}", folder.display());
            let named = tests
                .iter()
                .map(|test| folder.join(format!("tests/{test}.rs")));
            let all = || files(folder, "rs");
            found.extend(if tests.is_empty() {
                all()
            } else {
                named.collect()
            });
        }
        for filter in filters {
            assert!(
                found.iter().any(|file| has_test(file, filter)),
                "`{command}`: no test is called {filter}"
            );
        }
        for file in found {
            assert!(file.exists(), "`{command}`: no {}", file.display());
        }
    }
}

/// Whether a file has a test of which the name, its module's included, contains this.
fn has_test(file: &Path, part: &str) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let tests = text.split("#[test]").skip(1);
    let names = tests.filter_map(|rest| rest.split("fn ").nth(1)?.split('(').next());
    let is_of_module = file.components().any(|it| it.as_os_str() == part);
    names
        .into_iter()
        .any(|name| is_of_module || name.contains(part))
}

#[test]
fn every_source_file_opens_with_its_story() {
    for file in files(&root().join("crates"), "rs") {
        let text = std::fs::read_to_string(&file).expect("a source file is text");
        assert!(
            text.starts_with("//!"),
            "{} has no //! at the top",
            file.display()
        );
    }
}

/// All files with an ending below a folder, build products left out.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "node_modules" && name != "out"
            {
                found.extend(files(&path, ending));
            }
        } else if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            found.push(path);
        }
    }
    found
}
